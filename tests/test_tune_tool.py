"""`scripts/tune.py`: what it measures, a candidate that fails, the end of the budget, Ctrl-C, and bad input."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.strict import from_dict
from parallel.planning.hardware import read_preset, with_rates
from scripts import tune as tool
from scripts.cli.command_line import compose_config
from scripts.plan import find_layouts
from training import tuning as measured

SMALL = (
    "model=mixtral_tiny", "model.num_layers=1", "model.vocab_size=512", "train.seq_len=64", "train.global_batch=8",
    "gpus=2", "verify=0", "candidates=3",
)  # fmt: skip
RUN = """
import json, pathlib, sys, time

given = dict(argument.split("=", 1) for argument in sys.argv[1:])
directory = pathlib.Path(given["run.root"]) / given["run.name"]
number = given["run.name"][-1]
assert given["launch.nproc"] == "2" and given["model.vocab_size"] == "512" and given["train.seq_len"] == "64"
print("Traceback of a worker")
if number == "2":
    sys.exit("error: device 0 has no memory left")
if number == "3":
    {last}
directory.mkdir()
(directory / "result.json").write_text(json.dumps({{"real/step_s": 2.0, "real/peak_bytes": 1000}}))
times = {{"computation": 1.5, "communication and waiting for other ranks": 0.5}}
(directory / "forecast.json").write_text(json.dumps({{"measured": {{"times": times}}}}))
"""


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """After Ctrl-C, a tool ignores the signal until its process ends. Here that is the process of the tests."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str, last: str
) -> tuple[Any, str]:
    """Run the tool with a `train.py` that runs nothing. Return its exit status and what it printed."""
    (tmp_path / "train.py").write_text(RUN.format(last=last))
    monkeypatch.setattr(measured, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(sys, "argv", ["tune.py", *SMALL, f"out={tmp_path / 'out'}", *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return ended.value.code, capsys.readouterr().out


def test_a_candidate_that_fails_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = tuned(tmp_path, monkeypatch, capsys, "format=json", last="sys.exit(3)")
    found = json.loads(printed)
    first, second, third = found["rows"]
    assert status == 0 and (first["step_s"], first["peak_bytes"], first["problem"]) == (2.0, 1000, None)
    assert second["step_s"] is None and second["problem"] == "error: device 0 has no memory left"
    assert third["step_s"] is None and third["problem"].startswith("it ended with status 3; ")
    before, after = read_preset("cpu"), with_rates(read_preset("cpu"), Path(found["calibration"]))
    factor = after.matmul / before.matmul
    for field in ("grouped_matmul", "attention_backward", "bandwidth"):
        assert getattr(after, field) == pytest.approx(getattr(before, field) * factor)
    assert after.launch_s == pytest.approx(before.launch_s / factor)
    overrides = [*SMALL, "train.accumulation=" + str(first["accumulation"]), f"calibration={found['calibration']}"]
    raw = compose_config("tune", [*overrides, *(each for each in first["overrides"] if "parallel" in each)])
    (same, *_) = find_layouts(from_dict(tool.TuneConfig, raw).plan)["layouts"]
    # What was measured: the computation takes 1.5 s, and the communication 0.5 s.
    assert same["times"]["matmul"] < 1.5 and same["step_s"] == pytest.approx(2.0, rel=0.05)


def test_the_end_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(measured, "TRAIN", tmp_path / "train.py")
    rows = [measured.Measurement({}), measured.Measurement({})]
    deadline = time.monotonic() + 0.2
    for row in rows:
        measured.measure(row, ["run.name=a"], tmp_path, deadline)
    assert rows[0].problem is not None and rows[0].problem.startswith("time-out: it did not end within the budget")
    assert rows[1].problem == "not measured: the budget is used up"


def test_ctrl_c_prints_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt = "import os, signal; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    status, printed = tuned(tmp_path, monkeypatch, capsys, last=interrupt)
    assert status == 130
    assert "2: error: device 0 has no memory left" in printed and "3: not measured: interrupted" in printed
    assert "winner: layout 1, 2.00 s a step" in printed


@pytest.mark.slow
def test_two_layouts_on_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune.py", *SMALL, "candidates=2", "vocab_size=512", "format=json"])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and [row["problem"] for row in found["rows"]] == [None, None]
    assert all(row["step_s"] > 0 and row["peak_bytes"] > 0 for row in found["rows"])
    assert with_rates(read_preset("cpu"), Path(found["calibration"])).matmul > 0
    assert not list(tmp_path.glob("tune/*/checkpoints/step*"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("budget=0",), "budget=0.0: expected a number of minutes > 0"),
        (("steps=9",), "steps=9: expected an integer >= 10"),
        (("gpus=0",), "gpus=0: expected an integer >= 1"),
        (("gpu=h100", "gpus=99"), "gpu=NVIDIA H100 80GB HBM3 (SXM): expected cpu, because gpus=99"),
        (("out=/dev/null/tune",), "out=/dev/null/tune: expected a directory that can be written"),
        (("train.accumulation=3",), "train.accumulation=3: expected auto, or a divisor"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune.py", *SMALL, *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    assert captured.err.startswith(f"error: {line}") and captured.err.count("\n") == 1
