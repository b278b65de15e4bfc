import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from common.strict import from_dict
from moe.accounting.costs import training_bytes
from moe.config import RouterConfig
from moe.init import init_parameters
from moe.model import ModelInputs, Transformer
from scripts import describe as tool
from scripts.cli.command_line import CONF, plain
from tests.test_conf import MODELS, composed
from training.config import OptimConfig
from training.optimizer import build_optimizer


def configured(*overrides: str) -> tool.DescribeConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_dict(tool.DescribeConfig, plain(compose("describe", list(overrides))))


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Run the tool, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["describe.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return ended.value.code


def test_mixtral_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "model=mixtral_8x7b", "format=json", "dtype=fp16") == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["total_params"], figures["active_params"]) == (46_702_792_704, 12_879_925_248)
    assert sum(figures["params"].values()) == figures["total_params"]
    assert sum(figures["active"].values()) == figures["active_params"]
    # The course prints 2.1 and 44.6 B. docs/models.md explains the difference.
    assert figures["params"]["attention"] == 32 * (2 * 4096**2 + 2 * 4096 * 1024)
    assert figures["params"]["routed_experts"] == 8 * 3 * 4096 * 14336 * 32
    assert figures["weights_bytes"]["fp16"] == pytest.approx(93e9, rel=0.01)
    # 4 bits for a number, 8 for a scale of 64 numbers, 32 for a scale of 256 scales; or 8 for a number, 32 for a row.
    quantised = figures["params"]["attention"] + figures["params"]["routed_experts"]
    rest = 2 * (figures["total_params"] - quantised) + 2 * figures["params"]["router"]
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    assert figures["weights_bytes"]["nf4"] == pytest.approx(quantised * bits / 8 + rest, rel=1e-5)
    rows = 32 * (8 * (2 * 14336 + 4096) + 2 * 4096 + 2 * 1024)
    assert figures["weights_bytes"]["int8"] == quantised + 4 * rows + rest
    assert figures["kv_cache_bytes"]["full"] == figures["kv_cache_bytes"]["rolling"] == 32768 * 32 * 2 * 8 * 128 * 2
    assert figures["receptive_field"] is None
    assert (figures["attention"][0]["context"], figures["attention"][0]["window"]) == (32768, 4096)
    assert figures["attention"][0]["saved"] == 0.875


def test_keys_of_adapters_without_their_kind_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "model=mixtral_8x7b", "adapter.rank=8") == 2
    assert capsys.readouterr().err == "error: adapter.rank=8: expected 16 with adapter.kind=null\n"


def test_adapters_train_and_the_rest_has_no_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("model=mixtral_8x7b", "adapter=lora", "adapter.targets=[attention.wq,experts.w_up]", "format=json")
    assert called(monkeypatch, *given) == 0
    figures = json.loads(capsys.readouterr().out)
    trained = 32 * 16 * (2 * 4096 + 8 * (4096 + 14336))
    assert (figures["trained_params"], figures["total_params"]) == (trained, 46_702_792_704 + trained)
    assert figures["training_bytes"]["gradients"] == 2 * trained
    assert figures["training_bytes"]["optimizer"] == (4 + 8) * trained
    assert figures["training_bytes"]["weights"] == 2 * figures["total_params"]


def test_a_sliding_window() -> None:
    figures = tool.figures(configured("model=mixtral_8x7b", "model.sliding_window=4096", "batch=3"))
    assert figures["receptive_field"] == 131_072
    assert (
        figures["kv_cache_bytes"]["rolling"] * 8
        == figures["kv_cache_bytes"]["full"]
        == 3 * 32768 * 32 * 2 * 8 * 128 * 2
    )
    full = tool.figures(configured("model=mixtral_8x7b"))
    assert figures["training_flops_per_token"] < full["training_flops_per_token"]
    several = tool.figures(configured("model=mistral_tiny", "model.sliding_window=[64,null]"))
    assert [saving["window"] for saving in several["attention"]] == [64]
    assert several["receptive_field"] is None


@pytest.mark.parametrize("model", MODELS)
def test_every_preset_is_described_with_its_own_router(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(f"model={model}")
    trained = composed([f"model={model}"])
    assert (config.model, config.router) == (trained.model, trained.router)
    tool.describe(config)
    shown = capsys.readouterr().out
    figures = tool.figures(config)
    rows = [line.split() for line in shown.splitlines()]
    assert ["total", f"{figures['total_params']:,}", f"{figures['active_params']:,}", "100.0%"] in rows
    assert "87.5%" in shown or config.model.sliding_window is not None
    assert ("MoE layers" in shown) == config.model.is_moe
    assert not any(line.endswith(" ") for line in shown.splitlines())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("olmoe_1b_7b", ["128, RMSNorm of queries and keys\n"]),
        ("qwen2_moe_a2_7b", ["biases of queries, keys and values\n", "top-4, 1 shared of width 5,632 with a gate\n"]),
        ("qwen3_moe_30b", ["128, RMSNorm of each query and key head\n"]),
        ("gpt_oss_120b", ["64, biases, rotary frequencies scaled by 32 (yarn)\n"]),
    ],
)
def test_parts_that_only_some_families_have_are_named(
    model: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tool.describe(configured(f"model={model}"))
    shown = capsys.readouterr().out
    assert [text for text in words if text not in shown] == []


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training_bytes_are_those_of_a_real_step(precision: torch.dtype) -> None:
    config = dataclasses.replace(composed(["model=deepseek_moe_tiny"]).model, vocab_size=64)
    model = Transformer(config, RouterConfig(), precision)
    init_parameters(model, seed=0)
    optimizer = build_optimizer(list(model.parameters()), OptimConfig(lr=1e-3))
    tokens = torch.randint(64, (4, 32))
    model(ModelInputs(tokens, torch.arange(32).expand(4, -1))).logits_BSV.float().logsumexp(-1).sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    weights = sum(parameter.nbytes for parameter in parameters)
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    moments = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    figures = training_bytes(sum(parameter.numel() for parameter in parameters))
    assert (figures.weights, figures.gradients, figures.optimizer) == (weights, gradients, moments)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model=mixtral"], "model=mixtral: expected one of deepseek_moe_145b, "),
        (["context=0"], "context=0: expected an integer >= 1"),
        (["batch=-1"], "batch=-1: expected an integer >= 1"),
        (["window=null"], "window=null: expected an integer"),
        (["dtype=fp7"], "dtype=fp7: expected one of bf16, fp16, fp32"),
        (["format=xml"], "format=xml: expected one of table, json"),
        (["model.num_heads=7"], "model.num_kv_heads=8: expected a divisor of num_heads=7"),
        (["model=switch_c", "router.normalize=true"], "router.normalize=true: expected auto or false with model.top_k"),
        (["model.dim=1000000000000000000000"], "model: expected sizes that a tensor can have ("),
        (["contxt=1"], "contxt=1: unknown key; the nearest valid key is context"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {line}") and shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "tool_name", ["describe", "generate", "parity", "campaign", "upcycle", "export_hf", "import_hf"]
)
def test_help_shows_commands_and_keys_and_needs_no_torch(tool_name: str) -> None:
    done = subprocess.run(
        [sys.executable, f"scripts/{tool_name}.py", "--help"],
        cwd=CONF.parent,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert f"    python scripts/{tool_name}.py " in done.stdout
    assert (CONF / f"{tool_name}.yaml").read_text() in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported and "torch" not in imported


@pytest.mark.slow
def test_the_largest_model_in_another_process() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/describe.py", "model=switch_c", "context=512"],
        cwd=CONF.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,571,053,346,720" in done.stdout and "\x1b" not in done.stdout
