"""`engine=...`: which engine trains, what it cannot do, and what DeepSpeed is told. Torch-free to import.

DeepSpeed is told about communication and diagnostics by its user, about everything else by Mixwright: a key of a
`ds_config` is one that must agree with ours, one that is passed on, or one that is refused by name. None is ignored.
"""

import json
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.checks import expect
from common.errors import ConfigError
from common.text import nearest, one_line
from parallel.config import ParallelConfig
from training.config import EngineConfig, OptimConfig, TrainConfig
from training.deepspeed.keys import AGREED, DIAGNOSTICS, OFF, OTHERS, PASSED, SHOWN, ZERO, fits, is_off

VERSION = "0.19.8"
"""The one release whose insides training/deepspeed/engine.py relies on."""


NATIVE_AXES = ("tensor", "pipeline", "context", "shard", "expert_tensor")
"""Keys of `parallel` that only the native engine has."""


def check_engine(engine: EngineConfig, parallel: ParallelConfig, train: TrainConfig) -> None:
    """Raise ValueError, which names the whole key, where `engine` cannot do what the rest of a run asks for."""
    if engine.kind == "native":
        return
    for axis in NATIVE_AXES:
        size = getattr(parallel, axis, 1)
        expected = "1 with engine=deepspeed (data and expert parallelism only)"
        expect(size in (1, "auto"), f"parallel.{axis}", size, expected)
    expect(not parallel.offload, "parallel.offload", True, "false with engine=deepspeed")
    expect(
        train.precision != "fp64",
        "train.precision",
        train.precision,
        "auto, bf16 or fp32 with engine=deepspeed (its master weights and its reduction are fp32)",
    )


def check_choice(single_experts: Collection[str], train: str) -> None:
    """Refuse single experts, which are slices of one parameter: DeepSpeed updates parameters as a whole.

    (Masked gradients would not do: the weight decay of AdamW moves also what has no gradient.)

    Args:
        single_experts: names of stacked parameters that train in part (`training.trainable.Choice.experts`).
        train: `optim.train`, as one writes it.

    Raises:
        ConfigError: there are some.
    """
    if single_experts:
        raise ConfigError(
            f"optim.train={train}: expected whole parameters with engine=deepspeed, which updates no slice of one "
            f"(single experts are slices of {min(single_experts)}); engine=native trains single experts"
        )


def deepspeed_settings(engine: EngineConfig, train: TrainConfig, optim: OptimConfig, world_size: int) -> dict[str, Any]:
    """The configuration `deepspeed.initialize` gets: the user's file, checked, and ours over it.

    Call it before there is a process group: whatever is wrong is then one line of one process.

    Raises:
        ConfigError: deepspeed is not installed, or is of another release; `engine.ds_config` cannot be read, or has a
            key that is not the user's to set.
    """
    _check_installed()
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(1, train.global_batch // train.accumulation // world_size),
        "managed_gradient_accumulation": False,
        "gradient_clipping": optim.max_grad_norm or 0.0,  # left out, it means 1
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            # would replace torch.nn.functional.linear in the whole process
            "memory_efficient_linear": False,
        },
    }
    if engine.ds_config is None:
        return ours
    theirs = _read(engine.ds_config)
    agreed = {
        **AGREED,
        "train_batch_size": (train.global_batch, "train.global_batch"),
        "gradient_accumulation_steps": (train.accumulation, "train.accumulation"),
        "train_micro_batch_size_per_gpu": (
            ours["train_micro_batch_size_per_gpu"],
            f"train.global_batch / train.accumulation / {world_size} ranks",
        ),
        "gradient_clipping": (ours["gradient_clipping"], "optim.max_grad_norm"),
        "zero_optimization.stage": (engine.zero_stage, "engine.zero_stage"),
    }
    if engine.zero_stage == 1:
        agreed["zero_optimization.overlap_comm"] = (False, "gradients are reduced once, when all are there, at stage 1")
    passed: dict[str, Any] = {}
    for key, value in _flat(theirs):
        expected = _objection(key, value, agreed)
        if expected is not None:
            raise ConfigError(f"engine.ds_config={engine.ds_config}: {key}={_shown(value)}: expected {expected}")
        if key in PASSED:
            passed[key] = int(value) if isinstance(value, float) else value  # bucket sizes are often written 5e8
    zero = {key.removeprefix(ZERO): value for key, value in passed.items() if key.startswith(ZERO)}
    plain = {key: value for key, value in passed.items() if not key.startswith(ZERO)}
    return {**plain, **ours, "zero_optimization": {**zero, **ours["zero_optimization"]}}


def speaks(settings: dict[str, Any]) -> bool:
    """Whether the user asked for something that DeepSpeed prints as it runs."""
    return any(settings.get(key) for key in DIAGNOSTICS)


def _check_installed() -> None:
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise ConfigError(
            "engine.kind=deepspeed: expected deepspeed to be installed (pip install -e '.[deepspeed]')"
        ) from None
    if found != VERSION:
        raise ConfigError(
            f"engine.kind=deepspeed: expected deepspeed {VERSION}, on whose insides expert parallelism relies, found "
            f"{found} (pip install -e '.[deepspeed]')"
        )


def _read(path: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the key {twice} is there twice")
        return dict(pairs)

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once)
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.ds_config={path}: expected a JSON file, found: {one_line(str(error))}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"engine.ds_config={path}: expected a JSON object, found {_shown(found)}")
    return found


def _objection(key: str, value: Any, agreed: dict[str, tuple[Any, str]]) -> str | None:
    """What is expected in place of `value`, or None where it can stay."""
    if key in agreed:
        expected, why = agreed[key]
        # 1 is 1.0, and true is neither
        same = isinstance(value, bool) == isinstance(expected, bool) and value == expected
        return None if same or value == "auto" else f"{json.dumps(expected)} ({why})"
    if key in OFF:
        return None if is_off(key, value) else f"it to be off or left out ({OFF[key]})"
    if key in OTHERS:
        return f"it to be left out ({OTHERS[key]})"
    if key in PASSED:
        return None if fits(value, PASSED[key]) else SHOWN[PASSED[key]]
    return f"a key of docs/deepspeed.md; the nearest is {nearest(key, [*agreed, *OFF, *OTHERS, *PASSED])}"


def _flat(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Top-level keys, and those of `zero_optimization` one by one."""
    for key, value in config.items():
        if key == "zero_optimization" and isinstance(value, dict):
            yield from ((ZERO + name, inner) for name, inner in value.items())
        else:
            yield key, value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
