import dataclasses
import functools
import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.strict import from_dict, key_fields, to_dict
from moe.accounting.flops import count_parameters, meta_model
from scripts.cli.command_line import CONF, compose_config
from scripts.cli.help import OF_TOOLS
from training.config import Config, with_vocabulary

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in OF_TOOLS)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
PRESETS = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name in GROUPS]
NEEDED = {
    ("data", "files"): ["data.paths=[x.txt]"],
    ("data", "sft"): ["data.paths=[x.jsonl]"],
    ("data", "hub"): ["data.hub_path=x"],
    ("router", "expert_choice"): ["router.allow_noncausal=true"],
    ("router", "deepseek_v3"): ["model=deepseek_v3_tiny"],
    ("router", "deepseek_v3_short"): ["model=deepseek_v3_tiny"],
}
"""The overrides that a preset needs: values that only the user knows, or another preset."""
OTHERS = ("data", "experiment", "hparams_search")
"""The groups whose presets do not have the keys of one dataclass."""
TOOLS = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "config")


PLUGINS = {"optuna": "hydra_optuna_sweeper", "slurm": "hydra_submitit_launcher", "local": "hydra_submitit_launcher"}
"""The plugin of Hydra that each preset of `hparams_search` needs."""


@functools.cache
def values_of(*overrides: str) -> dict[str, Any]:
    """Compose a configuration, once for all tests. Do not change it."""
    return compose_config("config", overrides)


def composed(overrides: list[str]) -> Config:
    return from_dict(Config, values_of(*overrides))


def test_groups_mirror_the_sections() -> None:
    sections = {field.name for field in dataclasses.fields(Config)} - {"plugins"}
    assert set(GROUPS) == sections | {"experiment", "hparams_search"}


@pytest.mark.parametrize(("group", "preset"), PRESETS, ids=lambda value: str(value))
def test_every_preset_composes_to_a_config(group: str, preset: str) -> None:
    if group == "hparams_search":
        pytest.importorskip(f"hydra_plugins.{PLUGINS[preset]}", reason="needs the extra [sweep]")
    config = composed([f"{group}={preset}", *NEEDED.get((group, preset), [])])
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize(
    ("group", "preset"), [pair for pair in PRESETS if pair[0] not in ("data", "experiment", "hparams_search")]
)
def test_every_key_of_the_dataclass_is_in_its_yaml(group: str, preset: str) -> None:
    written = values_of(f"{group}={preset}", *NEEDED.get((group, preset), []))[group]
    section = next(field.type for field in dataclasses.fields(Config) if field.name == group)
    assert isinstance(section, type)
    assert set(written) == {field.name for field in key_fields(section)}


@pytest.mark.parametrize("tool", TOOLS)
def test_every_key_of_a_tool_is_in_its_yaml(tool: str) -> None:
    written = yaml.safe_load((CONF / f"{tool}.yaml").read_text(encoding="utf-8"))
    presets = {key for entry in written.pop("defaults", []) if isinstance(entry, dict) for key in entry}
    module = importlib.import_module(f"scripts.{tool}")
    called = re.search(rf'run_tool\("{tool}", (\w+)', Path(module.__file__ or "").read_text(encoding="utf-8"))
    assert called is not None
    assert {*written, *presets} == {field.name for field in dataclasses.fields(getattr(module, called[1]))}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_every_model(experiment: str, model: str) -> None:
    config = composed([f"experiment={experiment}", f"model={model}"])
    assert config.run.experiment == experiment
    alone = composed([f"model={model}"])
    assert (config.model, config.router) == (alone.model, alone.router)


def test_a_model_brings_its_router_and_the_command_line_another() -> None:
    assert composed(["model=switch_tiny"]).router.jitter == 0.01
    assert (
        composed(["model=switch_tiny", "experiment=quickstart", "router=glam"]).router
        == composed(["router=glam"]).router
    )


def test_without_an_experiment_the_run_is_called_after_its_model() -> None:
    assert composed([]).run.experiment == "small"
    assert composed(["model=switch_tiny"]).run.experiment == "switch_tiny"
    assert composed(["run.init_from=models/Mixtral"]).run.experiment == "Mixtral"
    assert composed(["run.init_from=runs/dense-1/checkpoints/step-20"]).run.experiment == "dense-1"


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose_config("config", [])
    assert os.listdir(tmp_path) == []


