"""The picture of a run that another process writes."""

import fcntl
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from scripts.watch import WatchConfig, watch
from tests.commands import printed_on_terminal
from training.report.metrics import MetricsWriter
from training.report.watch import Follower, Watch, sparkline


def row_of(step: int, layers: int = 2, experts: int = 4, **more: Any) -> dict[str, Any]:
    load_E = [2 * step, *[step] * (experts - 1)]
    load = {f"router/load/layer_{layer:02d}": [each / sum(load_E) for each in load_E] for layer in range(layers)}
    return {"step": step, "train/loss": 8.0 / step, "router/max_vio": 0.5} | load | more


def write_rows(directory: Path, rows: list[dict[str, Any]], rest: str = "") -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines + rest)


def locked(directory: Path) -> int:
    """Lock the run in `directory`, as its owner does. Returns the open file, whose end releases the lock."""
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def test_lines_are_read_once_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    follower = Follower(file)
    assert follower.new_lines() == (False, [])
    file.write_bytes(b"1\n2\n3")
    assert follower.new_lines() == (True, [b"1\n", b"2\n"])
    assert follower.new_lines() == (False, [])
    with file.open("ab") as out:
        out.write(b"3\n4\n")
    assert follower.new_lines() == (False, [b"33\n", b"4\n"])
    writer = MetricsWriter(tmp_path / "other.jsonl", None)  # A resumed run replaces the file by a shorter one.
    writer.write({"step": 1})
    writer.close()
    (tmp_path / "other.jsonl").replace(file)
    assert follower.new_lines() == (True, [b'{"step": 1}\n'])


def test_a_run_that_is_written_killed_resumed_and_finished(tmp_path: Path) -> None:
    lock = locked(tmp_path)
    shown = Watch(tmp_path)
    assert (shown.step, shown.status()) == (0, "running, no step yet")
    alarm = {"step": 3, "rule": "dead", "layer": 0, "message": "layer 0: 3 of 4 experts", "first_step": 1}
    (tmp_path / "alarms.jsonl").write_text(json.dumps(alarm) + '\n{"step": 4, "mess')
    write_rows(tmp_path, [row_of(1), row_of(2), row_of(3, **{"train/loss": "NaN"})], 'damaged\n{"step": 4, "trai')
    assert shown.poll() and not shown.poll()
    assert (shown.step, shown.status(), shown.alarms) == (3, "running", ["step 3: layer 0: 3 of 4 experts"])
    assert shown.curves["loss"][:2] == [8.0, 4.0] and shown.curves["held-out"] == []
    assert shown.load_LE == [[0.4, 0.2, 0.2, 0.2]] * 2 and shown.load_step == 3
    os.close(lock)
    shown.poll()
    assert shown.status().startswith("ended without a result")
    (tmp_path / "metrics.jsonl").unlink()
    write_rows(tmp_path, [row_of(1), row_of(2)])
    (tmp_path / "result.json").write_text('{"status": "finished", "step": 2, "eval/loss": 3.5}')
    shown.poll()
    assert (shown.step, shown.curves["loss"], shown.status()) == (2, [8.0, 4.0], "finished: held-out loss 3.5000")


def test_following_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = locked(tmp_path)
    write_rows(tmp_path, [row_of(1)])

    def go_on() -> None:
        time.sleep(0.3)
        write_rows(tmp_path, [row_of(1), row_of(2, **{"eval/loss": 3.25})])
        os.close(lock)

    thread = threading.Thread(target=go_on)
    thread.start()
    watch(WatchConfig(str(tmp_path), every=0.1))
    thread.join()
    text = capsys.readouterr().out
    assert "step 1  running" in text and "step 2  ended without a result" in text
    assert re.search(r"^held-out +\S +3\.25 ", text, re.MULTILINE) and "\x1b" not in text
    assert re.search(r"^layer_01 +1\.60 +0\.80 +0\.80 +0\.80$", text, re.MULTILINE)


@pytest.mark.parametrize(("layers", "experts"), [(3, 8), (40, 128)])
def test_the_picture_fits_into_a_terminal(layers: int, experts: int, tmp_path: Path) -> None:
    long = "layer 3: 5 of 8 experts without a token since step 120; router logits grew from 4 to 100: lower the rate"
    rows = [row_of(step, layers, experts, **{"speed/tokens_per_s": 1e5 * step}) for step in range(1, 60)]
    write_rows(tmp_path, rows)
    (tmp_path / "alarms.jsonl").write_text(json.dumps({"step": 9, "message": long}) + "\n")
    printed = printed_on_terminal(
        f"from pathlib import Path\nfrom training.report.watch import *\nw = Watch(Path({str(tmp_path)!r}))\n"
        "show(picture(w, height=23))\n"
    )
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed).splitlines()]
    assert max(map(len, lines)) <= 80 and len(lines) <= 23
    assert long in " ".join(lines) and "▁" in printed and "█" in printed
    shown = [line for line in lines if line.startswith("layer_")]
    assert len(shown) == layers if layers == 3 else 1 < len(shown) < layers and "more layers" in " ".join(lines)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for directory in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match=r"^run=.*: expected a run's directory with metrics\.jsonl$") as caught:
            watch(WatchConfig(str(directory), once=True))
        assert caught.value.field == "run"
    (tmp_path / "sweep.csv").touch()
    with pytest.raises(ConfigError, match=r"is a sweep: name one of its jobs$"):
        watch(WatchConfig(str(tmp_path), once=True))
    with pytest.raises(ConfigError, match=r"^every=0: expected seconds"):
        WatchConfig("a", every=0)


def test_sparklines() -> None:
    assert sparkline([], 8) == "" and sparkline([5.0], 8) == "▁"
    assert sparkline([1.0, 3.0, 1.0, 3.0, 9.0, 9.0], 3) == "▁▁█"
    assert sparkline([float("nan"), float("inf"), 1.0, 2.0], 4) == "  ▁█"
