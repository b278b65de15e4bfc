"""`scripts/plan.py`: what it prints for training and for generation, and the line for what is not possible."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import plan as tool
from training.report.plan_picture import memory_bars, plot_plan

SMALL = (
    "model=mixtral_tiny", "model.num_layers=1", "model.vocab_size=512", "train.seq_len=64", "train.global_batch=8",
    "gpus=4",
)  # fmt: skip


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Run the tool, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return ended.value.code


def test_the_best_layout_is_traced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("parallel.tensor=2", "parallel.pipeline=1", "parallel.context=1", "top=3", "format=json", "skew=zipf")
    assert called(monkeypatch, *SMALL, *given, "tokens=1e9", "gpu.price=2") == 0
    found = json.loads(capsys.readouterr().out)
    best, *others = found["layouts"]
    assert [row["verified"] for row in found["layouts"]] == [True] + [False] * len(others)
    assert all(row["axes"]["tensor"] == 2 for row in found["layouts"])
    (traced, *_) = best["traced"]
    assert best["peak_bytes"] == max(row["peak_bytes"] for row in best["traced"]) == sum(traced["parts"].values())
    times = best["times"]
    parts = sum(value for name, value in times.items() if name != "exposed") + sum(times["exposed"].values())
    assert parts == pytest.approx(best["step_s"]) and times["straggler"] > 0
    assert best["tokens_per_s"] == pytest.approx(8 * 64 / best["step_s"])
    assert best["gpu_hours"] == pytest.approx(4 * 1e9 / best["tokens_per_s"] / 3600)
    assert best["usd"] == pytest.approx(2 * best["gpu_hours"])
    assert [row["step_s"] for row in others] == sorted(row["step_s"] for row in others)


def test_adapters_have_no_gradients_and_moments_of_the_base(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("top=1", "format=json", "adapter=lora", "adapter.rank=4", "gpus=1", "train.precision=fp32")
    assert called(monkeypatch, *SMALL, *given) == 0
    (best,) = json.loads(capsys.readouterr().out)["layouts"]
    (stage,) = best["stages"]
    adapters = 4 * (2 * (64 + 64) + 2 * (64 + 32))
    assert (stage["gradients"], stage["moments"]) == (4 * adapters, 8 * adapters)
    parts = best["traced"][0]["parts"]
    assert best["verified"] and parts["moments"] == pytest.approx(8 * adapters, abs=200), parts


def test_quantised_weights_need_adapters(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, *SMALL, "quantize=nf4") == 2
    assert "quantize.kind=nf4: expected null, or adapters" in capsys.readouterr().err


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "model=mixtral_8x7b", "gpus=64", "verify=0", "train.accumulation=8", "top=2") == 0
    printed = capsys.readouterr().out
    assert "sbatch --nodes 8 --gpus-per-node 8 scripts/slurm.sbatch model=mixtral_8x7b parallel.pipeline=" in printed
    assert "NODES=8" in printed and "limit: matmuls" in printed and "train.accumulation=8" in printed


def test_memory_to_serve_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("model=mixtral_8x7b", "gpus=2", "gpu=rtx4090", "task=generate", "format=json")
    assert called(monkeypatch, *given) == 0
    found = json.loads(capsys.readouterr().out)
    experts = 8 * 3 * 4096 * 14336 * 32
    router = 32 * 8 * 4096
    assert found["memory"]["experts"] == experts * 2 // 2  # bf16, on two devices
    assert found["memory"]["other weights"] == 2 * (46_702_792_704 - experts - router) + 4 * router
    assert found["memory"]["key/value cache"] == 32768 * 32 * 2 * 8 * 128 * 2
    assert not found["fits"] and found["fewest_gpus"] == 8


@pytest.mark.parametrize(
    ("model", "device", "bf16_on"),
    [
        ("mixtral_8x7b", ("gpus=2", "gpu=rtx4090", "context=32768"), 8),
        ("mistral_7b", ("gpus=1", "gpu=rtx4090", "gpu.memory=16e9", "context=8192"), None),
    ],
)
def test_weights_in_4_bits_fit_the_devices_of_the_course(
    model: str, device: tuple[str, ...], bf16_on: int | None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    given = (f"model={model}", "task=generate", "format=json", *device)
    found = {}
    for quantize in ("none", "nf4"):
        assert called(monkeypatch, *given, f"quantize={quantize}") == 0
        found[quantize] = json.loads(capsys.readouterr().out)
    assert not found["none"]["fits"] and found["none"]["fewest_gpus"] == bf16_on
    assert found["nf4"]["fits"]
    assert found["nf4"]["memory"]["a dequantised matrix"] == 4096 * 14336 * (2 + 4 / 64)
    assert found["nf4"]["memory"]["key/value cache"] == found["none"]["memory"]["key/value cache"]
    if model == "mixtral_8x7b":
        # 4.127 bits of each number of the experts on a device.
        assert found["nf4"]["memory"]["experts"] == pytest.approx(45_097_156_608 / 2 * 4.127 / 8, rel=1e-4)


def test_shorter_rows_are_advised_only_where_they_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.context=1", "parallel.expert=8", "verify=0")
    batch = ("train.global_batch=8", "train.accumulation=1", "recompute=none")
    for gpu, advised in (("a100-80", False), ("b200", True)):
        given = ("gpus=8", f"gpu={gpu}", "train.seq_len=131072", *fixed, *batch)
        assert called(monkeypatch, "model=mixtral_8x7b", *given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: gpus=8: expected enough memory for the model; the smallest layout (")
        assert ("train.seq_len=65536" in line) == advised


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.svg"
    given = (
        "parallel.pipeline=4",
        "parallel.tensor=1",
        "parallel.context=1",
        "parallel.schedule=zero_bubble",
        "gpus=64",
        "train.accumulation=32",
        "train.global_batch=512",
    )
    options = ("verify=0", "top=1", "skew=zipf", "format=json")
    assert called(monkeypatch, "model=mixtral_8x7b", *given, *options, f"picture={path}") == 0
    found = json.loads(capsys.readouterr().out)
    best = found["layouts"][0]
    assert [sum(bar.values()) for bar in memory_bars(best).values()] == [stage["device"] for stage in best["stages"]]
    assert [each.name for each in tmp_path.iterdir()] == ["plan.svg"]
    comments = re.findall(r"<!-- (.*?) -->", path.read_text())
    assert {"stage 0 (formulas)", "gradients of weights", "exchange of tokens (all-to-all)"} <= set(comments)
    assert any("16 of 32 micro-batches" in comment for comment in comments)
    traced = best | {"axes": best["axes"] | {"pipeline": 1}, "schedule": "1f1b"}
    plot_plan(found | {"layouts": [traced]}, path)  # replaces the file
    assert "each rank" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("gpus=0",), "gpus=0: expected an integer >= 1"),
        (("gpu=h1000",), "gpu=h1000"),
        (("gpu.memory=-1",), "gpu.memory=-1"),
        ((*SMALL, "parallel.tensor=3"), "parallel.tensor=3: expected axes whose product"),
        ((*SMALL, "train.accumulation=3"), "train.accumulation=3: expected auto, or a divisor"),
        ((*SMALL, "skew=zipf:x"), "skew=zipf:x: expected a number >= 0 after zipf:"),
        ((*SMALL, "skew=nowhere"), "skew=nowhere: expected a run with a readable metrics.jsonl"),
        ((*SMALL, "picture=a.gif"), "picture=a.gif: expected the name of a .png or .svg file"),
        (
            (*SMALL, "picture=nowhere/a.png"),
            "picture=nowhere/a.png: expected a file that can be written (nowhere is",
        ),
        ((*SMALL, "recompute=full", "parallel.recompute=selective"), "recompute=full: expected auto or selective"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: {line}") and captured.err.count("\n") == 1
