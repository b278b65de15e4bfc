"""Stage `step`: the speed, memory and time by groups of whole optimizer steps, beside transformers' Mixtral.

Each model is built by the code that trains, without a configuration file, and takes steps on real text: the files of
this repository, a word or a symbol per token, packed by the code that packs training data. The router has learned in a
few steps before the measured ones. Weights start on the GPU, because drawing billions of reproducible numbers on the
CPU, as training does, would take most of the time.

The peer is `MixtralForCausalLM` with the shape of model A, bf16 weights, grouped matmuls, fused attention and fused
AdamW. It has no balance loss and no fp32 weights, and so does less. It cannot pack: its rows are one document each, and
the row `whole rows` of Mixwright does the same work.
"""

import os

# Before torch is imported: large allocations of changing sizes would otherwise leave holes.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_stages.models import LENGTH, MODELS, ROWS, draw_weights, transformers_model
from benchmarks.gpu_stages.stage import Stage, free_memory, one_process, run_stage, synchronize, with_compile
from data.batch import Batch
from data.config import DataConfig
from data.loader import Loader
from data.packing import Row, pack_row
from moe.accounting.flops import MatmulCosts, matmul_costs, meta_model
from moe.compiled import CompiledBlocks, compile_clock
from moe.config import ModelConfig, RouterConfig, attended_pairs
from moe.kernels import eager_kernels
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.planning.plan import plan
from training.build import build_parts
from training.config import CheckpointConfig, Config, LaunchConfig, OptimConfig, RunConfig, TrackingConfig, TrainConfig
from training.device import compute_dtype, peak_flops
from training.engine import NativeEngine
from training.layout import build_workload
from training.loop import step_flops
from training.report.metrics import max_vio
from training.report.profile import (
    activities,
    flops_by_group,
    mark_parts,
    read_trace,
    summarize_trace,
)
from training.step import StepResult
from training.steps import Steps

ROOT = Path(__file__).resolve().parents[2]
LR, WARM_UP, TIMED, PROFILED = 3e-4, 12, 6, 2
"""The learning rate, and the numbers of steps before the measured ones, in each of two timings, and in a trace."""
KEPT_TRACE = "step-A-compiled"
"""The trace that goes into `files.zip`. Of the others, only the tables are kept."""
DOCUMENTS_PER_ROW = 10
BOS, EOS, UNKNOWN = 1, 2, 0


@dataclass(frozen=True)
class Size:
    """The batch of a step."""

    seq_len: int
    rows: int


FULL = Size(LENGTH, ROWS)
TINY = Size(128, 2)


def tiny(model: ModelConfig) -> ModelConfig:
    """Return a small model of the same kind."""
    width = None if model.expert_hidden_dim is None else 32
    experts, heads = min(8, model.num_experts or 0), min(4, model.num_kv_heads)
    small = replace(model, dim=64, num_layers=2, num_heads=4, num_kv_heads=heads, head_dim=16, hidden_dim=96)
    return replace(small, num_experts=experts, expert_hidden_dim=width, vocab_size=2048)


# ------------------------------------------------------------------------------------------------------------- text


