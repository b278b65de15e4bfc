"""One optimizer step on the meta device: its operators with their bytes and FLOPs, and each wait of the host for a GPU.

    python benchmarks/fake_step.py                      # models A and B: a table of groups, and an estimate in ms
    python benchmarks/fake_step.py --models A --padded --capacity 1.25 --places 20

Needs no GPU. Tensors on torch's meta device have shapes and no values. Everything that is not on the CPU takes the
branches that the code has for GPUs, so the step is the real one: `training.step.start_step` with the native engine. The
following differs from a GPU:

- The core of attention and RMSNorm are counted as one kernel each way, as torch has them on GPUs. A causal kernel is
  counted, on rows of one document, and the offsets of documents are not copied to the device.
- The experts use torch's grouped matmul, and nothing is compiled. The kernels of `moe.kernels` take part if Triton is
  installed; `--eager` leaves them out.

The estimate of an operator is the longer of two times: that of its bytes at the bandwidth of the memory, and that of
its FLOPs at the rate that such a matmul reaches on one H100. Trust it to 20 %.

Shapes: B rows, S sequence, H query heads, G key/value heads, C head dim.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_stages.models import LENGTH, MODELS, ROWS, example_batch
from data.batch import Batch
from moe.accounting.flops import meta_model, training_flops_per_token
from moe.config import ModelConfig, RouterConfig
from moe.kernels import eager_kernels
from moe.recompute import Recompute
from parallel.apply import build_model
from parallel.mesh import mesh_of_one
from parallel.planning.hardware import read_preset
from training.config import OptimConfig
from training.engine import NativeEngine
from training.norms import SquareSums
from training.planning.operators import (
    VIEWS,
    Operator,
    Places,
    distinct_bytes,
    flops_of,
    moved_bytes,
    tensors_in,
)
from training.planning.stand_ins import gpu_kernels
from training.step import prepare_step, start_step

META = torch.device("meta")
H100 = read_preset("h100")
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "is_nonzero",
}  # fmt: skip
"""Operators that copy a number from the device to the host, and wait for it."""


@dataclass
class Step:
    """What one optimizer step does."""

    operators: list[Operator]
    waits: list[str]
    """`place: what` for each wait of the host for the device, and each copy that makes it wait."""
    copies: list[str]
    """The same for copies between host and device that neither waits for."""
    saved_bytes: int
    """Bytes that the forward passes save for the backward passes, without the weights."""
    parameters: int


class Walk(TorchDispatchMode):
    """Records the operators that run on the meta device, and what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.operators: list[Operator] = []
        self.waits: list[str] = []
        self.copies: list[str] = []
        self.pinned: list[Tensor] = []
        """Host tensors in pinned memory."""
        self._places = Places(__file__)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record what runs in the context."""

        def pin_memory(tensor: Tensor) -> Tensor:  # torch's needs a GPU
            self.pinned.append(tensor.clone())
            return self.pinned[-1]

        with mock.patch.object(torch.Tensor, "pin_memory", pin_memory), _Lists(self), self:
            yield

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = list(tensors_in((args, kwargs)))
        on_device = [tensor for tensor in tensors if tensor.is_meta]
        if name in ("_to_copy", "copy_") and self._crosses(name, tensors, kwargs):
            return self._copy(function, name, args, kwargs, tensors)
        if not on_device:
            return function(*args, **kwargs)
        place = self._place()
        if any(tensor.is_cpu and tensor.dim() > 0 for tensor in tensors):
            self.waits.append(f"{place}: {name} with a tensor on the host")
        if name in WAITING or (name in ("index", "index_put_") and _has_mask(args[1])):
            self.waits.append(f"{place}: {name}")
            if name == "_local_scalar_dense":
                return on_device[0].dtype.is_floating_point or on_device[0].dtype == torch.bool or 1
        result = function(*args, **kwargs)
        self.count(name, place, tensors, list(tensors_in(result)))
        return result

    def count(self, name: str, place: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], flops: int = 0) -> None:
        """Record an operator."""
        if name in VIEWS:
            return
        flops = flops or flops_of(name, inputs)
        dtype = (outputs or inputs)[0].dtype
        self.operators.append(Operator(name, self.phase, place, moved_bytes(name, inputs, outputs), flops, dtype))

    def _crosses(self, name: str, tensors: Sequence[Tensor], kwargs: dict[str, Any]) -> bool:
        source = tensors[-1]
        target = tensors[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        return source.is_meta != (target.type == "meta")

    def _copy(self, function: Any, name: str, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        """Copy between the host and the device. From the device the host gets zeros."""
        source = tensors[-1]
        asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
        to_host = source.is_meta
        # The host waits for a copy from pageable memory. torch copies to the host into pinned memory by itself.
        waits = not asynchronous or not (to_host or any(source is pinned for pinned in self.pinned))
        what = f"{self._place()}: {'device to host' if to_host else 'host to device'}, {distinct_bytes(source)} bytes"
        (self.waits if waits else self.copies).append(what)
        if not to_host:
            return function(*args, **kwargs)
        if name == "copy_":
            return args[0].zero_()
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)

    def _place(self) -> str:
        return self._places.find(backward=self.phase == "backward").line


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Lists(TorchFunctionMode):
    """Records tensors that torch makes on the device from lists of numbers, for which no operator is called."""

    def __init__(self, walk: Walk) -> None:
        super().__init__()
        self.walk = walk

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = function is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta"
        if function in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            made = any(isinstance(index, list) for index in (args[1] if isinstance(args[1], tuple) else args[1:2]))
        if made:
            self.walk.waits.append(f"{self.walk._place()}: a list as a tensor on the device")
        return function(*args, **kwargs)


@contextmanager
def _process_group() -> Iterator[None]:
    """A process group of one rank whose collectives do nothing, unless there is a process group."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def walk_step(
    config: ModelConfig,
    router: RouterConfig,
    batches: list[Batch],
    recompute: Recompute = "none",
    *,
    kernels: bool = True,
    measured: bool = False,
) -> Step:
    """Walk through one optimizer step in bf16: the copies of the batches, all passes, the update and its figures.

    Args:
        batches: the micro-batches, on the CPU.
        kernels: use `moe.kernels` if Triton is installed.
        measured: compute the norms of routers and experts.
    """
    walk, saved = Walk(), dict[int, int]()

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with ExitStack() as stack:
        stack.enter_context(_process_group())
        mesh = mesh_of_one(META)
        model = build_model(config, router, mesh, compute_dtype=torch.bfloat16, seed=None, recompute=recompute)
        engine = NativeEngine([model], OptimConfig(lr=1e-3), mesh)
        _mark_phases(engine, walk)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        for patch in (
            gpu_kernels(walk),
            nullcontext() if kernels else eager_kernels(),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            walk.watch(),
        ):
            stack.enter_context(patch)
        inputs = prepare_step(engine, batches, router)
        start_step(engine, inputs, router, 1e-3, measured)
    saved_bytes = sum(nbytes for storage, nbytes in saved.items() if storage not in weights)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Step(walk.operators, walk.waits, walk.copies, saved_bytes, parameters)


