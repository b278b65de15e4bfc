"""Time of one MoE layer, forward and backward, of Mixwright and of transformers, compared with a dense SwiGLU.

The dense SwiGLU has the same active FLOPs.

    python benchmarks/moe_layer.py                 # the device and dtype that train.py would choose
    python benchmarks/moe_layer.py --dtype fp32 --tokens 2048

In each round, every implementation runs once, in one process. The figures are medians, and relative to the dense layer.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe.config import ModelConfig, RouterConfig
from moe.feedforward import FeedForward
from moe.layer import MoELayer
from moe.token_context import TokenContext
from training.device import compute_dtype, pick_device

SHAPES = {"8 experts x 1024, top-2": (8, 1024, 2), "64 experts x 256, top-6": (64, 256, 6)}


def mixwright_layer(dim: int, experts: int, hidden: int, top_k: int, kernel: str) -> nn.Module:
    config = ModelConfig(
        dim=dim, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, hidden_dim=hidden, num_experts=experts,
        top_k=top_k, expert_kernel=kernel,  # type: ignore[arg-type]
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
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> function of [1, T, D] that returns [1, T, D]."""
    modules: dict[str, nn.Module] = {"dense": FeedForward(dim, hidden * top_k, "swiglu")}
    for kernel in ("loop", "grouped"):
        modules[f"Mixwright, {kernel}"] = mixwright_layer(dim, experts, hidden, top_k, kernel)
    for implementation in ("eager", "grouped_mm"):
        modules[f"transformers, {implementation}"] = transformers_layer(dim, experts, hidden, top_k, implementation)
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, module in modules.items():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        module.to(device=device, dtype=dtype)
        calls[name] = _call(module)
    return calls


def _call(module: nn.Module) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        out = module(x, TokenContext()) if isinstance(module, MoELayer) else module(x)
        return out[0] if isinstance(out, tuple) else out

    return call


def seconds(call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> float:
    """Return the seconds of one forward and backward pass."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(x).backward(grad)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = pick_device("auto", 0, 1)
    dtype = compute_dtype(options.dtype, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}, {dtype}, T={options.tokens}, D={options.dim}")
    for shape, (experts, hidden, top_k) in SHAPES.items():
        calls = implementations(options.dim, experts, hidden, top_k, device, dtype)
        x = torch.randn(1, options.tokens, options.dim, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(x)
        times: dict[str, list[float]] = {implementation: [] for implementation in calls}
        for round_number in range(options.rounds + 1):
            for implementation, call in calls.items():
                elapsed = seconds(call, x, grad)
                if round_number:  # round 0 warms up
                    times[implementation].append(elapsed)
        dense = statistics.median(times["dense"])
        print(shape)
        for implementation, measured in times.items():
            median = statistics.median(measured)
            print(f"  {implementation:<26}{median * 1e3:9.1f} ms  {median / dense:6.2f} x dense")


if __name__ == "__main__":
    main()
