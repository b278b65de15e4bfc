import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import training.deepspeed.settings as module
from common.errors import ConfigError
from moe.model import Transformer
from parallel.config import ParallelConfig
from training.config import EngineConfig, OptimConfig, TrainConfig
from training.deepspeed.settings import check_engine, deepspeed_settings, prints_diagnostics
from training.parity.config import CASES

TRAIN = TrainConfig(steps=3, seq_len=8, global_batch=16, accumulation=2)
OPTIM = OptimConfig(lr=1e-3, max_grad_norm=0.5)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Returns `deepspeed_settings` for a file with given content, on 4 ranks. Works without deepspeed, too."""
    monkeypatch.setattr(module, "version", lambda name: module.VERSION)

    def build(content: Any, stage: Any = 2, optim: OptimConfig = OPTIM) -> dict[str, Any]:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return deepspeed_settings(EngineConfig("deepspeed", stage, str(file)), TRAIN, optim, 4)

    return build


def test_settings_without_a_file(monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: module.VERSION)
    result = deepspeed_settings(EngineConfig("deepspeed", 3), TRAIN, OptimConfig(lr=1e-3, max_grad_norm=None), 4)
    assert result["gradient_clipping"] == 0.0
    assert result["train_micro_batch_size_per_gpu"] == 2
    assert result["zero_optimization"]["stage"] == 3
    assert not prints_diagnostics(result)


def test_user_keys_are_passed_on_and_agreeing_keys_are_accepted(settings):
    result = settings(
        {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": False},
            "fp16": {"enabled": False, "loss_scale": 0},
            "wall_clock_breakdown": True,
            "zero_optimization": {
                "stage": 2,
                "reduce_scatter": True,
                "overlap_comm": True,
                "reduce_bucket_size": 5e8,
                "offload_optimizer": {"device": "none"},
            },
        }
    )
    assert result["zero_optimization"] == {
        "overlap_comm": True,
        "reduce_bucket_size": 500_000_000,
        "stage": 2,
        "reduce_scatter": True,
        "contiguous_gradients": True,
        "memory_efficient_linear": False,
    }
    # These are not passed on: if DeepSpeed counted micro-batches itself, it would divide the loss again.
    assert "gradient_accumulation_steps" not in result and "train_batch_size" not in result
    assert prints_diagnostics(result)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 8}, "train_batch_size=8: expected 16 (train.global_batch)"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1: expected 2 (train.accumulation)"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4: expected 2 ("),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0: expected 0.5 (optim.max_grad_norm)"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage=3: expected 2 (engine.zero_stage)"),
        ({"zero_optimization": {"reduce_scatter": False}}, "zero_optimization.reduce_scatter=false: expected true ("),
        ({"zero_optimization": {"contiguous_gradients": 1}}, "zero_optimization.contiguous_gradients=1: expected true"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer="),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights=true: "),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, 'zero_optimization.reduce_bucket_size="auto": '),
        ({"zero_optimization": {"allgather_bucket_size": 3}}, "allgather_bucket_size=3: expected an even integer >= 2"),
        ({"zero_optimization": {"overlap_com": True}}, "the nearest is zero_optimization.overlap_comm"),
        ({"zero_optimization": True}, "zero_optimization=true: expected a section of keys"),
        ({"bf16": {"enabled": True}}, 'bf16={"enabled": true}: expected it to be off or left out (train.precision'),
        ({"optimizer": {"type": "AdamW"}}, 'optimizer={"type": "AdamW"}: expected it to be left out (section optim'),
        ({"scheduler": {}}, "scheduler={}: expected it to be left out (section optim"),
        ({"checkpoint": {}}, "checkpoint={}: expected it to be left out (checkpoints are Mixwright's"),
        ({"pipeline": {}}, "pipeline={}: expected it to be left out (data and expert parallelism only)"),
        ({"wall_clock_breakdown": "yes"}, 'wall_clock_breakdown="yes": expected true or false'),
        (
            {"wall_clock_breakdwn": True},
            "wall_clock_breakdwn=true: expected a key of docs/deepspeed.md; the nearest is wall",
        ),
        ('{"steps_per_print": 1e999}', "steps_per_print=null: expected an integer >= 1"),
        ('{"steps_per_print": NaN}', "steps_per_print=null: expected an integer >= 1"),
        ("[1]", "expected a JSON object, found [1]"),
        ("{", "not JSON: Expecting property name"),
        ('{"aio": {}, "aio": {}}', "aio: expected once, found several times"),
    ],
)
def test_other_keys_and_values_are_errors_that_name_them(settings, content, message):
    with pytest.raises(ConfigError) as error:
        settings(content)
    text = str(error.value)
    assert text.startswith("engine.ds_config=") and "ds.json: " in text
    assert message in text and "\n" not in text


def test_stage_1_does_not_support_overlap(settings):
    with pytest.raises(ConfigError, match="overlap_comm=true: expected false"):
        settings({"zero_optimization": {"overlap_comm": True}}, stage=1)


def test_a_missing_file(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "version", lambda name: module.VERSION)
    with pytest.raises(ConfigError, match=r"^engine\.ds_config=.*none\.json: expected a JSON file"):
        deepspeed_settings(EngineConfig("deepspeed", 2, str(tmp_path / "none.json")), TRAIN, OPTIM, 4)


def test_deepspeed_is_missing_or_has_another_version(monkeypatch):
    def missing(name: str) -> str:
        raise module.PackageNotFoundError(name)

    for version, expected in ((missing, "to be installed"), (lambda name: "0.19.7", "0.19.8, on whose internals")):
        monkeypatch.setattr(module, "version", version)
        with pytest.raises(ConfigError, match=rf"^engine.kind=deepspeed: expected deepspeed {expected}.*pip install"):
            deepspeed_settings(EngineConfig("deepspeed"), TRAIN, OPTIM, 4)


@dataclass(frozen=True)
class Wide(ParallelConfig):
    """A layout with a parallel axis that only the native engine supports."""

    tensor: int = 2


def test_layouts_and_precisions_that_only_the_native_engine_supports():
    deepspeed, fp64 = EngineConfig("deepspeed"), TrainConfig(steps=3, seq_len=8, global_batch=16, precision="fp64")
    check_engine(deepspeed, ParallelConfig(), TRAIN)
    check_engine(EngineConfig(), Wide(), fp64)
    with pytest.raises(ValueError, match=r"^parallel\.tensor=2: expected 1 with engine=deepspeed"):
        check_engine(deepspeed, Wide(), TRAIN)
    with pytest.raises(ValueError, match=r"^parallel\.offload=true: expected false with engine=deepspeed"):
        check_engine(deepspeed, ParallelConfig(shard="auto", offload=True), TRAIN)
    with pytest.raises(ValueError, match=r"^train\.precision=fp64: expected auto, bf16 or fp32 with engine=deepspeed"):
        check_engine(deepspeed, ParallelConfig(), fp64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "other"}, "kind=other: expected native or deepspeed"),
        ({"kind": "deepspeed", "zero_stage": 0}, "zero_stage=0: expected one of 1, 2, 3"),
        ({"ds_config": "x.json"}, "ds_config=x.json: expected null with engine=native"),
        ({"kind": "deepspeed", "ds_config": ""}, "ds_config='': expected a JSON file"),
    ],
)
def test_the_engine_section_checks_its_values(arguments, message):
    with pytest.raises(ValueError) as error:
        EngineConfig(**arguments)
    assert str(error.value).startswith(message)


def test_training_single_experts_is_an_error():
    from training.deepspeed.engine import DeepSpeedEngine

    with torch.device("meta"):
        model = Transformer(CASES["mixtral"].model, CASES["mixtral"].router, torch.float32)
    optim = OptimConfig(lr=1e-3, train=("router", "expert:3"))
    with pytest.raises(ConfigError, match=r"^optim\.train=\[router,expert:3\]: expected whole parameters"):
        DeepSpeedEngine([model], optim, None, {})  # type: ignore[arg-type]


def test_the_settings_import_neither_torch_nor_deepspeed():
    code = "import sys, training.deepspeed.settings; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
