"""Alarms: the rules over the routers, `alarms.jsonl`, and runs of which routers go wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import CheckpointError
from common.text import parse_yaml
from moe.config import ROUTER_CONFIGS, ModelConfig, RouterConfig
from moe.router import ROUTERS, Router, balance_reaches
from moe.routers import SoftmaxTopKRouter, build_router
from scripts.cli.command_line import CONF
from tests.test_train import numbers
from tests.training.test_faults import cache, no_plots, run  # noqa: F401 - fixtures
from training.config import HealthConfig
from training.report.alarms import ALARMS, Alarm, alarm_lines, append_alarms, cut_alarms, read_alarms
from training.report.recorder import Recorder
from training.router_health import CALM, SETTLED, RouterHealth, StepFigures

MODEL = ModelConfig(
    dim=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, hidden_dim=24, num_experts=8, top_k=2, vocab_size=64,
)  # fmt: skip
BALANCED = torch.full((2, 8), 128)
COLLAPSED = [[1, 0, 511, 0, 0, 1, 511, 0], [128] * 8]
"""Layer 0 sends nearly all tokens to two experts."""

COLLAPSE = {
    1: (0.995, 0.44, 4.4), 10: (0.652, 2.98, 7.7), 20: (0.481, 7.92, 18.9), 30: (0.160, 11.15, 36.3),
    40: (0.277, 13.75, 42.9), 60: (0.045, 16.89, 75.8), 80: (0.041, 15.94, 79.8), 150: (0.074, 17.13, 78.4),
}  # fmt: skip
"""Entropy, logit range and z-loss of the first layer, by step, of model=mixtral_tiny with 8 experts,
router.balance_coef=0, router.z_coef=0 and optim.lr=0.03 (4 rows of 64 tokens, seed 0)."""


def alarms_of(health: RouterHealth, steps: range, counts: Any, **layers: list[float]) -> list[Alarm]:
    figures = StepFigures(torch.as_tensor(counts), layers)
    return [alarm for step in steps for alarm in health.check(step, figures)]


def test_dead_experts_are_told_once_with_their_layer_and_once_when_they_get_tokens_again():
    health = RouterHealth(HealthConfig(dead_steps=10, max_vio=None), MODEL, RouterConfig())
    assert alarms_of(health, range(1, 21), BALANCED) == []
    assert alarms_of(health, range(21, 25), COLLAPSED) == []
    (alarm,) = alarms_of(health, range(25, 120), COLLAPSED)
    # Half of the experts get nothing, so half of the ten steps are enough.
    assert (alarm.step, alarm.rule, alarm.layer, alarm.first_step) == (25, "dead_experts", 0, 21)
    assert alarm.message == (
        "layer 0: 4 of 8 experts got no token since step 21; raise router.balance_coef (0.01), or lower optim.lr"
    )
    assert health.row() == {"alarm/dead_experts": 1}
    # One token every few steps is no end of it.
    one = torch.tensor(COLLAPSED)
    one[0, 3:5] += 1
    for step in range(120, 160, 8):
        assert alarms_of(health, range(step, step + 1), one) == []
        assert alarms_of(health, range(step + 1, step + 8), COLLAPSED) == []
    (end,) = alarms_of(health, range(160, 260), BALANCED)
    assert end.ended and end.step == 159 + CALM and end.rule == "dead_experts" and end.first_step == 21
    assert end.message == "layer 0: all experts get tokens again (it was so from step 21 to 159)"
    assert health.row() == {}


def test_one_expert_is_dead_after_all_the_steps_and_only_if_it_missed_tokens():
    health, counts = RouterHealth(HealthConfig(dead_steps=10, max_vio=None), MODEL, RouterConfig()), BALANCED.clone()
    counts[1, 5] = 0
    (alarm,) = alarms_of(health, range(1, 30), counts)
    assert alarm.step == 10 and alarm.message.startswith("layer 1: 1 of 8 experts got no token since step 1;")
    # A balanced router sends 0.25 tokens a step to each of these experts.
    few = torch.zeros(2, 8, dtype=torch.int64)
    few[:, 0] = 2
    assert alarms_of(RouterHealth(HealthConfig(max_vio=None), MODEL, RouterConfig()), range(1, 300), few) == []
    (alarm,) = alarms_of(health, range(30, 130), COLLAPSED)[:1]
    assert alarm.layer == 0
    assert (
        alarms_of(RouterHealth(HealthConfig(dead_steps=0, max_vio=None), MODEL, RouterConfig()), range(99), counts)
        == []
    )


def test_max_vio_near_its_ceiling_and_grown():
    health = RouterHealth(HealthConfig(dead_steps=0), MODEL, RouterConfig(balance_coef=0.0))
    (alarm,) = alarms_of(health, range(1, 200), COLLAPSED)
    assert (alarm.step, alarm.rule, alarm.layer) == (SETTLED, "max_vio", 0)
    assert alarm.message == (
        "layer 0: MaxVio is 2.99, near its ceiling (at most 3 = E/k - 1); nothing balances the load: raise "
        "router.balance_coef, or lower optim.lr"
    )
    health = RouterHealth(HealthConfig(dead_steps=0), MODEL, RouterConfig())
    slightly, more = torch.tensor([[152, *[128] * 6, 104]] * 2), torch.tensor([[300, *[104] * 7]] * 2)
    assert alarms_of(health, range(1, 200), slightly) == []
    first, second = alarms_of(health, range(200, 400), more)
    assert (first.layer, second.layer) == (0, 1) and 200 < first.step == second.step < 400
    assert (
        first.message.startswith("layer 0: MaxVio grew from 0.19 in step ") and "(at most 3 = E/k - 1)" in first.message
    )


def test_logits_and_entropy_of_a_run_that_collapsed():
    config = HealthConfig(logit_range=12.0, entropy=0.1)
    health, found, now = RouterHealth(config, MODEL, RouterConfig()), [], COLLAPSE[1]
    for step in range(1, 200):
        now = COLLAPSE.get(step, now)
        layers = {name: [value, start] for name, value, start in zip(
            ("entropy", "logit_range", "z_loss"), now, COLLAPSE[1], strict=True
        )}  # fmt: skip
        found += health.check(step, StepFigures(BALANCED, layers))
    assert [(alarm.rule, alarm.layer) for alarm in found] == [("router_logits", 0), ("router_entropy", 0)]
    logits, entropy = found
    assert logits.step == SETTLED and SETTLED <= entropy.step < 200
    assert "layer 0: the router's logit range grew from 0.44 in step 1 to 12.9 " in logits.message
    assert logits.message.endswith("(health.logit_range=12): lower optim.lr or raise router.z_coef")
    assert entropy.message.startswith("layer 0: the router's entropy fell from 0.99 in step 1 to 0.1 of ln E ")
    assert entropy.message.endswith(": lower optim.lr or raise router.z_coef")
    # Without the range, as of a checkpoint of another program, and without growth, as of a model that is fine-tuned.
    large = {"z_loss": [400.0, 4.0], "logit_range": [40.0, 40.0]}
    assert alarms_of(RouterHealth(HealthConfig(), MODEL, RouterConfig()), range(1, 300), BALANCED, **large) == []


@pytest.mark.parametrize(("follows", "told"), [(0.005, 1), (0.6, 0)])
def test_a_balance_loss_that_does_not_follow_the_load(follows: float, told: int):
    """As with a softmax of a softmax (transformers issue 45120): its probabilities are nearly equal."""
    health = RouterHealth(HealthConfig(dead_steps=0, max_vio=None), MODEL, RouterConfig())
    imbalance = 8 * 2 * (511 / 1024) ** 2 - 1
    layers = {"balance_loss": [1 + follows * imbalance, 1.0], "logit_range": [7.0, 7.0]}
    found = alarms_of(health, range(1, 200), COLLAPSED, **layers)
    assert [(alarm.step, alarm.rule, alarm.layer) for alarm in found] == [(SETTLED, "balance_loss", 0)] * told
    assert all("do not follow its logits" in alarm.message for alarm in found)
    without = RouterHealth(HealthConfig(dead_steps=0, max_vio=None), MODEL, RouterConfig(balance_coef=0.0))
    assert alarms_of(without, range(1, 200), COLLAPSED, **layers) == []


def test_a_router_without_a_gradient_is_told():
    health = RouterHealth(HealthConfig(), MODEL, RouterConfig())
    assert health.check(1, StepFigures(BALANCED, {}, (0.2, 0.1))) == []
    (alarm,) = health.check(2, StepFigures(BALANCED, {}, (0.2, 0.0)))
    assert (alarm.rule, alarm.layer) == ("balance_loss", 1) and "the router's gradient is zero" in alarm.message
    assert health.check(3, StepFigures(BALANCED, {})) == [] and health.zero_gradients == {1}
    frozen = RouterHealth(HealthConfig(), MODEL, RouterConfig(), trained=False)
    assert frozen.check(2, StepFigures(BALANCED, {}, (0.0, 0.0))) == []
    found = [alarm for step in range(4, 99) for alarm in health.check(step, StepFigures(BALANCED, {}, (0.2, 0.1)))]
    assert [(alarm.layer, alarm.ended) for alarm in found] == [(1, True)]


class Detached(SoftmaxTopKRouter):
    """Its balance loss is reported, and has no gradient."""

    def compute_scores(self, logits_BSE: Tensor) -> tuple[Tensor, Tensor]:
        scores_BSE, probs_BSE = super().compute_scores(logits_BSE)
        return scores_BSE, probs_BSE.detach()


class Constant(SoftmaxTopKRouter):
    """Its probabilities have a gradient, which is zero."""

    def compute_scores(self, logits_BSE: Tensor) -> tuple[Tensor, Tensor]:
        scores_BSE, probs_BSE = super().compute_scores(logits_BSE)
        return scores_BSE, probs_BSE * 0


class OtherWeight(SoftmaxTopKRouter):
    """The gradient reaches the token and not the router."""

    def compute_logits(self, x_BSD: Tensor, noise_keys_BS: Tensor | None) -> Tensor:
        return x_BSD.requires_grad_() @ self.weight.detach().t()


def built(kind: type[Router] | str) -> Router:
    config = ROUTER_CONFIGS[kind if isinstance(kind, str) else "softmax_topk"](jitter=0.1)
    router = build_router(16, 8, 2, config) if isinstance(kind, str) else kind(16, 8, 2, config)
    torch.nn.init.normal_(router.weight, std=0.02)
    return router


@pytest.mark.parametrize("kind", ["softmax_topk", "sigmoid_topk", "expert_choice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_balance_loss_reaches_every_built_in_router(kind: str, dtype: torch.dtype):
    router = built(kind)
    assert balance_reaches(router, dtype) and router.training and router.weight.grad is None


@pytest.mark.parametrize("kind", [Detached, Constant, OtherWeight])
def test_the_balance_loss_does_not_reach_a_router_that_cuts_its_probabilities_off(kind: type[Router]):
    assert not balance_reaches(built(kind), torch.float32)


def test_a_run_whose_balance_loss_is_dead_says_so_at_its_first_step(tmp_path, cache, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(ROUTERS._entries, "softmax_topk", Detached)
    run(tmp_path, cache, "dead", "train.steps=3", "model.num_layers=2")
    out = capsys.readouterr().out
    for layer in (0, 1):
        assert out.count(f"warning: step 1: layer {layer}: the balance loss does not reach the router") == 1
    assert [row["alarm/balance_loss"] for row in numbers(tmp_path / "dead")] == [2, 2, 2]
    first, second = read_alarms(tmp_path / "dead")
    assert (first.rule, first.layer, second.layer) == ("balance_loss", 0, 1)
    run(tmp_path, cache, "off", "train.steps=1", "router.balance_coef=0")
    assert not (tmp_path / "off" / ALARMS).exists()


def test_a_resumed_run_has_the_alarms_and_metrics_of_the_uninterrupted_one(tmp_path, cache):  # noqa: F811
    many = [
        "model.num_experts=16",
        "train.seq_len=64",
        "optim.schedule_steps=12",
        "optim.lr=0.02",
        "optim.warmup_steps=0",
    ]
    many += ["health.dead_steps=3", "router.balance_coef=0", "checkpoint.every=5", "telemetry.every=0"]
    many += ["telemetry.forecast=false"]
    run(tmp_path, cache, "whole", *many, "train.steps=12")
    for steps in (5, 12):
        run(tmp_path, cache, "parts", *many, f"train.steps={steps}")
        # What a run that was killed leaves behind.
        append_alarms(tmp_path / "parts", [Alarm(11, "dead_experts", 0, "a step that is repeated", 9)])
    rows, whole_rows = (
        [{key: value for key, value in row.items() if not key.startswith("eval/")} for row in numbers(tmp_path / name)]
        for name in ("parts", "whole")
    )
    assert rows == whole_rows
    whole = read_alarms(tmp_path / "whole")
    assert read_alarms(tmp_path / "parts")[:-1] == whole and {alarm.rule for alarm in whole} == {"dead_experts"}
    states = [
        json.loads((tmp_path / name / "checkpoints" / "step-12" / "manifest.json").read_text())["state"]["health"]
        for name in ("whole", "parts")
    ]
    assert states[0] == states[1] and states[0]["routers"]["active"]


def test_the_state_is_that_of_the_rules_after_a_copy_through_json():
    config, changing = HealthConfig(dead_steps=8), [COLLAPSED, BALANCED.tolist()] * 3
    one, two = (RouterHealth(config, MODEL, RouterConfig()) for _ in range(2))
    for step, counts in enumerate(changing * 50, 1):
        layers = {"entropy": [1 / step, 0.5], "logit_range": [0.1 * step, 3.0], "z_loss": [float(step), float("nan")]}
        figures = StepFigures(torch.tensor(counts), layers)
        restored = RouterHealth(config, MODEL, RouterConfig())
        restored.load_state_dict(json.loads(json.dumps(one.state_dict())))
        expected = two.check(step, figures)
        assert restored.check(step, figures) == expected
        one = restored
    assert one.state_dict() == two.state_dict()
    with pytest.raises(CheckpointError, match=r"health\.routers"):
        one.load_state_dict({"absences": {"absent": [[0, 99, 1, 1.0]]}})
    one.load_state_dict({})
    assert one.state_dict() == RouterHealth(config, MODEL, RouterConfig()).state_dict()


def test_the_file_is_cut_back_and_damaged_lines_are_left_out(tmp_path):
    alarms = [Alarm(step, "max_vio", 1, f"message {step}", step - 1, ended=step == 5) for step in (3, 5, 9)]
    append_alarms(tmp_path, alarms[:2])
    append_alarms(tmp_path, alarms[2:])
    assert json.loads((tmp_path / ALARMS).read_text().splitlines()[0]) == {
        "step": 3, "rule": "max_vio", "layer": 1, "message": "message 3", "first_step": 2, "ended": False,
    }  # fmt: skip
    with open(tmp_path / ALARMS, "ab") as file:
        file.write(b'[1]\n{"step": "4"}\n{"step": 10, "rule"')
    assert read_alarms(tmp_path) == alarms
    cut_alarms(tmp_path, 8)
    assert read_alarms(tmp_path) == alarms[:2] and (tmp_path / ALARMS).read_bytes().count(b"\n") == 2
    cut_alarms(tmp_path, 0)
    assert not (tmp_path / ALARMS).exists() and read_alarms(tmp_path) == []
    cut_alarms(tmp_path, 0)


def test_many_layers_with_the_same_alarm_share_a_line():
    alarms = [Alarm(7, "max_vio", layer, f"layer {layer}: x", 7) for layer in range(6)]
    assert alarm_lines([*alarms, Alarm(7, "loss_spike", None, "y", 3, ended=True)]) == [
        "warning: step 7: layer 0: x",
        "warning: step 7: layer 1: x",
        "step 7: the same in layers 2-5 (alarms.jsonl)",
        "step 7: y",
    ]
    assert len(alarm_lines(alarms[:3])) == 3


def test_an_alarm_goes_to_the_terminal_the_file_and_the_trackers(tmp_path: Path):
    recorder, said, sent = Recorder.__new__(Recorder), [], []
    recorder.active, recorder.directory, recorder.warns = True, tmp_path, False
    recorder.note = lambda *lines: said.extend(lines)  # type: ignore[method-assign]
    recorder.tracker = type("Kept", (), {"alert": lambda self, alarm: sent.append(alarm)})()  # type: ignore[misc]
    alarm = Alarm(7, "max_vio", 1, "layer 1: x", 7)
    recorder.alarms([alarm])
    recorder.alarms([alarm], show=False)
    recorder.alarms([])
    assert said == ["warning: step 7: layer 1: x"] and sent == [alarm] * 2 and read_alarms(tmp_path) == [alarm] * 2


@pytest.mark.slow
def test_a_router_that_collapses_is_named_before_half_of_its_experts_are_dead_for_long(tmp_path, cache):  # noqa: F811
    """Nothing balances a router with one expert per token and a high learning rate."""
    given = ["model=switch_tiny", "train.seq_len=64", "train.global_batch=4", "train.steps=45", "checkpoint.every=0"]
    given += ["telemetry.forecast=false"]
    given += ["model.num_layers=2", "router.balance_coef=0", "router.capacity_factor=null", "optim.lr=0.01"]
    run(tmp_path, cache, "collapses", *given, "optim.schedule_steps=300", "checkpoint.at_end=false")
    rows, alarms = numbers(tmp_path / "collapses"), read_alarms(tmp_path / "collapses")
    (alarm,) = [alarm for alarm in alarms if alarm.rule == "dead_experts"]
    assert alarm.layer == 0 and "experts got no token since step" in alarm.message
    dead = [[share == 0 for share in row["router/load/layer_00"]] for row in rows]
    for_long = [last + 1 for last in range(24, 45) if sum(map(all, zip(*dead[last - 24 : last + 1], strict=True))) >= 4]
    assert for_long and alarm.step <= for_long[0]
    told = rows[alarm.step - 1]
    assert told["step"] == alarm.step and told["alarm/dead_experts"] == 1 and "alarm/dead_experts" not in rows[0]


TINY_PRESETS = sorted(
    path.stem for path in (CONF / "model").glob("*_tiny.yaml") if "num_experts" in path.read_text(encoding="utf-8")
)


@pytest.mark.slow
@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_the_first_200_steps_of_a_preset_have_no_alarm(tmp_path, cache, preset):  # noqa: F811
    given = [
        "train.seq_len=64",
        "train.global_batch=4",
        "train.steps=200",
        "telemetry.forecast=false",
        "checkpoint.every=0",
        "checkpoint.at_end=false",
    ]
    layers = parse_yaml((CONF / "model" / f"{preset}.yaml").read_text(encoding="utf-8"))["num_layers"]
    run(tmp_path, cache, preset, f"model={preset}", *given, f"model.num_layers={layers}", "train.log_every=50")
    assert read_alarms(tmp_path / preset) == []
    assert not any(name.startswith("alarm/") for row in numbers(tmp_path / preset) for name in row)