class Text:
    """The training tokens, with the interface of `data.tokens.split.TokenSplit` that the loader needs.

    A word, a number, a symbol or a run of spaces is one token. A document is a part of a file between empty lines, such
    that a row has about `DOCUMENTS_PER_ROW` of them.
    """

    def __init__(self, vocab_size: int, seq_len: int, tokens: int) -> None:
        self.name, self.key = "train", "benchmark"
        paths = sorted(path for kind in ("*.py", "*.md") for path in ROOT.rglob(kind) if "/." not in str(path))
        words = [re.findall(r"\w+|[^\w\s]|\s+", part) for path in paths for part in self._documents(path, seq_len)]
        counts = Counter(word for document in words for word in document)
        ids = {word: number for number, (word, _) in enumerate(counts.most_common(vocab_size - 3), start=3)}
        stream: list[int] = []
        starts: list[int] = []
        order = np.random.default_rng(0).permutation(len(words))
        for document in order:
            starts.append(len(stream))
            stream += [BOS, *(ids.get(word, UNKNOWN) for word in words[document]), EOS]
        repeats = -(-tokens // len(stream))
        self._tokens = np.array(stream * repeats)
        self._starts = np.concatenate([np.array(starts) + len(stream) * number for number in range(repeats)])
        self.num_tokens = len(self._tokens)

    @staticmethod
    def _documents(path: Path, seq_len: int) -> list[str]:
        paragraphs, documents = re.split(r"(?<=\n\n)", path.read_text(encoding="utf-8")), [""]
        for paragraph in paragraphs:
            # About 2.5 characters a token.
            if len(documents[-1]) > 2.5 * seq_len / DOCUMENTS_PER_ROW:
                documents.append("")
            documents[-1] += paragraph
        return documents

    def num_rows(self, seq_len: int) -> int:
        """Return the number of rows of `seq_len` tokens."""
        return (self.num_tokens - 1) // seq_len

    def row(self, i: int, seq_len: int, cross_documents: bool = False) -> Row:
        """Return row `i`."""
        start, stop = i * seq_len, (i + 1) * seq_len + 1
        first, last = np.searchsorted(self._starts, (start + 1, stop - 1))
        starts = self._starts[first:last] - start
        return pack_row(self._tokens[start:stop], starts, np.zeros(len(starts) + 1, np.uint8), seq_len, cross_documents)


def make_loader(text: Text, size: Size, *, whole_rows: bool) -> Loader:
    """Return the loader that training uses, for one rank."""
    return Loader(
        text,  # type: ignore[arg-type]
        seq_len=size.seq_len,
        global_batch=size.rows,
        accumulation=1,
        rank=0,
        world_size=1,
        seed=0,
        cross_documents=whole_rows,
    )


# ------------------------------------------------------------------------------------------------------------ model


def configuration(model: ModelConfig, size: Size, device: torch.device, recompute: str) -> Config:
    """Return the configuration that a run of this model would have, without torch.compile."""
    config = Config(
        run=RunConfig("benchmark"),
        model=model,
        router=RouterConfig(),
        data=DataConfig("embedded"),
        train=TrainConfig(
            steps=1_000_000,
            seq_len=size.seq_len,
            global_batch=size.rows,
            device=device.type,  # type: ignore[arg-type]
        ),
        optim=OptimConfig(lr=LR, schedule="constant", warmup_steps=WARM_UP),
        parallel=ParallelConfig(recompute=recompute),  # type: ignore[arg-type]
        checkpoint=CheckpointConfig(),
        tracking=TrackingConfig(wandb="disabled"),
        launch=LaunchConfig(),
    )
    return with_compile(config, False)


def build(config: Config, mesh: Mesh) -> NativeEngine:
    """Return the engine of the whole model with initial weights."""
    torch.manual_seed(0)
    parts = build_parts(config, config.model, mesh, compute_dtype(config.train.precision, mesh.device), seed=None)
    for part in parts:
        draw_weights(part)
    return NativeEngine(parts, config.optim, mesh)


class Run:
    """A model in training: its engine, its data and its steps, which `training.steps.Steps` runs."""

    def __init__(
        self, name: str, stage: Stage, mesh: Mesh, size: Size, text: Text, recompute: str, *, compiled: bool
    ) -> None:
        model = tiny(MODELS[name]) if stage.tiny else MODELS[name]
        self.name, self.stage, self.size, self.text, self.recompute = name, stage, size, text, recompute
        self.config = configuration(model, size, stage.device, recompute)
        self.costs: MatmulCosts = matmul_costs(meta_model(model, self.config.router))
        kind = f"{name} {'compiled' if compiled else 'eager'}"
        with stage.timed(f"{kind}: build"):
            self.engine = build(self.config, mesh)
        if compiled:
            self.compile()
        self.start(whole_rows=False)
        if stage.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with stage.timed(f"{kind}: first step"):
            self.step()
        with stage.timed(f"{kind}: warm-up"):
            for _ in range(1 if stage.tiny else WARM_UP - 1):
                self.step()

    def start(self, *, whole_rows: bool) -> None:
        """Begin at the first row, with the learning rate's warm-up."""
        loader = make_loader(self.text, self.size, whole_rows=whole_rows)
        ahead = self.stage.device.type == "cuda"
        self.steps = Steps(self.engine, loader, self.config, 0, ahead=ahead, pauses_after=lambda done: False)

    def compile(self) -> None:
        """Compile every block of the model by itself."""
        for part in self.engine.parts:
            part.run_block = CompiledBlocks(backend(self.stage.device))

    def step(self) -> StepResult:
        """Do one optimizer step. With a GPU, the next one is then queued."""
        return next(self.steps).result

    def measure(self, variant: str, *, whole_rows: bool = False, profiled: bool = True) -> None:
        """Add a row with the speed and the memory of steps, and rows with their time by groups."""
        with self.stage.timed(f"{self.name} {variant}: steps"):
            self._measure(variant, whole_rows=whole_rows)
        if profiled and self.stage.remaining_s > 6:
            with self.stage.timed(f"{self.name} {variant}: profile"):
                self.stage.attempt(f"profile of {self.name} {variant}", partial(self.profile, variant))

    def _measure(self, variant: str, *, whole_rows: bool) -> None:
        self.engine.trainable.clear_gradients()  # An earlier variant may have failed in the middle of a step.
        self.start(whole_rows=whole_rows)
        timed = 2 if self.stage.tiny else TIMED
        if self.stage.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            self.step()
        seconds, results = [], []
        for _ in range(2):
            synchronize(self.stage.device)
            start = time.perf_counter()
            results += [self.step() for _ in range(timed)]
            synchronize(self.stage.device)
            seconds.append(time.perf_counter() - start)
        total, tokens = sum(seconds), sum(result.tokens for result in results)
        result = results[-1]
        peak = peak_flops(self.stage.device, torch.bfloat16, None)
        flops = sum(step_flops(one, self.costs) for one in results) / total
        memory = torch.cuda.max_memory_allocated() / 1e9 if self.stage.device.type == "cuda" else math.nan
        assert result.counts_LE is not None
        self.stage.row(
            model=self.name,
            variant=variant,
            tokens_per_s=round(tokens / total),
            ms=total / len(results) * 1e3,
            spread=abs(seconds[0] - seconds[1]) / min(seconds),
            tflops=flops / 1e12,
            mfu=math.nan if peak is None else flops / peak,
            pairs_share=result.pairs / (self.whole_pairs() * self.config.model.num_layers),
            gb=memory,
            planned_gb=self.planned_bytes() / 1e9,
            max_vio=sum(max_vio(result.counts_LE)) / len(result.counts_LE),
            loss=result.loss,
            recompute=self.recompute,
        )

    def check_compiled(self) -> None:
        """Check that the blocks ran through torch.compile, which runs what it cannot trace eagerly."""
        clock = compile_clock()
        for part in self.engine.parts:
            refusal = part.run_block.refusal if isinstance(part.run_block, CompiledBlocks) else "eager"
            detail = f"{clock.graphs} graphs in {clock.seconds:.0f} s" if refusal is None else refusal[:200]
            self.stage.check(f"{self.name}: blocks are compiled", refusal is None, detail)

    def whole_pairs(self) -> int:
        """Return the query-key pairs of one layer if each row were one document."""
        return self.size.rows * attended_pairs(None, self.size.seq_len)

    def planned_bytes(self) -> int:
        """Return the memory that the plan of this run predicts."""
        workload = build_workload(self.config, self.config.model)
        return plan(Layout(), self.config.parallel, workload).fullest.device

    def profile(self, variant: str) -> None:
        """Trace some steps, and add a row for each group of operators."""
        results = []
        with mark_parts(self.engine.parts):
            trace = traced(self.stage, f"step-{self.name}-{variant}", lambda: results.append(self.step()))
        summary = summarize_trace(read_trace(trace), PROFILED)
        known = flops_by_group(results[-1], self.costs, self.config.model)
        add_groups(self.stage, self.name, variant, summary, known)


def traced(stage: Stage, name: str, step: Callable[[], Any]) -> Path:
    """Return the trace of some calls of `step`, after one that the profiler does not record."""
    folder = stage.out.parent / "traces"
    folder.mkdir(exist_ok=True)
    path = folder / f"{re.sub('[^-A-Za-z0-9]+', '-', name)}.json.gz"
    wait = torch.profiler.schedule(wait=0, warmup=1, active=PROFILED)
    with torch.profiler.profile(activities=activities(stage.device), schedule=wait, acc_events=True) as profiler:
        for number in range(1 + PROFILED):
            step()
            if number == 0 or number == PROFILED:
                synchronize(stage.device)
            if number < PROFILED:
                profiler.step()
    profiler.export_chrome_trace(str(path))
    if name == KEPT_TRACE:
        stage.keep(path)
    return path


def add_groups(stage: Stage, model: str, variant: str, summary: Any, flops: dict[str, float]) -> None:
    """Add a row for each group of operators, and one for each of the longest kernels."""
    peak = peak_flops(stage.device, torch.bfloat16, None)
    for group, ms in summary.group_ms.items():
        speed = flops[group] / ms / 1e9 if flops.get(group) else math.nan
        of_peak = math.nan if peak is None else speed * 1e12 / peak
        share = ms / summary.step_ms
        stage.row(model=model, of=variant, group=group, ms=ms, share=share, tflops=speed, of_peak=of_peak)
    for group, kernel, ms in summary.names[:12]:
        stage.row(model=model, of=variant, in_group=group, ms=ms, kernel=kernel[:100])


# ------------------------------------------------------------------------------------------------------------- peer

PROFILE_OF_PEER_S = 45.0
"""The peer is profiled if this many seconds remain, so that model B is not left out."""


def measure_peer(stage: Stage, size: Size, text: Text, *, compiled: bool) -> None:
    """Train transformers' Mixtral with the shape of model A, and add rows as `Run.measure` does."""
    model = tiny(MODELS["A"]) if stage.tiny else MODELS["A"]
    torch.manual_seed(0)
    with stage.timed("peer: build"), stage.device:
        peer = transformers_model(model, size.seq_len, torch.bfloat16, "grouped_mm")
    stage.check("the peer has bf16 weights", {weight.dtype for weight in peer.parameters()} == {torch.bfloat16})
    optimizer = torch.optim.AdamW(peer.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    loader = make_loader(text, size, whole_rows=True)
    costs = matmul_costs(meta_model(model, RouterConfig()))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, done / WARM_UP)
        (batch,) = loader.next_step()
        batch = Batch.to(batch, stage.device)
        # The labels are shifted by the model.
        loss = peer(input_ids=batch.tokens_BS, labels=batch.tokens_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def measure(variant: str) -> None:
        timed = 2 if stage.tiny else TIMED
        if stage.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with stage.timed(f"peer {variant}: first step"):
            step()
        for _ in range(1 if stage.tiny else 4):
            step()
        seconds = []
        for _ in range(2):
            synchronize(stage.device)
            start = time.perf_counter()
            for _ in range(timed):
                step()
            synchronize(stage.device)
            seconds.append(time.perf_counter() - start)
        total, tokens = sum(seconds), size.rows * size.seq_len
        pairs = size.rows * attended_pairs(None, size.seq_len) * model.num_layers
        flops = costs.training_flops(tokens, tokens * (model.top_k or 0) * model.num_layers, pairs) * 2 * timed / total
        peak = peak_flops(stage.device, torch.bfloat16, None)
        stage.row(
            model="A, transformers",
            variant=variant,
            tokens_per_s=round(tokens * 2 * timed / total),
            ms=total / (2 * timed) * 1e3,
            spread=abs(seconds[0] - seconds[1]) / min(seconds),
            tflops=flops / 1e12,
            mfu=math.nan if peak is None else flops / peak,
            gb=torch.cuda.max_memory_allocated() / 1e9 if stage.device.type == "cuda" else math.nan,
        )

    def profile(variant: str) -> None:
        summary = summarize_trace(read_trace(traced(stage, f"peer-{variant}", step)), PROFILED)
        add_groups(stage, "A, transformers", variant, summary, {})

    if not compiled:
        stage.attempt("peer eager", partial(measure, "eager, whole rows, bf16 weights"))
        return
    torch._dynamo.utils.counters.clear()
    for layer in peer.model.layers:
        layer.compile(backend=backend(stage.device))
    stage.attempt("peer compiled", partial(measure, "compiled layers, whole rows, bf16 weights"))
    if not any(row.get("model") == "A, transformers" for row in stage.rows):
        for layer in peer.model.layers:
            layer._compiled_call_impl = None  # It cannot be compiled.
        stage.attempt("peer eager", partial(measure, "eager, whole rows, bf16 weights"))
        return
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    stage.check("the peer's layers share compiled graphs", 0 < graphs < model.num_layers, f"{graphs} graphs")
    if stage.tiny or stage.remaining_s > PROFILE_OF_PEER_S:
        with stage.timed("peer compiled: profile"):
            stage.attempt("profile of the peer", partial(profile, "compiled layers, whole rows"))


# ------------------------------------------------------------------------------------------------------------- stage


def backend(device: torch.device) -> str:
    """Return torch.compile's backend. On CPUs, which check the stage only, no code is generated."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def build_run(name: str, stage: Stage, mesh: Mesh, size: Size, text: Text, *, compiled: bool) -> Run:
    """Return a model that has done its warm-up. What does not fit without recomputation gets it."""
    try:
        return Run(name, stage, mesh, size, text, "none", compiled=compiled)
    except torch.OutOfMemoryError as error:
        stage.row(model=name, compiled=compiled, recompute="none", message=str(error).splitlines()[0][:200])
    free_memory()
    return Run(name, stage, mesh, size, text, "selective", compiled=compiled)


def measure_compiled(name: str, stage: Stage, mesh: Mesh, size: Size, text: Text) -> None:
    """Add the rows of one compiled model."""
    run = build_run(name, stage, mesh, size, text, compiled=True)
    run.measure("compiled")
    run.check_compiled()


def measure_whole_rows(name: str, stage: Stage, mesh: Mesh, size: Size, text: Text) -> None:
    """Add the row of one compiled model with rows of one document, as the peer has them."""
    run = build_run(name, stage, mesh, size, text, compiled=True)
    run.measure("compiled, whole rows", whole_rows=True, profiled=False)


def measure_eager(name: str, stage: Stage, mesh: Mesh, size: Size, text: Text) -> None:
    """Add the rows of one model without torch.compile, with and without the Triton kernels."""
    run = build_run(name, stage, mesh, size, text, compiled=False)
    run.measure("eager")
    if stage.tiny or stage.remaining_s > 20:
        with eager_kernels():
            run.measure("eager, no Triton kernels")


def main(stage: Stage) -> None:
    """Measure model A, the peer, and model B, in the order of their importance."""
    size = TINY if stage.tiny else FULL
    if stage.device.type == "cuda":
        stage.device = torch.device("cuda", 0)
        torch.cuda.set_device(stage.device)
    vocabulary = 2048 if stage.tiny else 32_000
    with stage.timed("text"):
        text = Text(vocabulary, size.seq_len, tokens=(20 if stage.tiny else 60) * size.rows * size.seq_len)
    batches = make_loader(text, size, whole_rows=False).next_step()
    documents = sum(int((batch.positions_BS == 0).sum()) for batch in batches) / size.rows
    stage.about |= {"tokens a step": size.rows * size.seq_len, "documents a row": round(documents, 1), "lr": LR}
    with one_process(stage.device) as mesh:
        of_model = (stage, mesh, size, text)
        items: dict[str, tuple[float, Callable[[], None]]] = {
            "A compiled": (20, partial(measure_compiled, "A", *of_model)),
            "peer compiled": (20, partial(measure_peer, stage, size, text, compiled=True)),
            "B compiled": (20, partial(measure_compiled, "B", *of_model)),
            "A compiled, whole rows": (35, partial(measure_whole_rows, "A", *of_model)),
            "A eager": (20, partial(measure_eager, "A", *of_model)),
            "B eager": (20, partial(measure_eager, "B", *of_model)),
            "peer eager": (20, partial(measure_peer, stage, size, text, compiled=False)),
        }
        """Item -> the least seconds that it needs, and what measures it."""
        for name, (seconds, measure) in items.items():
            if stage.tiny or stage.fits(name, seconds):
                with stage.timed(f"{name}: all"):
                    stage.attempt(name, measure)
                    free_memory()
                    torch._dynamo.reset()


if __name__ == "__main__":
    raise SystemExit(run_stage(main))