PUBLISHED = {
    "llama2_7b": (6.738e9, 6.738e9),  # arXiv 2307.09288: "7B"; the released checkpoint
    "llama3_405b": (405.9e9, 405.9e9),  # arXiv 2407.21783: "405B"; the released checkpoint
    "olmoe_1b_7b": (6.919e9, 1.282e9),  # arXiv 2409.02060: 6.9 B, 1.3 B; the released checkpoint
    "qwen2_moe_a2_7b": (14.316e9, 2.689e9),  # its announcement: 14.3 B, 2.7 B; the released checkpoint
    "qwen3_moe_30b": (30.53e9, 3.353e9),  # arXiv 2505.09388: 30.5 B, 3.3 B; the released checkpoint
    "qwen2_57b_a14b": (57.41e9, 14.25e9),  # arXiv 2407.10671: "57B", "14B"; the released checkpoint
    "gpt_oss_120b": (116.83e9, None),  # arXiv 2508.10925, table 1; active without the embedding: 5.13 B
    "mistral_7b": (7.242e9, 7.242e9),  # arXiv 2310.06825: "7B"; the released checkpoint
    "mixtral_8x7b": (46.70e9, 12.88e9),  # arXiv 2401.04088: 47 B, 13 B; the release notes: 46.7 B, 12.9 B
    "mixtral_8x22b": (140.6e9, 39.15e9),  # the release notes: 141 B, 39 B
    "switch_c": (1571e9, None),  # arXiv 2101.03961, table 9; active parameters are not given
    "glam_64e": (1.162e12, 96.6e9),  # arXiv 2112.06905, table 4: 1.2 T, 96.6 B
    "deepseek_moe_16b": (16.38e9, 2.83e9),  # arXiv 2401.06066: 16.4 B, 2.8 B; the released checkpoint
    "deepseek_v2_lite": (15.706e9, 2.661e9),  # arXiv 2405.04434: 15.7 B, 2.4 B without the embedding's 0.21 B
    "deepseek_v3": (671.03e9, 37.55e9),  # arXiv 2412.19437: 671 B, 37 B; the released checkpoint without MTP
    "deepseek_moe_145b": (144.6e9, 22.2e9),  # the same, section 7; the widths that make it are an assumption
}
CLOSE = 5e-4


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_built_and_has_the_published_size(model: str) -> None:
    config = composed([f"model={model}"])
    counts = count_parameters(meta_model(with_vocabulary(config.model, 4096), config.router))
    assert counts.total > 0
    total, active = PUBLISHED.get(model, (None, None))
    assert total is None or counts.total == pytest.approx(total, rel=CLOSE)
    assert active is None or counts.active == pytest.approx(active, rel=CLOSE)


RELEASED = {
    "olmoe_1b_7b": ("Olmoe", {"intermediate_size": 1024}),
    "qwen2_moe_a2_7b": ("Qwen2Moe", {}),
    "qwen2_57b_a14b": (
        "Qwen2Moe",
        {
            "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
        },
    ),
    "qwen3_moe_30b": ("Qwen3Moe", {"num_hidden_layers": 48, "head_dim": 128}),
}  # fmt: skip
"""Preset -> the prefix of transformers' classes, and where the released model differs from their defaults."""


@pytest.mark.parametrize("model", RELEASED)
def test_a_released_model_has_the_size_of_transformers_model(model: str) -> None:
    transformers = pytest.importorskip("transformers")
    prefix, changes = RELEASED[model]
    with torch.device("meta"):
        reference = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**changes))
    config = composed([f"model={model}"])
    counts = count_parameters(meta_model(config.model, config.router))
    assert counts.total == sum(parameter.numel() for parameter in reference.parameters())
    rope = reference.config.rope_parameters["rope_theta"]
    assert config.model.rope_theta == (1e6 if prefix.startswith("Qwen") else rope)
    assert config.model.norm_eps == reference.config.rms_norm_eps
    assert config.model.top_k == reference.config.num_experts_per_tok


@pytest.mark.parametrize("num_experts", [8, 128])
def test_switch_base_is_the_released_one_less_what_only_an_encoder_decoder_has(num_experts: int) -> None:
    transformers = pytest.importorskip("transformers")
    released = transformers.SwitchTransformersConfig(
        d_ff=3072, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=num_experts
    )
    with torch.device("meta"):
        reference = transformers.SwitchTransformersForConditionalGeneration(released)
    sizes = {name: parameter.numel() for name, parameter in reference.named_parameters()}
    if num_experts == 8:
        assert sum(sizes.values()) == 619_339_008  # google/switch-base-8: 619 M
    foreign = sum(
        size for name, size in sizes.items() if "EncDecAttention" in name or "relative_attention_bias" in name
    )
    # Norms: one before each of 12 cross-attentions, and one at the end of each half where we have one at all.
    foreign += (12 + 1) * 768
    model = composed([f"model=switch_base_{num_experts}"])
    assert count_parameters(meta_model(model.model, model.router)).total == sum(sizes.values()) - foreign
