"""Turn a dense model into a Mixture of Experts that computes the same: every expert is a copy of the dense network.

    python scripts/upcycle.py source=runs/dense-1 num_experts=8 top_k=2 out=runs/upcycled
    python scripts/upcycle.py source=models/Mistral-7B-v0.1 num_experts=64 top_k=8 granularity=8 out=runs/fine
    python scripts/upcycle.py source=models/Qwen2-0.5B family=qwen2_moe num_shared_experts=1 shared_hidden_dim=4864 \\
        shared_gate=true out=runs/qwen2-moe
    python train.py run.init_from=runs/upcycled ...

docs/finetuning.md explains which numbers stay equal, and why.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # This checkout's modules come first, whatever copy is installed and whatever the current directory is.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.cli.command_line import run_tool


@dataclass(frozen=True)
class UpcycleConfig:
    """The keys of this tool. conf/upcycle.yaml has the same keys and explains each."""

    source: str
    out: str
    num_experts: int = 8
    top_k: int = 2
    granularity: int = 1
    noise: float = 0.0
    first_k_dense: int = 0
    moe_every: int = 1
    num_shared_experts: int = 0
    shared_hidden_dim: int | None = None
    shared_gate: bool = False
    router: Literal["softmax_topk", "sigmoid_topk"] = "softmax_topk"
    family: str | None = None
    seed: int = 0
    dtype: Literal["fp32", "keep"] = "fp32"
    shard_size: str = "5GB"


def upcycle(config: UpcycleConfig) -> None:
    """Write the model directory `config.out`, and print its size."""
    from common.errors import ModelError, require
    from moe.accounting.flops import count_parameters, meta_model
    from moe.upcycle import Upcycling, router_config
    from training.formats.export import parse_size, upcycle_model
    from training.formats.merge import without_adapters
    from training.formats.reader import open_model_for_key

    shard_bytes = parse_size(config.shard_size)
    plan = Upcycling(**{field.name: getattr(config, field.name) for field in fields(Upcycling)})
    source = without_adapters(open_model_for_key("source", config.source))
    require(
        not source.model.is_moe,
        ModelError,
        f"source={config.source}: expected a dense model; found {source.model.num_experts} experts",
    )
    model, size = upcycle_model(
        source, Path(config.out), plan, dtype=config.dtype, shard_bytes=shard_bytes, family=config.family
    )
    dense = count_parameters(meta_model(source.model, source.router)).total
    counts = count_parameters(meta_model(model, router_config(plan)))
    print(
        f"{config.out}: {model.num_experts} experts of width {model.expert_width} in {model.num_moe_layers} of "
        f"{model.num_layers} layers, top-{model.top_k}\n"
        f"parameters: {counts.total:,}, {counts.active:,} active per token (dense: {dense:,}); {size / 1e9:.2f} GB"
    )


def main() -> None:
    """Run this tool with the command line's arguments. `conf/upcycle.yaml` has its keys."""
    run_tool("upcycle", UpcycleConfig, upcycle)


if __name__ == "__main__":
    main()
