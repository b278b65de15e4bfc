"""The study of docs/study.md (`benchmarks/study.py`): its presets, how it aggregates, and its parts on a tiny model."""

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import study
from benchmarks.study import Spread, aggregate, cell, cpu_intervals, loss_at, probe_figures, share_costs
from common.strict import from_dict
from moe.accounting.flops import meta_model, training_flops_per_token
from scripts.cli.command_line import compose_config
from tests.probes import synthetic_tokens
from training.config import Config, with_vocabulary
from training.report.probe import PROBE, TOKENS_FILE, ProbeRouting, step_file, write_routing, write_tokens

PRESETS = Path(study.ROOT, study.PRESETS)
TINY = [
    "data.code_bytes=60000", "data.prose_bytes=40000", "data.arithmetic_bytes=40000", "data.heldout_max_bytes=2000",
    "train.seq_len=64", "train.global_batch=8", "train.log_every=2", "telemetry.probe_tokens=64",
]  # fmt: skip


def config_of(*overrides: str) -> Config:
    return from_dict(Config, compose_config("config", overrides, str(PRESETS)))


def test_mixtures_have_the_flops_of_the_dense_model_and_of_their_router() -> None:
    assert {path.stem for path in PRESETS.glob("experiment/*.yaml")} == {
        "study", "dense", "collapse", *study.TOPS, *study.BALANCES,
    }  # fmt: skip

    def flops(*overrides: str) -> tuple[Config, float]:
        config = config_of(*overrides)
        model = meta_model(with_vocabulary(config.model, 512), config.router)
        return config, training_flops_per_token(model, config.train.seq_len)

    _, dense = flops("experiment=dense")
    for name in study.TOPS:
        config, mixture = flops(f"experiment={name}", "model.num_experts=16")
        router = 6 * config.model.num_layers * config.model.dim * 16
        assert (config.run.experiment, f"top{config.model.top_k}", mixture) == (name, name, dense + router)


def test_runs_are_aggregated_over_their_seeds() -> None:
    losses = {(4, 1): [3.0, 3.5, 2.5], (8, 1): [1.0, 1.25, 4.0]}
    rows = [
        {"num_experts": experts, "top_k": top_k, "seed": seed, "loss": loss, "width": 128, "max_vio": None}
        for seed in range(3)
        for (experts, top_k), values in losses.items()
        for loss in [values[seed]]
    ]
    groups = aggregate(rows, ("num_experts", "top_k"))
    assert [(group["num_experts"], group["top_k"]) for group in groups] == list(losses)
    for group, values in zip(groups, losses.values(), strict=True):
        assert group["loss"] == pytest.approx((np.mean(values), np.std(values, ddof=1), 3), rel=1e-12)
        assert group["width"] == 128 and "max_vio" not in group
    assert cell("loss", groups[0]["loss"]) == "3.000 ± 0.500"
    assert cell("loss", Spread.of([2.0])) == "2.000" and cell("cpu_s", None) == "-"


def test_a_difference_is_marked_if_its_confidence_interval_is_without_zero() -> None:
    # Two seeds: t = 12.706; values m - 1 and m + 1 have the interval m ± 12.706.
    assert not Spread.of([11.7, 13.7]).differs and Spread.of([11.8, 13.8]).differs
    # Three seeds: t = 4.303; -1, 0, 1 around m have the standard error 1 / √3, and the interval m ± 2.484.
    assert not Spread.of([-3.48, -2.48, -1.48]).differs and Spread.of([-3.49, -2.49, -1.49]).differs
    assert cell("minus_dense", Spread.of([-3.49, -2.49, -1.49])) == "**-2.490 ± 1.000**"
    assert not Spread.of([5.0]).differs


