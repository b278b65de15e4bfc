"""The step of one rank of any layout, without values: its memory over time, its operators and its collectives.

The code is that of a run: `training.build` and `training.step`, with a fake process group of any size and with tensors
that have a shape, a dtype and no memory (torch's `FakeTensorMode`). Integers are the exception: they are real, because
the sizes of some tensors depend on them. The experts of each token are chosen by `training.planning.skew`, and every
other rank is assumed to route its tokens in the same way.

Memory is counted in tensors. Not counted: what allocators lose to fragmentation, and what libraries allocate.
"""

import gc
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import moe.packed
from data.batch import IGNORE, Batch
from moe.device import planned_for_gpu
from moe.dispatch import group_by_expert
from moe.model import Transformer
from moe.quantization import Packing
from moe.router import Router, RouterStats, Routing
from parallel.layout import Layout
from parallel.mesh import Mesh, build_mesh
from parallel.planning.traffic import Axis
from training.build import build_engine, build_parts
from training.config import Config
from training.engine import Engine, NativeEngine
from training.norms import SquareSums
from training.planning.operators import VIEWS, ZERO, Operator, Place, Places, flops_of, moved_bytes, tensors_in
from training.planning.skew import Loads, choose_experts, counts_of
from training.planning.stand_ins import gpu_kernels
from training.step import prepare_step, start_step

CPU = torch.device("cpu")
COPIED_BY_GLOO = {"_reduce_scatter_base_": 1, "_allgather_base_": 0}
"""Collective -> the argument that gloo has a copy of while it runs."""
MOST_NUMBERS = 4096
"""The most elements of a tensor in fp64 that are computed if they depend on integers only."""


class Allocation(NamedTuple):
    """A tensor's memory."""

    nbytes: int
    part: str
    """What it is for (`PARTS`)."""
    phase: str
    """`build`, `forward`, `backward` or `update`: when it was allocated."""


class Change(NamedTuple):
    """A new size of a tensor's memory."""

    operators: int
    """How many operators had run."""
    storage: int
    """Its number."""
    nbytes: int
    """0 if it is freed."""


class Collective(NamedTuple):
    """One collective operation of the traced rank."""

    name: str
    axis: Axis
    ranks: tuple[int, ...]
    """The ranks of its group."""
    sent: int
    """Bytes that this rank sends, with the algorithms that `parallel.planning.traffic` assumes."""
    phase: str
    place: str
    operators: int
    """How many operators had run."""


@dataclass(frozen=True)
class Subject:
    """What is traced."""

    config: Config
    """With a vocabulary size and a number for every axis."""
    layout: Layout
    rank: int = 0
    dtype: torch.dtype = torch.float32
    """Compute dtype."""
    capability: int | None = None
    """Major number of the GPU's compute capability; None: the step runs on a CPU."""
    loads: Loads | None = None
    """None: balanced."""
    document: int | None = None
    """Tokens of a document; None: each row is one document."""
    micro_batches: int | None = None
    """How many of the step's micro-batches run; None: as many as are needed to see the largest memory."""


@dataclass(frozen=True)
class Trace:
    """What one step of one rank does."""

    operators: list[Operator]
    collectives: list[Collective]
    micro_batches: int
    """Micro-batches that were traced."""
    state: dict[str, int]
    """Bytes that exist all the time: `weights`, `gradients`, `moments`."""
    memory: list[tuple[int, int]]
    """(operators that had run, bytes) after each change of the memory in the step."""
    peak: int
    """The largest number of bytes."""
    peak_phase: str
    parts: dict[str, int]
    """Part -> bytes at the peak."""


def needed_micro_batches(config: Config, layout: Layout) -> int:
    """Return how many micro-batches show the largest memory.

    Without a pipeline these are two: the gradients of the first one exist during the second one. A pipeline has at most
    2·P micro-batches of two stages on a rank at a time.
    """
    wanted = 2 if layout.pipeline == 1 else 2 * layout.pipeline
    return min(config.train.accumulation, wanted)


