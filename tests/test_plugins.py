"""The example router as a user runs it: training, resumption, a tool, and the message without the plugin."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from common.errors import CheckpointError, ConfigError
from common.plugins import changed_plugins, load_plugins, loaded_plugins, missing_plugins
from common.strict import from_dict
from data.config import DataConfig
from moe.config import FEED_FORWARDS, ROUTER_CONFIGS, FeedForwardSpec, ModelConfig, RouterConfig
from moe.feedforward import ACTIVATIONS
from moe.router import ROUTERS, Router
from parallel.config import ParallelConfig
from parallel.layout import Layout
from parallel.planning.plan import plan
from parallel.planning.workload import Workload
from scripts import describe
from scripts.cli.command_line import user_message
from tests.commands import ROOT, run_python
from training.report.tables import show_plan
from training.resume import resumable_state

EXAMPLE = ROOT / "examples" / "noisy_topk"
SMALL = [
    "model=mixtral_tiny", "model.num_layers=1", "train.seq_len=32", "train.global_batch=4", "train.log_every=1",
    "data.code_bytes=0", "data.prose_bytes=0", "data.arithmetic_bytes=60000", "data.vocab_size=400",
    "optim.schedule=constant", "optim.warmup_steps=0", "tracking=disabled", "run.sample_tokens=4",
]  # fmt: skip


def rows_of(directory: Path) -> list[dict]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("speed/", "eval/"))} for row in rows]


@pytest.mark.slow
def test_the_example_trains_resumes_bit_for_bit_and_is_asked_for_by_name(tmp_path: Path):
    preset = ["--config-dir", str(EXAMPLE), "router=noisy_topk"]
    where = [f"run.root={tmp_path}", f"data.cache={tmp_path / 'cache'}", "launch.nproc=2", *SMALL]
    where += ["telemetry.every=1"]  # Otherwise the last step of each run has metrics that it has not in a longer run.
    whole = run_python("train.py", *preset, *where, "run.name=whole", "train.steps=4")
    assert whole.returncode == 0, whole.stderr
    for steps in (2, 4):
        part = run_python("train.py", *preset, *where, "run.name=parts", f"train.steps={steps}")
        assert part.returncode == 0, part.stderr
        assert f"train.py --config-dir {EXAMPLE} " in part.stdout.replace("--config-dir=", "--config-dir ")
    rows = rows_of(tmp_path / "whole")
    assert rows_of(tmp_path / "parts") == rows
    assert rows[0]["router/noise_std/layer_00"] == pytest.approx(0.7031, abs=1e-3)  # softplus(0) + noise_floor
    assert rows[0]["router/auxiliary_loss"] > 0
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step-4" / "manifest.json").read_text())["state"]
    assert list(state["plugins"]) == ["noisy_topk.py"] and state["router"]["noise_floor"] == 0.01

    asks = "plugins=[noisy_topk.py]"
    without = run_python("train.py", *where, "run.name=parts", "train.steps=6")
    assert (without.returncode, without.stderr.count("\n")) == (2, 1) and asks in without.stderr
    generate = ["scripts/generate.py", f"checkpoint={tmp_path / 'parts'}", "prompt=1 + 1 =", "max_tokens=4"]
    without = run_python(*generate)
    assert (without.returncode, without.stderr.count("\n")) == (2, 1) and asks in without.stderr
    assert run_python(*generate, f"plugins=[{EXAMPLE / 'noisy_topk.py'}]").returncode == 0

    changed = tmp_path / "noisy_topk.py"
    shutil.copyfile(EXAMPLE / "noisy_topk.py", changed)
    changed.write_text(changed.read_text() + "# changed\n")
    other = run_python("train.py", *preset, f"plugins=[{changed}]", *where, "run.name=parts", "train.steps=5")
    assert other.returncode == 0, other.stderr
    assert "warning: plugin noisy_topk.py has changed since the checkpoint" in other.stdout


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module' in broken.py, line 1"),
        ("x = (", "SyntaxError"),
        ("from moe.config import ROUTER_CONFIGS, RouterConfig\nROUTER_CONFIGS.add('softmax_topk', RouterConfig)",
         "ValueError: router.kind=softmax_topk: this name is registered already"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_imported_is_one_line(tmp_path: Path, content: str, reason: str):
    path = tmp_path / "broken.py"
    path.write_text(content + "\n")
    with pytest.raises(ConfigError) as caught:
        load_plugins([str(path)])
    assert str(caught.value).startswith(f"plugins={path}: expected a module that can be imported ({reason}")
    assert "\n" not in str(caught.value) and "broken.py" not in loaded_plugins()


@pytest.mark.parametrize("given", ["no/such/file.py", "no_such_module_or_entry_point"])
def test_a_plugin_that_does_not_exist_is_one_line(given: str):
    with pytest.raises(ConfigError, match=rf"^plugins={given}: expected a module that can be imported \("):
        load_plugins([given])


def test_plugins_are_known_by_file_name_and_content(tmp_path: Path):
    path = tmp_path / "my_plugin_for_a_test.py"
    path.write_text("VALUE = 3\n")
    load_plugins([str(path)])
    load_plugins([str(path)])  # once
    digest = loaded_plugins()["my_plugin_for_a_test.py"]
    assert missing_plugins({"my_plugin_for_a_test.py": digest}) == ""
    assert "plugins=[other.py]: name them again" in missing_plugins({"other.py": digest})
    assert changed_plugins({"my_plugin_for_a_test.py": "0"}) == ["my_plugin_for_a_test.py"]
    assert changed_plugins({"my_plugin_for_a_test.py": digest, "other.py": "0"}) == []


def test_a_plugin_that_ends_the_process_is_one_line_about_the_plugin(tmp_path: Path):
    path = tmp_path / "ends.py"
    path.write_text("raise SystemExit(0)\n")
    with pytest.raises(ConfigError, match=r"that can be imported \(SystemExit: 0 in ends.py, line 1\)$"):
        load_plugins([str(path)])


ROUTER = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from moe.config import RouterConfig
from moe.router import Router, register_router

@dataclass(frozen=True)
class Config(RouterConfig):
    {config}

@register_router("for_a_test", Config)
class MyRouter({base}):
    {router}
"""