def test_the_dense_model_at_the_same_cpu_time(tmp_path: Path) -> None:
    file = tmp_path / "cpu_seconds.csv"
    # Intervals of less than 10 steps are left out: they end at a probe.
    file.write_text("step,cpu_seconds\n1,9\n8,99\n20,102\n40,103\n60,107\n64,109\n80,125\n")
    assert cpu_intervals(file, 20) == pytest.approx([0.25, 0.05, 0.2, 1.0])

    dense: list[dict[str, Any]] = [
        {"experiment": "dense", "seed": seed, "steps": steps, "loss": loss + seed, "cpu_s_per_step": per_step}
        for seed, per_step in ((0, 0.5), (1, 0.1))
        for steps, loss in ((100, 4.0), (400, 3.0))
    ]
    share_costs(dense, ("experiment",))  # 10 and 40 CPU seconds, those of the faster seed
    assert [row["cpu_s"] for row in dense] == pytest.approx([10, 40, 10, 40])
    assert loss_at(dense, 0, 20.0) == pytest.approx(3.5)  # the geometric mean
    assert loss_at(dense, 1, 10 * 4**0.25) == pytest.approx(4.75)
    assert loss_at(dense, 0, 9.9) is None and loss_at(dense, 0, 40.1) is None


def test_specialisation_and_max_vio_of_a_probe(tmp_path: Path) -> None:
    tokens = synthetic_tokens(num_tokens=72)  # 24 tokens of each of three domains
    own_LTK = np.broadcast_to(tokens.domain_T[:, None] + np.array([0, 4]), (2, 72, 2)).astype(np.int32)
    same_LTK = np.broadcast_to(np.array([0, 1]), (2, 72, 2)).astype(np.int32)
    (tmp_path / PROBE).mkdir()
    write_tokens(tmp_path / PROBE / TOKENS_FILE, tokens)
    for step, experts_LTK in ((0, same_LTK), (4, same_LTK), (16, own_LTK)):
        routing = ProbeRouting(experts_LTK, np.full((2, 72, 2), 0.5, np.float32), np.zeros((2, 72), np.float32), 8)
        write_routing(step_file(tmp_path / PROBE, step), routing, tokens.digest())
    figures = probe_figures(tmp_path, 16)
    # Each of three domains has two experts to itself: two thirds of its assignments are elsewhere in the mean. Two of
    # eight experts would get 1/8 each at balance, and these six get 1/6 each. Tokens of domain 0 or 1 keep one expert.
    assert figures == pytest.approx(
        {
            "specialisation": 2 / 3,
            "specialisation_untrained": 0,
            "max_vio_heldout": 8 / 6 - 1,
            "saturation": (1 / 2 + 1 / 2 + 0) / 3,
            "saturation_step": 4,
        }
    )


@pytest.mark.slow
def test_every_part_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = {"TOPS": ("top2",), "EXPERTS": (8,), "DENSE_STEPS": (1.0, 8.0), "BALANCES": study.BALANCES[1:3]}
    for name, value in (fewer | {"COLLAPSE_RATES": (0.03,)}).items():
        monkeypatch.setattr(study, name, value)
    command = ["study.py", "all", "--out", str(tmp_path), "--seeds", "0,1", "--steps", "6"]
    monkeypatch.setattr(sys, "argv", [*command, *TINY, f"data.cache={tmp_path / 'cache'}"])

    def run() -> dict[str, Any]:
        study.main()
        return {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in study.PARTS}

    first = run()
    assert {part: len(content["runs"]) for part, content in first.items()} == {
        "experts": 6, "balance": 4, "collapse": 4,
    }  # fmt: skip
    for part, content in first.items():
        assert (tmp_path / f"{part}.png").stat().st_size > 1000 and "| ---" in (tmp_path / f"{part}.md").read_text()
        assert content["about"]["cpu_minutes"] > 0 and all(math.isfinite(row["loss"]) for row in content["runs"])
    row = next(row for row in first["experts"]["runs"] if row["num_experts"] == 8 and row["seed"] == 1)
    dense = [each for each in first["experts"]["runs"] if each["experiment"] == "dense" and each["seed"] == 1]
    assert row["minus_dense"] == pytest.approx(row["loss"] - dense[0]["loss"])
    assert row["cpu_s"] == pytest.approx(6 * min(other["cpu_s_per_step"] for other in first["experts"]["runs"]
                                                 if other["num_experts"] == 8))  # fmt: skip
    means = [statistics.fmean(each["loss"] for each in first["balance"]["runs"] if each["experiment"] == name)
             for name in study.BALANCES]  # fmt: skip
    assert all(f"| {mean:.3f} ± " in (tmp_path / "balance.md").read_text() for mean in means)

    # The same command runs nothing again: the measured CPU times are the same, too.
    again = run()
    assert [again[part]["runs"] for part in study.PARTS] == [first[part]["runs"] for part in study.PARTS]