def trace_step(subject: Subject) -> Trace:
    """Trace an optimizer step of a rank after the first one, which creates the optimizer's state.

    With DeepSpeed it is the third one, because in the second one stage 3 still compares the order of the modules.
    """
    config, layout = subject.config, subject.layout
    config = replace(config, train=replace(config.train, compile=False))
    number = subject.micro_batches or needed_micro_batches(config, layout)
    with ExitStack() as stack:
        stack.enter_context(_fake_world(subject.rank, layout.world))
        mesh = build_mesh(CPU, layout)
        tracer = Tracer(mesh, _most_experts(config), gloo=subject.capability is None)
        batches = example_batches(config, layout, number, subject.document)
        if subject.capability is not None:
            pairs = {window: _mean_pairs(batches[0], window) for window in _windows(config)}
            stack.enter_context(planned_for_gpu(subject.capability))
            stack.enter_context(gpu_kernels(tracer, pairs.__getitem__))
        stack.enter_context(tracer.watch())
        parts = build_parts(config, config.model, mesh, subject.dtype, None)
        if config.engine.kind == "deepspeed":
            stack.enter_context(_lists_as_on_rank_0())
        engine = build_engine(config, parts, mesh)
        route_by_loads(parts, subject.loads)
        _mark_update(engine, tracer)
        # One micro-batch is enough for the optimizer's state, but not for a pipeline or for DeepSpeed.
        first = batches[:1] if isinstance(engine, NativeEngine) and engine.pipeline is None else batches
        for _ in range(2 if config.engine.kind == "deepspeed" else 1):
            start_step(engine, prepare_step(engine, first, config.router), config.router, 1e-3)
        gc.collect()
        tracer.begin()
        result = start_step(engine, prepare_step(engine, batches, config.router), config.router, 1e-3)
        tracer.phase = "end"
        del result
        trace = tracer.result(engine, number)
        engine.close()
    return trace


@contextmanager
def _lists_as_on_rank_0() -> Iterator[None]:
    """Let the lists that DeepSpeed compares with those of rank 0 be equal, which another rank would have to send."""
    from deepspeed.runtime.zero import utils

    with mock.patch.object(utils, "dist", SimpleNamespace(**vars(utils.dist) | {"get_rank": lambda: 0})):
        yield


