"""Time of one MoE layer, forward and backward, of Mixwright and of transformers, compared with a dense SwiGLU.

The dense SwiGLU has the same active FLOPs.

    python benchmarks/moe_layer.py                 # the device and dtype that train.py would choose
    OMP_NUM_THREADS=1 python benchmarks/moe_layer.py --dtype fp32 --only auto

In each round, every implementation runs once, in one process. The figures are the median of the times, and the median
and the range of the ratio to the dense layer in the same round. With one CPU thread, the CPU time of the process is
measured, which other work disturbs least.

The router's logits are random, and nearly balanced. In the rows `Zipf` they also have the logarithms of 1 / rank: the
experts get shares as in a Zipf distribution. `fullest` is the load of the fullest expert, as a multiple of the mean.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe.config import ModelConfig, RouterConfig
from moe.feedforward import FeedForward
from moe.layer import MoELayer
from moe.router import Router
from moe.token_context import TokenContext
from training.device import compute_dtype, pick_device

SHAPES = {
    "8 experts x 1024, top-2": (8, 1024, 2),
    "64 experts x 256, top-6": (64, 256, 6),
    "256 experts x 128, top-8": (256, 128, 8),
}


def mixwright_layer(
    dim: int, experts: int, hidden: int, top_k: int, kernel: str = "auto", *, shared: int = 0
) -> MoELayer:
    config = ModelConfig(
        dim=dim, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, hidden_dim=hidden, num_experts=experts,
        top_k=top_k, num_shared_experts=shared, expert_kernel=kernel,  # type: ignore[arg-type]
    )  # fmt: skip
    return MoELayer(config, RouterConfig(), 0)


def transformers_layer(dim: int, experts: int, hidden: int, top_k: int, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=dim, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=top_k,
        experts_implementation=implementation,
    )  # fmt: skip
    return MixtralSparseMoeBlock(config)


def implementations(
    dim: int, experts: int, hidden: int, top_k: int, device: torch.device, dtype: torch.dtype
) -> "dict[str, partial[Tensor]]":
    """Name -> function of [1, T, D] that returns [1, T, D]."""
    modules: dict[str, nn.Module] = {"dense": FeedForward(dim, hidden * top_k, "swiglu")}
    for kernel in ("auto", "loop", "grouped"):
        modules[f"Mixwright, {kernel}"] = mixwright_layer(dim, experts, hidden, top_k, kernel)
    modules["Mixwright, auto, Zipf"] = mixwright_layer(dim, experts, hidden, top_k, "auto")
    for implementation in ("eager", "grouped_mm"):
        modules[f"transformers, {implementation}"] = transformers_layer(dim, experts, hidden, top_k, implementation)
    calls: dict[str, partial[Tensor]] = {}
    for name, module in modules.items():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        if isinstance(module, MoELayer):
            set_router(module.router, zipf="Zipf" in name)
        module.to(device=device, dtype=dtype)
        calls[name] = _call(module)
    return calls


@torch.no_grad()
def set_router(router: nn.Module, zipf: bool) -> None:
    """Fill the router's weight for inputs with 1 in the first column, which `zipf` multiplies by -log(rank)."""
    assert isinstance(router, Router)
    experts, dim = router.weight.shape
    # The standard deviation of the logits is that of a Gumbel variable: the largest of log p_e plus such variables is
    # the one of expert e with probability p_e.
    nn.init.normal_(router.weight, std=math.pi / math.sqrt(6 * dim))
    router.weight[:, 0] = -torch.arange(1, experts + 1).log() if zipf else 0


def _call(module: nn.Module) -> "partial[Tensor]":
    def call(x: Tensor, module: nn.Module) -> Tensor:
        module.zero_grad(set_to_none=True)  # as after an optimizer step
        out = module(x, TokenContext()) if isinstance(module, MoELayer) else module(x)
        return out[0] if isinstance(out, tuple) else out

    return partial(call, module=module)


def seconds(call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    clock = time.process_time if not x.is_cuda and torch.get_num_threads() == 1 else time.perf_counter
    if x.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    call(x).backward(grad)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def fullest(call: "partial[Tensor]", x: Tensor) -> str:
    """Return the load of the fullest expert as a multiple of the mean, or nothing for other implementations."""
    module = call.keywords["module"]
    if not isinstance(module, MoELayer):
        return ""
    load = module.router(x, None)[1].counts_BE.sum(dim=0)
    return f"  fullest {load.max() / load.double().mean():.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--only", nargs="*", default=[""], help="implementations whose name has one of these words")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = pick_device("auto", 0, 1)
    dtype = compute_dtype(options.dtype, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {dtype}, T={options.tokens}, D={options.dim}")
    for shape, (experts, hidden, top_k) in SHAPES.items():
        calls = implementations(options.dim, experts, hidden, top_k, device, dtype)
        calls = {k: call for k, call in calls.items() if any(word in k for word in ["dense", *options.only])}
        x = torch.randn(1, options.tokens, options.dim, device=device, dtype=dtype)
        x[..., 0] = 1
        x.requires_grad_()
        grad = torch.randn_like(x)
        times: dict[str, list[float]] = {implementation: [] for implementation in calls}
        for round_number in range(options.rounds + 1):
            for implementation, call in calls.items():
                elapsed = seconds(call, x, grad)
                x.grad = None
                if round_number:  # round 0 warms up
                    times[implementation].append(elapsed)
        print(shape)
        for implementation, measured in times.items():
            ratios = sorted(mine / dense for mine, dense in zip(measured, times["dense"], strict=True))
            print(
                f"  {implementation:<26}{statistics.median(measured) * 1e3:9.1f} ms"
                f"{statistics.median(ratios):6.2f} x dense ({ratios[0]:.2f} - {ratios[-1]:.2f})"
                f"{fullest(calls[implementation], x)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
