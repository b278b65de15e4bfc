"""Training adapters beside weights in 4 bits as a user does it: layouts, resuming, checkpoints, refusals."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from common.errors import ConfigError
from common.strict import from_dict
from moe.accounting.flops import meta_model
from parallel.startup.launch import World
from scripts.cli.command_line import compose_config
from scripts.cli.workers import check_before_start
from tests.commands import run_python
from training.agree import expect_full_precision
from training.config import Config
from training.layout import build_workload, resolve_layout
from training.report.metrics import read_metrics
from training.trainable import choose_trainable

pytest.importorskip("bitsandbytes", reason="needs the extra [quantize]")

SHAPE = (
    "train.seq_len=64", "train.log_every=1", "train.precision=fp64", "train.global_batch=4", "train.accumulation=2",
    "tracking=disabled", "launch.threads=1", "data.code_bytes=30000", "data.prose_bytes=20000",
    "data.arithmetic_bytes=30000", "data.vocab_size=400", "telemetry.forecast=false",
)  # fmt: skip


def train(root: Path, *overrides: str) -> str:
    done = run_python("train.py", *SHAPE, f"run.root={root}", f"data.cache={root}/cache", *overrides)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.slow
def test_adapters_of_a_base_in_4_bits(tmp_path):
    """One process, FSDP over two, and a run that continues on another layout give the same losses and the same text."""
    train(tmp_path, "model=mixtral_tiny", "train.steps=2", "run.name=base", "run.sample_tokens=0")
    base = (f"run.init_from={tmp_path}/base", "adapter=lora", "adapter.targets=[attention,experts]", "quantize=nf4")
    base = (*base, "run.sample_tokens=8")
    shown = train(tmp_path, *base, "train.steps=4", "run.name=one")
    assert "attention, dense, shared, experts stored in nf4," in shown
    train(tmp_path, *base, "train.steps=4", "run.name=two", "launch.nproc=2", "parallel.shard=2")
    continued = ("run.name=continued", "optim.schedule_steps=4")
    train(tmp_path, *base, "train.steps=2", "launch.nproc=2", *continued)
    train(tmp_path, *base, "train.steps=4", *continued)
    expected = losses(tmp_path / "one")
    assert len(expected) == 4
    for name in ("two", "continued"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-9)
        results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("one", name)]
        assert results[0]["sample"] == results[1]["sample"]
    # Without quantised weights, the losses are others.
    train(tmp_path, *base, "quantize=none", "train.steps=1", "run.name=full")
    assert abs(losses(tmp_path / "full")[0] - expected[0]) > 1e-6

    (file,) = (tmp_path / "one" / "checkpoints" / "step-4").glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        assert all(".adapter" in name for name in stored.keys())  # noqa: SIM118
    done = run_python(
        "train.py", *SHAPE, f"run.root={tmp_path}", f"data.cache={tmp_path}/cache", *base, "run.name=one",
        "quantize=int8", "train.steps=5",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: quantize.kind=int8: expected nf4 as in the checkpoint ")


def test_quantised_weights_without_adapters_are_one_line(tmp_path):
    done = run_python("train.py", "model=mixtral_tiny", "quantize=nf4", f"run.root={tmp_path}")
    expected = "quantize.kind=nf4: expected null, or adapters, which train beside quantised weights (adapter=lora)"
    assert (done.returncode, done.stderr) == (2, f"error: {expected}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("engine=deepspeed",), "engine.kind=deepspeed: expected native with quantize.kind=nf4"),
        (("adapter.dora=true",), "adapter.dora=true: expected false with quantize.kind=nf4"),
        (("parallel.tensor=2",), "parallel.tensor=2: expected 1 with quantize=nf4 (a matrix is quantised as a whole)"),
        (("parallel.expert_tensor=2",), "parallel.expert_tensor=2: expected 1 with "),
        (("quantize.targets=[experts,head]",), "quantize.targets="),
        (("quantize=none", "quantize.block_size=32"), "quantize.block_size=32: expected 64 with quantize.kind=null"),
        (
            ("quantize=none", "adapter=none", "adapter.targets=[experts]"),
            "adapter.targets=[experts]: expected [attention] with adapter.kind=null",
        ),
        (("quantize.block_size=48",), "quantize.block_size=48: expected one of 32, 64, 128, "),
    ],
)
def test_what_does_not_go_together_is_one_line(overrides, line):
    with pytest.raises(ConfigError) as raised:
        raw = compose_config(
            "config", ["model=mixtral_tiny", "run.init_from=x", "adapter=lora", "quantize=nf4", *overrides]
        )
        check_before_start(from_dict(Config, raw), World(world_size=2, local_world_size=2))
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


def test_targets_that_the_model_lacks_are_refused():
    overrides = ["model=mixtral_tiny", "model.vocab_size=99", "adapter=lora", "run.init_from=x"]
    config = from_dict(Config, compose_config("config", [*overrides, "quantize=nf4", "quantize.targets=[shared]"]))
    whole = meta_model(config.model, config.router)
    with pytest.raises(ConfigError, match=r"^quantize.targets=\[shared\]: expected weights that this model has$"):
        expect_full_precision(whole, choose_trainable(whole, "all"), config)


def test_the_choice_of_axes_divides_no_quantised_matrix():
    fixed = ["parallel.shard=1", "parallel.context=1", "train.accumulation=1", "train.global_batch=1"]
    given = ["model=mixtral_tiny", "model.vocab_size=400", "run.init_from=x", "adapter=lora", *fixed]

    def choose(quantize: str) -> int:
        config = from_dict(Config, compose_config("config", [*given, f"quantize={quantize}"]))
        workload = build_workload(config, config.model, trained=0.1)
        return resolve_layout(config, workload, World(world_size=2, local_world_size=2)).plan.layout.tensor

    assert choose("none") == 2
    with pytest.raises(ConfigError, match="global_batch=1: expected a multiple of"):
        choose("nf4")