class Tracer(TorchDispatchMode):
    """Runs operators on floating-point tensors without values, and records allocations, operators and collectives."""

    def __init__(self, mesh: Mesh, integer: int, *, gloo: bool) -> None:
        """
        Args:
            integer: what the host reads from an integer tensor without values.
            gloo: whether the collectives are those of gloo.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.collectives: list[Collective] = []
        self.phase = "build"
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._integer = integer
        self._gloo = gloo
        self._mesh = mesh
        self._places = Places(__file__, moe.packed.__file__)
        self._live: dict[int, int] = {}
        """Address of a storage -> its number."""
        self._allocations: list[Allocation] = []
        self._changes: list[Change] = []
        self._first = 0
        self._gradients: set[int] = set()
        """Numbers of the storages of the gradients that the last update took."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record what runs in the context."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            # FSDP frees the memory of gathered weights, and allocates it again, in this way.
            before, result = storage.nbytes(), resize(storage, size)
            number = self._live.get(storage._cdata)
            if number is not None and size != before:
                self._changes.append(Change(len(self.operators), number, size))
            elif number is None and size:
                self._track(storage, "resize_")
            return result

        # DeepSpeed moves the model to its device, which cannot be done with tensors without values.
        stays = mock.patch.object(nn.Module, "to", lambda module, *_args, **_kwargs: module)
        with mock.patch.object(torch.UntypedStorage, "resize_", resize_), stays, self:
            yield

    def begin(self) -> None:
        """Forget the operators so far. The step to record begins here."""
        self.operators.clear()
        self.collectives.clear()
        self._first = len(self._changes)
        self.phase = "forward"

    def count(self, name: str, place: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], flops: int = 0) -> None:
        """Record an operator."""
        if name not in VIEWS and (outputs or inputs):
            dtype = (outputs or inputs)[0].dtype
            nbytes, flops = moved_bytes(name, inputs, outputs), flops or flops_of(name, inputs)
            self.operators.append(Operator(name, self._phase(), place, nbytes, flops, dtype))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(cls, DTensor) for cls in types):
            return NotImplemented  # This mode sees the operators on the local tensors.
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.namespace == "prim":
            # It reads an attribute of a tensor. After some nodes of autograd's graph, no other call tells their place.
            self._place()
            return args[0].fake_device if name == "device" else function(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        if function.namespace == "c10d":
            return self._collective(function, name, args, kwargs, inputs)
        result = self._run(function, name, args, kwargs, inputs)
        outputs = [tensor for tensor in tensors_in(result) if tensor.device.type == "cpu"]
        place = self._place().line
        for tensor in outputs:
            self._track(tensor.untyped_storage(), name, place)
        if name == "multiply_packed":
            self._multiply_packed(place, args, inputs, outputs)
        else:
            self.count(name, place, inputs, outputs)
        return result

    def _multiply_packed(self, place: str, args: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Record a product with quantised weights, and the memory of the matrix that it dequantises."""
        packing, x, packed_eP = Packing(*args[4:]), args[0], args[1]
        matrices = min(len(packed_eP), x.shape[0])
        nbytes = 2 * x.element_size() * packing.numel * matrices + moved_bytes("multiply_packed", inputs, outputs)
        flops = 2 * x.numel() * outputs[0].shape[1]
        self.operators.append(Operator("multiply_packed", self._phase(), place, nbytes, flops, x.dtype))
        number, count = len(self._allocations), len(self.operators)
        workspace = packing.workspace_bytes(x.element_size())
        self._allocations.append(Allocation(workspace, "dequantised weights", self._phase()))
        self._changes += [Change(count, number, workspace), Change(count, number, 0)]

    def _run(self, function: Any, name: str, args: Any, kwargs: Any, inputs: Sequence[Tensor]) -> Any:
        """Call an operator on tensors without values if it has or makes floating-point numbers, else on real ones."""
        faked = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if faked and name == "_local_scalar_dense":
            dtype = inputs[0].dtype
            if dtype in (torch.bool, torch.uint8) and self._place().line == ZERO:
                return 0  # DeepSpeed asks whether a gradient is not finite. It would leave out the update.
            return 1.0 if dtype.is_floating_point else True if dtype == torch.bool else self._integer
        if name == "group_by_expert" and not faked:  # a kernel for GPUs
            experts_A, num_experts = args
            return group_by_expert(experts_A, num_experts, kernel=False)
        if faked and name == "_unique2":  # All numbers are assumed to differ.
            (values,) = inputs
            index = values.new_empty(values.numel(), dtype=torch.int64)
            return values.new_empty(values.numel()), index.view(values.shape), index
        if name in ("index", "index_put_") and any(_is_mask(tensor) for tensor in args[1]):
            # Masks are of scores that are equal or NaN (`moe.selection`), and are assumed to select nothing.
            values, (mask, *_) = args[:2]
            return values if name == "index_put_" else values.new_empty(0, *values.shape[mask.dim() :])
        to_cpu = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        if name.startswith(("empty", "new_empty")) and to_cpu and _dtype_of(kwargs, inputs) == torch.uint8:
            with self._fake:  # The bytes of quantised weights, or of several weights that FSDP gathers at once.
                return function(*args, **kwargs)
        floats = [tensor for tensor in inputs if tensor.is_floating_point() and tensor.dim()]
        if floats and not faked and all(map(_is_of_integers, floats)):
            return function(*args, **kwargs)
        if faked or any(tensor.is_cpu for tensor in floats) or (floats and kwargs.get("device") and to_cpu):
            with self._fake:
                return function(*args, **kwargs)
        if not inputs and to_cpu:
            with self._fake:
                result = function(*args, **kwargs)
            if not isinstance(result, Tensor) or result.is_floating_point():
                return result
        return function(*args, **kwargs)

    def _collective(self, function: Any, name: str, args: Any, kwargs: Any, inputs: Sequence[Tensor]) -> Any:
        """Record a collective, and fill the integers that it returns as if all ranks had those of this one."""
        group = next(
            dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg)
        )
        ranks = group.size()
        place, numbers = self._place(), not any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if not numbers:
            with self._fake:
                result = _call_collective(function, name, args, kwargs, ranks)
                copied = COPIED_BY_GLOO.get(name) if self._gloo else None
                copy = None if copied is None else torch.empty_like(args[copied])
            if copy is not None:
                self._track(copy.untyped_storage(), name, place.line)
                del copy
        else:
            result = _call_collective(function, name, args, kwargs, ranks)
            if name == "alltoall_base_" and not (args[0].numel() and args[1].numel()):
                args[0].zero_()
            elif name == "alltoall_base_":
                received, sent = args[0].view(ranks, -1), args[1].view(ranks, -1)
                received.copy_(sent[group.rank()].expand_as(received))
            elif name.startswith("recv"):  # torch's pipeline sends 1 from rank to rank: all ranks know their shapes.
                inputs[0].fill_(1)
            elif name == "_allgather_base_":
                args[0].view(ranks, -1).copy_(args[1].flatten().expand(ranks, -1))
        axis: Axis = "bookkeeping"
        if not numbers and inputs[0].dim():
            axis = axis_of(name, place.caller)
            if axis == "expert" and id(group) != id(self._mesh.expert):
                axis = "expert_tensor"
        members = tuple(dist.get_process_group_ranks(group))
        sent = _sent_bytes(name, args, ranks, group.rank())
        self.collectives.append(Collective(name, axis, members, sent, self._phase(), place.caller, len(self.operators)))
        return result

    def _phase(self) -> str:
        return "backward" if self.phase == "forward" and torch._C._current_graph_task_id() != -1 else self.phase

    def _place(self) -> Place:
        return self._places.find(backward=self._phase() == "backward")

    def _track(self, storage: torch.UntypedStorage, name: str, place: str = "") -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._live or not nbytes:
            return
        number = len(self._allocations)
        self._live[key] = number
        self._allocations.append(Allocation(nbytes, part_of(name, place or self._place().line), self._phase()))
        self._changes.append(Change(len(self.operators), number, nbytes))
        weakref.finalize(storage, self._freed, key, number).atexit = False

    def _freed(self, key: int, number: int) -> None:
        del self._live[key]
        self._changes.append(Change(len(self.operators), number, 0))

    def result(self, engine: Engine, micro_batches: int) -> Trace:
        """Return what was recorded since `begin`."""
        state = self._state(engine)
        sizes: dict[int, int] = {}
        total = peak = peak_at = 0
        memory: list[tuple[int, int]] = []
        for index, change in enumerate(self._changes):
            total += change.nbytes - sizes.get(change.storage, 0)
            sizes[change.storage] = change.nbytes
            if index >= self._first:
                memory.append((change.operators, total))
                if total > peak:
                    peak, peak_at = total, index
        at_peak: dict[int, int] = {}
        for change in self._changes[: peak_at + 1]:
            at_peak[change.storage] = change.nbytes
        parts: Counter[str] = Counter()
        for number, nbytes in at_peak.items():
            parts[state.get(number) or self._allocations[number].part] += nbytes
        totals: Counter[str] = Counter()
        for number, part in state.items():
            totals[part] += self._allocations[number].nbytes
        return Trace(
            operators=self.operators,
            collectives=self.collectives,
            micro_batches=micro_batches,
            state=dict(totals),
            memory=memory,
            peak=peak,
            peak_phase=self._allocations[self._changes[peak_at].storage].phase,
            parts={part: nbytes for part, nbytes in parts.most_common() if nbytes},
        )

    def _state(self, engine: Engine) -> dict[int, str]:
        """Return the number of each storage of weights, gradients and moments -> its part."""
        found = dict.fromkeys(self._gradients, "gradients")
        for part in engine.parts:
            found |= dict.fromkeys(self._numbers(*part.parameters(), *part.buffers()), "weights")
        for state in _optimizer_of(engine).state.values():
            found |= dict.fromkeys(self._numbers(*state.values()), "moments")
        return found

    def note_gradients(self, engine: Engine) -> None:
        """Remember where the gradients are, which exist until the end of the step."""
        self._gradients = self._numbers(*(weight.grad for part in engine.parts for weight in part.parameters()))

    def _numbers(self, *tensors: Any) -> set[int]:
        """Return the numbers of the storages of what is a tensor."""
        found = set()
        with _disable_current_modes():
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    found.add(self._live.get(local.untyped_storage()._cdata, -1))
        return found - {-1}


def part_of(name: str, place: str) -> str:
    """Return what a tensor is for, by the operator that made it and by its place. No weight, gradient or moment."""
    file = place.partition(":")[0]
    if file in ("parallel/fsdp.py", "training/deepspeed/engine.py"):
        return "gathered weights and gradients"
    if name == "_to_copy" and file in ("moe/linear.py", "moe/experts.py", "moe/expert_loop.py"):
        return "casts"
    return next((part for start, part in PARTS.items() if file.startswith(start)), "other")


def axis_of(name: str, caller: str) -> Axis:
    """Return the axis of a collective on floating-point numbers, by its name and by the line that called it."""
    if name in ("send", "recv_"):
        return "pipeline"
    axes: dict[str, Axis] = {
        "parallel/expert.py": "expert",
        "parallel/context.py": "context",
        "parallel/fsdp.py": "shard",
        "parallel/gradients.py": "gradients",
        "training/deepspeed/": "shard",
        "training/": "bookkeeping",
        "parallel/pipeline.py": "bookkeeping",
    }
    default: Axis = "expert" if name == "alltoall_base_" else "tensor"
    return next((axis for start, axis in axes.items() if caller.startswith(start)), default)


PARTS = {
    "moe/attention": "attention",
    "moe/token_context.py": "attention",
    "parallel/context.py": "attention",
    "moe/router": "router",
    "moe/selection.py": "router",
    "moe/noise.py": "router",
    "moe/dispatch.py": "dispatch",
    "parallel/expert.py": "dispatch",
    "moe/expert": "experts",
    "moe/feedforward.py": "experts",
    "moe/losses.py": "logits and loss",
    "moe/linear.py": "norms and projections",
    "moe/low_rank.py": "adapters",
    "moe/layer.py": "norms and projections",
    "moe/model.py": "norms and projections",
    "parallel/collectives.py": "communication",
    "parallel/tensor.py": "communication",
    "parallel/pipeline.py": "communication",
}
"""The start of a file's name -> the part of the tensors that it makes."""


def _is_of_integers(numbers: Tensor) -> bool:
    """Return whether real numbers were computed from integers. Sizes can depend on these (`moe.expert_loop`)."""
    return numbers.dtype == torch.float64 and numbers.numel() <= MOST_NUMBERS


def _dtype_of(kwargs: Mapping[str, Any], inputs: Sequence[Tensor]) -> torch.dtype | None:
    """Return the dtype of the tensor that an operator makes without values."""
    return kwargs.get("dtype") or (inputs[0].dtype if inputs else None)


def _is_mask(index: Tensor | None) -> bool:
    """Return whether an index is a mask without values."""
    return isinstance(index, FakeTensor) and index.dtype == torch.bool


def _is_group(value: Any) -> bool:
    try:
        dist.ProcessGroup.unbox(value)
    except RuntimeError:
        return False
    return True


def _call_collective(function: Any, name: str, args: Any, kwargs: Any, ranks: int) -> Any:
    if name == "alltoall_base_" and not (args[0].numel() and args[1].numel()):
        # The fake group refuses a rank that only sends, or only receives.
        rows = args[0].new_empty(ranks)
        return function(rows, rows, args[2], [], [], *args[5:], **kwargs)
    return function(*args, **kwargs)


def _sent_bytes(name: str, args: Any, ranks: int, rank: int) -> int:
    """Return the bytes that a rank sends: by a ring for gathers and reductions, to every other rank directly else."""
    if ranks == 1:
        return 0

    def size(value: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))

    if name == "alltoall_base_":
        sent, splits = args[1], args[4]
        own = splits[rank] / sum(splits) if splits and sum(splits) else 1 / ranks
        return round(size(sent) * (1 - own))
    if name in ("_allgather_base_", "allgather_"):
        return (ranks - 1) * size(args[1])
    if name in ("_reduce_scatter_base_", "reduce_scatter_"):
        return round(size(args[1]) * (ranks - 1) / ranks)
    if name == "allreduce_":
        return round(2 * size(args[0]) * (ranks - 1) / ranks)
    return 0 if name.startswith("recv") else size(args[0])


@contextmanager
def _fake_world(rank: int, world_size: int) -> Iterator[None]:
    """A process group of any size whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def example_batches(config: Config, layout: Layout, number: int, document: int | None) -> list[Batch]:
    """Return micro-batches of random tokens, with documents of equal length."""
    rows, length = config.train.global_batch // config.train.accumulation // layout.data, config.train.seq_len
    positions_S = torch.arange(length)
    documents_S = positions_S // (document or length)
    numbers_BS = torch.arange(rows * length).view(rows, length)
    batches = []
    for _ in range(number):
        tokens_BS = torch.randint(config.model.vocab_size or 1, (rows, length))
        labels_BS = tokens_BS.roll(-1, dims=1)
        labels_BS[:, -1] = IGNORE
        batches.append(
            Batch(
                tokens_BS=tokens_BS,
                labels_BS=labels_BS,
                positions_BS=(positions_S % (document or length)).repeat(rows, 1),
                documents_BS=documents_S.int().repeat(rows, 1),
                domains_BS=torch.zeros(rows, length, dtype=torch.uint8),
                numbers_BS=numbers_BS,
            )
        )
    return batches


def _most_experts(config: Config) -> int:
    """Return how many experts the token with most experts has. Experts that choose tokens can all choose the same."""
    if config.router.kind == "expert_choice":
        return config.model.num_experts or 1
    return config.model.top_k or 1


def _windows(config: Config) -> set[int | None]:
    return {None, *(config.model.window(layer) for layer in range(config.model.num_layers))}


def _mean_pairs(batch: Batch, window: int | None) -> float:
    return batch.attended_pairs(window) / batch.tokens_BS.numel()


def route_by_loads(parts: Sequence[Transformer], loads: Loads | None) -> None:
    """Replace the choice of every router, which has no values, by real numbers of experts."""
    for part in parts:
        routers = [module for module in part.modules() if isinstance(module, Router)]
        layers = range(part.config.num_moe_layers)[part.moe_layers]
        for layer, router in zip(layers, routers, strict=True):
            shares = loads[layer] if loads else (1 / router.num_experts,) * router.num_experts
            router.register_forward_hook(_Choice(shares))


class _Choice:
    """A hook that replaces `Routing.experts_TK`."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = shares
        self._made: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, router: Router, args: Any, output: tuple[Routing, RouterStats]) -> tuple[Routing, RouterStats]:
        routing, stats = output
        tokens, top_k = routing.experts_TK.shape
        if (tokens, top_k) not in self._made:
            with _disable_current_modes():
                counts = self._counts(router, tokens, routing.num_experts)
                self._made[tokens, top_k] = choose_experts(counts, tokens, top_k)
        return routing._replace(experts_TK=self._made[tokens, top_k]), stats

    def _counts(self, router: Router, tokens: int, experts: int) -> list[int]:
        factor = router.capacity_factor if router.tokens_choose else router.capacity_factor or 1.0
        limit = None if factor is None else math.ceil(factor * router.top_k * tokens / experts)
        if limit is None or router.tokens_choose:
            return counts_of(self.shares, tokens, router.top_k, limit)
        return [min(limit, tokens)] * experts


def _optimizer_of(engine: Engine) -> torch.optim.Optimizer:
    """Return the optimizer that has the moments."""
    if isinstance(engine, NativeEngine):
        return engine.optimizer
    from training.deepspeed.engine import DeepSpeedEngine

    assert isinstance(engine, DeepSpeedEngine)
    optimizer: torch.optim.Optimizer = engine.zero.optimizer
    return optimizer


def _mark_update(engine: Engine, tracer: Tracer) -> None:
    """Make the engine tell `tracer` when the update begins."""
    update = engine.step

    def marked(lr: float, squares: SquareSums | None = None) -> Tensor:
        tracer.note_gradients(engine)
        before, tracer.phase = tracer.phase, "update"
        result = update(lr, squares)
        tracer.phase = before
        return result

    engine.step = marked  # type: ignore[method-assign]