def _mark_phases(engine: NativeEngine, walk: Walk) -> None:
    """Make the engine tell `walk` which phase begins."""
    backward, update = engine.backward, engine.step

    def marked_backward(loss: Tensor) -> None:
        walk.phase = "backward"
        backward(loss)
        walk.phase = "forward"

    def marked_update(lr: float, squares: SquareSums | None) -> Tensor:
        walk.phase = "update"
        return update(lr, squares)

    engine.backward, engine.step = marked_backward, marked_update  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description="The operators of one optimizer step, and the waits of the host.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--padded", action="store_true", help="a part of a row is padding")
    parser.add_argument("--capacity", type=float, help="the capacity factor of the router (default: dropless)")
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of the step")
    parser.add_argument("--eager", action="store_true", help="without the kernels of moe.kernels")
    parser.add_argument("--places", type=int, default=0, help="how many of the most expensive lines of code to show")
    options = parser.parse_args()
    router = RouterConfig(capacity_factor=options.capacity)
    for name in options.models:
        config = replace(MODELS[name], expert_kernel="grouped")
        batches = [example_batch(ROWS, LENGTH, config.vocab_size or 0, padded=options.padded)] * options.accumulation
        step = walk_step(config, router, batches, options.recompute, kernels=not options.eager)
        show(name, step, config, router, ROWS * LENGTH * options.accumulation, options.places)


def show(name: str, step: Step, config: ModelConfig, router: RouterConfig, tokens: int, places: int) -> None:
    """Print the groups of a step's operators, its waits, and the places that take most time."""
    seconds = sum(operator.seconds(H100) for operator in step.operators)
    flops = tokens * training_flops_per_token(meta_model(config, router), LENGTH)
    phases = Counter(operator.phase for operator in step.operators)
    print(f"model {name}: {step.parameters / 1e9:.2f} B parameters, {tokens:,} tokens a step")
    print(f"{len(step.operators):,} operators: {', '.join(f'{phase} {count:,}' for phase, count in phases.items())}")
    print(f"saved for the backward pass: {step.saved_bytes / 1e9:.1f} GB")
    print(f"{'group':28}{'operators':>10}{'GB':>9}{'TFLOP':>9}{'ms':>9}{'share':>8}")
    for group, some in _by(step.operators, lambda operator: operator.group):
        _row(group, some, seconds)
    print(f"estimate: {seconds * 1e3:.0f} ms, {tokens / seconds:,.0f} tokens/s, MFU {flops / seconds / H100.peak:.1%}")
    print(f"the host waits {len(step.waits)} times; {len(step.copies)} copies without a wait")
    for wait, count in Counter(step.waits).items():
        print(f"  {count} times {wait}")
    by_place = _by(step.operators, lambda operator: f"{operator.phase} {operator.place} {operator.name}")
    for place, some in by_place[:places]:
        _row(place, some, seconds)
    print()


def _by(operators: Sequence[Operator], key: Any) -> list[tuple[str, list[Operator]]]:
    """Return the operators by `key(operator)`, those that take most time first."""
    groups: dict[str, list[Operator]] = defaultdict(list)
    for operator in operators:
        groups[key(operator)].append(operator)
    return sorted(groups.items(), key=lambda item: -sum(operator.seconds(H100) for operator in item[1]))


def _row(name: str, operators: Sequence[Operator], total: float) -> None:
    nbytes, flops = (sum(getattr(operator, field) for operator in operators) for field in ("nbytes", "flops"))
    seconds = sum(operator.seconds(H100) for operator in operators)
    print(
        f"{name:28}{len(operators):10,}{nbytes / 1e9:9.2f}{flops / 1e12:9.2f}{seconds * 1e3:9.2f}{seconds / total:8.1%}"
    )


if __name__ == "__main__":
    main()
