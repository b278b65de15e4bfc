"""Stage `memory`: the memory of an optimizer step by category, beside what the plan of the layout predicts.

Measured with the allocator at the boundaries of the phases of a real step (`training.step.train_step`), in GB of 1e9
bytes (MB with size=tiny), `measured/predicted`. Weights are drawn on the device, because the time on the host is not
what is measured.

- saved: what the forward pass keeps for the backward pass (the plan's activations and casts)
- forward, backward, update: the largest amount in each phase; the largest of the three is the peak
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_stages.models import LENGTH, MODELS, ROWS, draw_weights, example_batch
from benchmarks.gpu_stages.stage import Stage, first_line, free_memory, one_process, run_stage
from data.batch import Batch
from moe.config import ModelConfig, RouterConfig
from moe.recompute import Recompute
from parallel.apply import build_model
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.planning.plan import MemoryEstimate, plan
from parallel.planning.workload import Workload
from training.config import OptimConfig
from training.engine import NativeEngine
from training.step import train_step

TINY = ModelConfig(
    dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=96, num_experts=4, top_k=2,
    vocab_size=160,
)  # fmt: skip
ROUTER = RouterConfig()
MODES: tuple[Recompute, ...] = ("none", "selective", "full")


def main(stage: Stage) -> None:
    models = {"tiny": TINY} if stage.tiny else MODELS
    rows, length = (2, 64) if stage.tiny else (ROWS, LENGTH)
    with one_process(stage.device) as mesh:
        for recompute in MODES:
            for name, model in models.items():
                if stage.remaining_s < 6:
                    stage.row(check="left out", result="no time", detail=f"from {name} recompute={recompute} on")
                    return
                for layers in (model.num_layers, model.num_layers - max(1, model.num_layers // 8)):
                    if measure(stage, mesh, name, replace(model, num_layers=layers), recompute, rows, length):
                        break


def measure(
    stage: Stage, mesh: Mesh, name: str, model: ModelConfig, recompute: Recompute, rows: int, length: int
) -> bool:
    """Add the rows of one model. Return whether it fits into the memory."""
    predicted = predict(model, recompute, rows, length)
    step = Step(stage, mesh)
    try:
        step.run(model, recompute, rows, length)
    except torch.OutOfMemoryError:
        result = f"out of memory in {step.phase}"
    except Exception as error:
        stage.failures += 1
        result = first_line(error)
    else:
        result = "fits"
    found = step.found
    saved_shapes, step = step.shapes, None  # type: ignore[assignment]
    free_memory()
    unit = 1e6 if stage.tiny else 1e9

    def both(measured: str, prediction: int) -> str:
        return f"{found.get(measured, 0) / unit:.2f}/{prediction / unit:.2f}"

    peak = max(found.get(phase, 0) for phase in ("forward", "backward", "update"))
    stage.row(
        model=name,
        layers=model.num_layers,
        recompute=recompute,
        weights=both("weights", predicted.weights),
        moments=both("moments", predicted.moments),
        gradients=both("gradients", predicted.gradients),
        saved=both("saved", predicted.activations + predicted.casts),
        forward=f"{found.get('forward', 0) / unit:.1f}",
        backward=f"{found.get('backward', 0) / unit:.1f}",
        update=f"{found.get('update', 0) / unit:.1f}",
        peak=f"{peak / unit:.1f}/{predicted.device / unit:.1f}",
        reserved=f"{found.get('reserved', 0) / unit:.1f}",
        result=result,
    )
    if saved_shapes:
        largest = [f"{key} {size / unit:.2f}" for key, size in saved_shapes.most_common(16)]
        for first in range(0, len(largest), 4):
            stage.row(model=name, recompute=recompute, saved_by_shape=", ".join(largest[first : first + 4]))
    return not result.startswith("out of memory")


def predict(model: ModelConfig, recompute: Recompute, rows: int, length: int) -> MemoryEstimate:
    """Return what the plan says of one process in bf16."""
    workload = Workload(model, ROUTER, global_batch=rows, accumulation=1, seq_len=length)
    return plan(Layout(), ParallelConfig(expert=1, recompute=recompute), workload).fullest


class Step:
    """A model that trains for two steps, the second of which is measured."""

    def __init__(self, stage: Stage, mesh: Mesh) -> None:
        self.device, self.mesh = stage.device, mesh
        self.found: dict[str, int] = {}
        self.shapes: Counter[str] = Counter()
        self.phase = "build"

    def run(self, model: ModelConfig, recompute: Recompute, rows: int, length: int) -> None:
        empty = self.allocated()
        built = build_model(model, ROUTER, self.mesh, compute_dtype=torch.bfloat16, seed=None, recompute=recompute)
        draw_weights(built)
        self.found["weights"] = self.allocated() - empty
        engine = NativeEngine([built], OptimConfig(lr=1e-4), self.mesh)
        self.found["moments"] = self.allocated() - empty - self.found["weights"]
        batch = example_batch(rows, length, model.vocab_size or 0)
        before = 0

        def backward(loss: Tensor) -> None:
            self.found["forward"] = self.end_of("forward", "backward")
            self.found["saved"] = self.allocated() - before
            loss.backward()
            self.found["backward"] = self.end_of("backward", "update")

        def step(lr: float) -> Any:
            self.found["gradients"] = self.allocated() - before
            return update(lr)

        update: Callable[[float], Any] = engine.step
        engine.backward, engine.step = backward, step  # type: ignore[method-assign]
        for _ in range(2):
            before = self.allocated()
            self.end_of(self.phase, "forward")
            train_step(engine, [batch], ROUTER, 1e-4)
            self.found["update"] = self.end_of("update", "end")
        if self.device.type == "cuda":
            self.found["reserved"] = torch.cuda.max_memory_reserved(self.device)
        if recompute == "none":
            self.count_saved(built, batch)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def end_of(self, phase: str, following: str) -> int:
        """Return the largest amount of memory of the phase that ends, and start to measure the next one."""
        self.phase = following
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        largest = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return largest

    def count_saved(self, model: torch.nn.Module, batch: Batch) -> None:
        """Count the bytes that autograd saves in a forward pass, by dtype and shape. Weights do not count."""
        from moe.losses import linear_cross_entropy
        from moe.model import ModelInputs

        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        seen: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and storage.data_ptr() not in seen:
                seen[storage.data_ptr()] = tensor  # alive, so that no other tensor gets its address
                shape = "x".join(map(str, tensor.shape))
                self.shapes[f"{str(tensor.dtype).removeprefix('torch.')} {shape}"] += storage.nbytes()
            return tensor

        def predict(x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
            pack(x_BSD.detach().clone())  # the gradient of x, which the loss keeps beside autograd
            return linear_cross_entropy(x_BSD, weight_VD, on_device.labels_BS).total

        self.phase = "counting"
        on_device = batch.to(self.device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ModelInputs(on_device.tokens_BS, on_device.positions_BS), predict=predict)
        if self.device.type != "cuda":
            self.found["saved"] = sum(self.shapes.values())


if __name__ == "__main__":
    raise SystemExit(run_stage(main))