@pytest.mark.parametrize(
    ("base", "config", "router", "reason"),
    [
        ("nn.Module", "x: int = 1", "pass", "expected a subclass of moe.router.Router, found MyRouter in mine.py"),
        ("Router", "x: 'Unknown' = 1", "pass", "NameError: name 'Unknown' is not defined in mine.py, line"),
        ("Router", "MEANING: ClassVar = ('kind', 'slope')", "pass", "fields of Config in MEANING, found slope"),
        ("Router", "x: int = 1", "TELEMETRY = ('a',)", "expected num_extra in Config, the number of columns that"),
        ("Router", "x: int = 1", "TELEMETRY = ('entropy',)", "expected names in TELEMETRY that are no metrics of"),
    ],
)  # fmt: skip
def test_a_router_that_cannot_work_is_refused_when_it_is_registered(
    tmp_path: Path, base: str, config: str, router: str, reason: str
):
    path = tmp_path / "mine.py"
    path.write_text(ROUTER.format(base=base, config=config, router=router))
    with pytest.raises(ConfigError) as caught:
        load_plugins([str(path)])
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_plugins_activation_and_router_weight_are_in_every_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class TwoMatrices(RouterConfig):
        def weight_shapes(self, dim: int, num_experts: int) -> dict[str, tuple[int, ...]]:
            return {"weight": (num_experts, dim), "second": (3, dim)}

    monkeypatch.setitem(FEED_FORWARDS._entries, "relu2", FeedForwardSpec(gated=False, label="squared ReLU"))
    monkeypatch.setitem(ACTIVATIONS._entries, "relu2", lambda x: x.relu().square())
    monkeypatch.setitem(ROUTER_CONFIGS._entries, "two_matrices", TwoMatrices)
    monkeypatch.setitem(ROUTERS._entries, "two_matrices", Router)
    router = TwoMatrices(kind="two_matrices")
    model = ModelConfig(16, 4, 2, 2, 8, 12, ffn="relu2", num_experts=4, top_k=2, moe_every=2, vocab_size=10)
    describe.describe(describe.DescribeConfig(model, router))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Attention, norms, embedding and head; two networks of two matrices; per MoE layer four experts and the router.
    total = 4 * 4 * 16 * 16 + 9 * 16 + 2 * 10 * 16 + 2 * 2 * 12 * 16 + 2 * (4 * 2 * 12 * 16 + (4 + 3) * 16)
    active = total - 2 * 2 * 2 * 12 * 16
    assert ["router", *2 * [str(2 * (4 + 3) * 16)]] in [row[:3] for row in rows]
    assert ["total", f"{total:,}", f"{active:,}", "100.0%"] in rows
    # The other tables of a run's start. tests/training/test_report.py has the activation in that of the model.
    show_plan(plan(Layout(), ParallelConfig(), Workload(model, router, 4, 1, 8)))
    assert f" {total:,} " in capsys.readouterr().out


def test_a_misspelt_kind_is_named_before_the_keys_that_only_its_plugin_knows():
    for cls, section, key in (
        (RouterConfig, {"kind": "mine", "slope": 1}, "router.kind"),
        (DataConfig, {"kind": "mine", "verses": 1}, "data.kind"),
    ):
        with pytest.raises(ConfigError, match=rf"^{key}=mine: expected one of .*, or a name that a module in plugins="):
            from_dict(cls, section, key.partition(".")[0])


def test_keys_of_a_plugin_are_suggested(monkeypatch: pytest.MonkeyPatch):
    @dataclass(frozen=True)
    class Mine(RouterConfig):
        slope: float = 1.0

    monkeypatch.setitem(ROUTER_CONFIGS._entries, "mine", Mine)
    with pytest.raises(ConfigError, match=r"^router.slop=2: unknown key; the nearest valid key is router.slope$"):
        from_dict(RouterConfig, {"kind": "mine", "slop": 2}, "router")


def test_a_key_of_a_plugin_that_no_preset_has_needs_a_plus():
    refused = ConfigCompositionException("Could not override 'router.slope'.")
    hint = " (a key of a plugin: +router.slope=2)"
    line = "router.slope=2: unknown key"
    assert user_message(refused, ["plugins=[mine.py]", "router.slope=2"]) == line + hint
    assert user_message(refused, ["router.slope=2"]) == line


def test_a_checkpoint_cannot_write_to_the_terminal_with_the_name_of_a_plugin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.resume.read_state", lambda path: {"plugins": {"\x1b[2Jmine.py": ""}})
    with pytest.raises(CheckpointError, match=r"step-1: 'it was written with plugins=\[\\x1b\[2Jmine.py\]") as caught:
        resumable_state("step-1", 1)
    assert str(caught.value).isprintable()
