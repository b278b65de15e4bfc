"""Predicted against measured figures: the lines and their reasons, the process beside the run, and a whole run."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moe.region import whole_shard
from parallel.planning.hardware import preset_of_device, read_preset
from tests.commands import run_python
from training import forecast as of_run
from training.config import TelemetryConfig
from training.planning import forecast as of_child
from training.planning.forecast import Device, Request, hardware_of, predict
from training.report.forecast import lines, read_forecast, rows, summary
from training.report.page.write import write_report
from training.run import FORECAST_FILE, FORECAST_STEPS

PREDICTED: dict[str, Any] = {
    "peak_bytes": 70e6,
    "memory": {"weights": 10e6, "moments": 20e6, "gradients": 10e6, "experts": 30e6},
    "step_s": 0.4,
    "times": {"matmuls": 0.2, "update": 0.1, "communication (expert)": 0.1},
}
MEASURED: dict[str, Any] = {
    "peak_bytes": 71e6,
    "memory": {"weights": 10e6, "moments": 20e6},
    "step_s": 0.38,
    "times": {"computation": 0.3, "communication and waiting for other ranks": 0.08},
    "rank_load_max": 1.24,
}


def with_measured(**changes: Any) -> dict[str, Any]:
    return PREDICTED | {"measured": MEASURED | changes}


def test_figures_within_10_percent_need_no_reason() -> None:
    assert lines(with_measured()) == {
        "memory": "predicted 70.0 MB, measured 71.0 MB (+1.4 %)",
        "step": "predicted 0.40 s, measured 0.38 s (-5.0 %)",
    }
    assert summary(with_measured()) == {
        "plan/peak_bytes": 70e6,
        "plan/step_s": 0.4,
        "real/peak_bytes": 71e6,
        "real/step_s": 0.38,
    }


def test_a_larger_deviation_names_the_part_and_the_reason() -> None:
    times = {"computation": 0.31, "communication and waiting for other ranks": 0.19}
    said = lines(with_measured(peak_bytes=78e6, step_s=0.5, times=times))
    uneven = "the rank with most tokens at its experts had 1.24 x those of balanced experts"
    assert said["memory"] == (
        "predicted 70.0 MB, measured 78.0 MB (+11 %); most of it: gradients, activations and temporary tensors, "
        f"predicted 40.0 MB, measured 48.0 MB (+20 %); {uneven}"
    )
    assert said["step"] == (
        "predicted 0.40 s, measured 0.50 s (+25 %); most of it: communication and waiting for other ranks, predicted "
        f"0.10 s, measured 0.19 s (+90 %); {uneven}"
    )
    doubled = lines(with_measured(peak_bytes=100e6, memory={"weights": 10e6, "moments": 50e6}))
    assert "most of it: moments, predicted 20.0 MB, measured 50.0 MB" in doubled["memory"]
    times = {"computation": 1.0, "communication and waiting for other ranks": 0.08}
    shared = lines(with_measured(step_s=1.08, rank_load_max=1.0, cpu_s=0.35, times=times) | {"operators": 1000})
    assert shared["step"].endswith(
        "its CPU time is 0.35 s, 50 us more for each of 1,000 operators (the prediction has no time of Python); "
        "other programs used the CPU, which rank 0 had for 35 % of its time"
    )
    on_gpu = lines(with_measured(step_s=0.2, times={}))
    assert on_gpu["step"].endswith("the run does not measure its parts; the largest predicted one: matmuls 0.20 s")


def test_what_is_missing_or_damaged_is_left_out(tmp_path: Path) -> None:
    assert lines({}) == {} and rows({}) == []
    failed = {"error": "RuntimeError: <b>", "measured": MEASURED}
    assert lines(failed)["forecast"] == "none: RuntimeError: <b>"
    assert lines(failed)["step"] == "predicted -, measured 0.38 s"
    assert summary(failed)["plan/step_s"] is None
    hostile = {"peak_bytes": "x", "memory": [1], "step_s": 1.0, "times": {"a": None, "b": 0.5}, "measured": 3}
    assert [row[:3] for row in rows(hostile)][3:] == [
        ("gradients, activations and temporary tensors", "-", "-"),
        ("optimizer step", "1.00 s", "-"),
        ("computation", "0.50 s", "-"),
        ("communication and waiting for other ranks", "-", "-"),
    ]
    (tmp_path / FORECAST_FILE).write_text("[1")
    assert read_forecast(tmp_path) == {}


def test_the_report_has_a_table_of_both(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"status": "finished"}')
    (tmp_path / FORECAST_FILE).write_text(json.dumps(with_measured()))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<td>memory at the peak</td><td>70.0 MB</td><td>71.0 MB</td><td>+1.4 %</td>" in page
    (tmp_path / FORECAST_FILE).unlink()
    assert "Predicted and measured" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_gpu_has_the_preset_of_its_name_or_the_nearest() -> None:
    assert preset_of_device("NVIDIA A100-SXM4-40GB", 8, 42_000_000_000) == ("a100-40", None)
    assert preset_of_device("NVIDIA H100 80GB HBM3", 9, 85_000_000_000) == ("h100", None)
    assert preset_of_device("NVIDIA GeForce RTX 4090", 8, 25_000_000_000) == ("rtx4090", None)
    preset, note = preset_of_device("NVIDIA A40", 8, 47_600_000_000)
    assert read_preset(preset).capability == 8
    assert note == f"no preset for NVIDIA A40; the rates are those of {read_preset(preset).name}"


def test_the_rates_of_a_cpu_are_scaled_by_what_it_has_measured() -> None:
    preset = read_preset("cpu")
    hardware, name, note = hardware_of(Device(matmul=preset.wide_matmul / 2, copy=5e9), narrow=False)
    assert (name, note) == ("cpu", None)
    assert (hardware.wide_matmul, hardware.bandwidth) == (preset.wide_matmul / 2, 5e9)
    assert hardware.grouped_matmul / preset.grouped_matmul == pytest.approx(preset.wide_matmul / 2 / preset.matmul)


def request(directory: Path, config: dict[str, Any]) -> Request:
    device = Device(matmul=1e11, copy=1e10)
    return Request(str(directory), config, (), 2, (0,), "torch.float32", 1.0, None, device)


def test_a_prediction_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(tmp_path, {"run": {"experiment": "x"}, "unknown": 1})
    assert Request.decode(asked.encode()) == asked
    monkeypatch.setattr(os, "nice", lambda increment: 0)
    monkeypatch.setattr(sys, "stdin", io.StringIO(asked.encode()))
    of_child.main()
    [(name, line)] = lines(read_forecast(tmp_path)).items()
    assert name == "forecast" and line.startswith("none: ConfigError: ") and "\n" not in line


def forecast_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *child: str, engine: str = "native"
) -> of_run.Forecast:
    """The forecast of a run whose process is another one."""
    config = SimpleNamespace(
        telemetry=TelemetryConfig(),
        train=SimpleNamespace(steps=FORECAST_STEPS, profile=False),
        engine=SimpleNamespace(kind=engine),
    )
    process: Any = SimpleNamespace(is_main=True, device=torch.device("cpu"), world=SimpleNamespace(rank=0))
    run: Any = SimpleNamespace(config=config, directory=tmp_path)
    monkeypatch.setattr(of_run, "request_of", lambda run, process: None)
    monkeypatch.setattr(of_run, "start", lambda request: subprocess.Popen([sys.executable, "-c", *child]))
    stored: Any = SimpleNamespace(mesh=SimpleNamespace(world=None))
    if engine == "native":  # With DeepSpeed, `tensors` gathers the whole model.
        part: Any = nn.Linear(10, 1, bias=False)  # With adapters, it is not among the saved tensors.
        part.local_shard = whole_shard
        stored.parts, stored.tensors = [part], lambda: {"exp_avg.a": torch.zeros(10, dtype=torch.float64)}
    return of_run.Forecast(run, process, stored, 0)


def test_the_process_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FORECAST_FILE).write_text('{"peak_bytes": 1}')  # of an earlier launch
    with forecast_of(tmp_path, monkeypatch, "import time; time.sleep(600)") as forecast:
        child = forecast._child
        assert child is not None and child.poll() is None
        assert lines(forecast.finish(MEASURED))["forecast"] == "none: not ready when the run ended"
    assert child.poll() is not None
    with pytest.raises(KeyboardInterrupt), forecast_of(tmp_path, monkeypatch, "import time; time.sleep(600)") as other:
        child = other._child
        raise KeyboardInterrupt
    assert child is not None and child.poll() is not None


def test_a_process_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with forecast_of(tmp_path, monkeypatch, "raise SystemExit(3)") as forecast:
        assert forecast._child is not None
        forecast._child.wait()
        assert lines(forecast.finish(MEASURED))["forecast"] == "none: it ended with status 3"
    assert read_forecast(tmp_path)["measured"] == MEASURED


@pytest.mark.parametrize(("engine", "peak"), [("native", 40 + 80 + 4000), ("deepspeed", None)])
def test_one_step_measures_memory_and_the_later_ones_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, peak: int | None
) -> None:
    forecast = forecast_of(tmp_path, monkeypatch, engine=engine)
    for number in range(1, FORECAST_STEPS + 1):
        with forecast.around_step():
            torch.zeros(1000 if number == of_run.MEASURED_STEP else 10**6)
        late = number > of_run.MEASURED_STEP
        seconds, load = (0.5, 3.0) if late else (9.0, 1.0 + number)
        forecast.step(SimpleNamespace(done=number, seconds=seconds, own_seconds=0.3), load)  # type: ignore[arg-type]
    measured = forecast.measure()
    assert measured["peak_bytes"] == peak
    assert measured["memory"] == ({"weights": 40, "moments": 80} if engine == "native" else {})
    assert (measured["step_s"], measured["steps"]) == (0.5, FORECAST_STEPS - of_run.MEASURED_STEP)
    times = {"computation": 0.3, "communication and waiting for other ranks": 0.2}
    assert measured["times"] == pytest.approx(times) and measured["rank_load_max"] == 1.0 + of_run.MEASURED_STEP


@pytest.mark.slow
def test_the_memory_of_a_run_on_two_ranks_is_the_predicted_one(tmp_path: Path) -> None:
    import yaml

    keys = ["model=mixtral_tiny", "launch.nproc=2", "parallel.shard=2", "data.cross_documents=true", "train.steps=10"]
    keys += [
        "train.seq_len=128",
        "train.global_batch=8",
        "train.precision=fp32",
        "train.device=cpu",
        "launch.threads=1",
    ]
    keys += ["run.sample_tokens=0", "tracking=disabled", f"run.root={tmp_path}", f"data.cache={tmp_path / 'cache'}"]
    done = run_python("train.py", *keys, "run.name=a")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    asked = request(tmp_path / "a", yaml.safe_load((tmp_path / "a" / "config.yaml").read_text()))
    process = of_run.start(replace(asked, directory=str(tmp_path)))
    assert process.wait(timeout=240) == 0
    predicted = read_forecast(tmp_path)
    assert result["real/peak_bytes"] == pytest.approx(predicted["peak_bytes"], rel=0.1)
    assert predicted["memory"] == predict(asked)["memory"]
    assert result["real/step_s"] > 0 and "  memory " in done.stdout
