"""The output of a run: the numbers are there, in plain text, and the plots are reproducible."""

import csv
import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest

from moe.config import FEED_FORWARDS, FeedForwardSpec, ModelConfig
from tests.commands import printed_on_terminal
from training.config import OptimConfig
from training.report.heatmap import relative_load, show_load
from training.report.plots import plot_curves, plot_load, plot_overview
from training.report.run_report import evaluation_row, rate_of_resumption, show_finished
from training.report.sweep import sweep_table
from training.report.tables import (
    RankSummary,
    show_corpus,
    show_end,
    show_evaluation,
    show_layout,
    show_model,
    show_sample,
)
from training.report.terminal import Progress, human_bytes, human_count, human_time, printable
from training.step import Evaluation, TextSums

Capture = pytest.CaptureFixture[str]

MOE_ROW = {
    "train/loss": 3.25,
    "train/ce": 3.2,
    "router/balance_loss": 1.05,
    "router/max_vio": 0.5,
    "router/drop_rate": 0.021,
    "optim/lr": 3e-4,
    "optim/grad_norm": 1.5,
    "speed/tokens_per_s": 12_345.0,
}


def plain(capsys: Capture) -> str:
    """What was printed. Fails if it has control characters or blanks at line ends, which a log file must not have."""
    text = capsys.readouterr().out
    assert all(character == "\n" or character.isprintable() for character in text)
    assert all(line == line.rstrip() for line in text.split("\n"))
    return text


def row_of(text: str, first: str) -> str:
    """The line whose first word is `first`, with single spaces between its words."""
    return next(" ".join(line.split()) for line in text.splitlines() if line.split()[:1] == [first])


def summary_of(rank: int, experts: list[int]) -> RankSummary:
    return RankSummary(rank, f"host{rank // 8}", "cpu", experts, range(4), 6_000_000 + rank, 24_000_000, 4_000_000)


def test_human_numbers() -> None:
    counts = {0: "0", 999: "999", 1500: "1.50 k", 999_950: "1.00 M", 46_700_000_000: "46.7 B", 140_630_071_296: "141 B"}
    assert {count: human_count(count) for count in counts} == counts
    assert human_count(math.nan) == "nan"
    assert [human_bytes(size) for size in (512, 21_700_000)] == ["512 B", "21.7 MB"]
    times = {0.42: "0.42 s", 59.99: "1 min 00 s", 192: "3 min 12 s", 3720: "1 h 02 min", 86_399: "1 d 00 h"}
    assert {seconds: human_time(seconds) for seconds in times} == times


def test_corpus_and_model(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    row = {"documents": 1200, "bytes": 9_100_000, "tokens": 2_500_000, "sha256": "ab" * 32, "heldout_bytes": 90_000}
    baselines = {"gzip_bits_per_byte": 2.125, "unigram_bits_per_byte": 4.75}
    unknown = {"domain": "single", "heldout_bytes": 0, "gzip_bits_per_byte": None, "unigram_bits_per_byte": None}
    summary = [*({"domain": d} | row | baselines for d in ("code", "prose")), row | unknown]
    show_corpus(summary, "feed" * 8, Path("/cache/feed"))
    model = ModelConfig(64, 4, 4, 2, 16, 128, num_experts=8, top_k=2, sliding_window=256)
    sizes = {"total_params": 12_345_678, "active_params": 5_432_100, "vocab_size": 8192}
    show_model(model, **sizes, tokenizer="BPE", precision="bf16", device="cpu")
    dense = ModelConfig(64, 4, 4, 2, 16, 128)
    show_model(dense, **sizes, tokenizer="BPE", precision="bf16", device="cpu")
    text = plain(capsys)
    assert row_of(text, "prose") == "prose 1,200 9.10 MB 2.50 M 90.0 kB 2.125 4.750 abababab"
    assert row_of(text, "single") == "single 1,200 9.10 MB 2.50 M 0 B - - abababab"
    assert row_of(text, "all") == "all 3,600 27.3 MB 7.50 M 180 kB"
    for part in ("12.3 M total (12,345,678), 5.43 M active", "8 SwiGLU experts", "top-2", "window of 256", "8,192 ids"):
        assert part in text
    assert "dense SwiGLU, hidden 128" in text and "all earlier tokens" in text


def test_a_feed_forward_kind_of_a_plugin_has_a_label(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: FEED_FORWARDS[name] for name in FEED_FORWARDS} | {"squared": FeedForwardSpec(False, "squared ReLU")}
    monkeypatch.setattr(FEED_FORWARDS, "_entries", kinds)
    model = ModelConfig(64, 4, 4, 2, 16, 128, num_experts=8, top_k=2, ffn="squared", moe_every=2)
    sizes = {"total_params": 12_345_678, "active_params": 5_432_100, "vocab_size": 8192}
    show_model(model, **sizes, tokenizer="BPE", precision="bf16", device="cpu")
    text = plain(capsys)
    assert "8 squared ReLU experts" in text and "the others dense squared ReLU, hidden 128" in text


def test_layout(capsys: Capture) -> None:
    assert summary_of(0, [0, 1, 2, 5, 7, 8]).expert_ranges() == "0-2,5,7-8"
    assert summary_of(0, []).expert_ranges() == "none"
    assert json.loads(json.dumps(summary_of(1, [4, 5]).as_dict()))["experts"] == [4, 5]
    show_layout([summary_of(0, [0, 1]), summary_of(1, [2, 3])], "")
    assert row_of(plain(capsys), "1") == "1 host0 cpu 0-3 2-3 6,000,001 4,000,000 24.0 MB"
    show_layout([summary_of(rank, [2 * rank, 2 * rank + 1]) for rank in range(64)], "")
    text = plain(capsys)
    assert len(text.splitlines()) == 6
    assert "Layout: 64 ranks" in text and "8 hosts in all" in text and "6,000,001 to 6,000,062" in text
    assert row_of(text, "63").split()[4] == "126-127"


def test_progress_lines_and_eta(capsys: Capture) -> None:
    seconds = iter([30.0, 32.0, 34.0])  # The first step is slow, and does not count.
    with Progress(110, start_step=100, clock=lambda: next(seconds)) as progress:
        assert progress.eta() is None
        progress.update(MOE_ROW, 101)
        progress.update(MOE_ROW, 102, log=False)
        progress.print("saved [bold]here[/bold]")
        progress.update({"train/loss": math.nan, "train/ce": math.nan, "optim/lr": 1e-4, "router/max_vio": None}, 103)
        assert progress.eta() == 14.0
    *legend, first, saved, dense = plain(capsys).splitlines()
    assert "MaxVio: 0 = balanced, 1 = the fullest expert gets twice its share" in " ".join(legend)
    assert "balance loss, 1 = balanced" in " ".join(legend) and len(legend) < 4 and max(map(len, legend)) <= 120
    for part in ("step 101/110", "3.2500", "1.0500", "0.500", "2.1%", "3.00e-04", "12.3 k tokens/s"):
        assert part in first
    assert saved == "saved [bold]here[/bold]"
    assert "loss     nan" in dense and "MaxVio" not in dense and "dropped" not in dense
    assert "ETA" not in first and dense.endswith("ETA 14.0 s")


def test_terminal_gets_a_bar_and_colours() -> None:
    """A process under a pseudo-terminal prints escape codes, which the other tests see nowhere else."""
    text = printed_on_terminal(
        "from training.report.heatmap import show_load\n"
        "from training.report.terminal import Progress\nfrom training.report.tables import show_evaluation\n"
        f"with Progress(2) as p:\n    p.update({MOE_ROW!r}, 1)\n    p.print('a line above')\n"
        "    show_evaluation({'code': 1.5}, 3.0, {'code': (2.0, 4.5)})\n    p.update({}, 2)\n"
        "show_load([[1.0, 3.0]], {})\nshow_load([[1.0] * 300], {})\n"
    )
    assert "\x1b[" in text and "step 1/2" in text and "step 2/2" in text and "a line above" in text
    assert (
        "below gzip -9" in text
        and "yes" in text
        and "1.50" in text
        and "a cell is the least balanced of 5 experts" in text
    )


def test_eighty_columns_break_no_word_and_keep_a_history() -> None:
    columns = ["job", "optim.lr", "router.balance_coef", "router.capacity_factor", "train.accumulation", "status"]
    cells = [["0", "0.0003", "0.01", "1.25", "4.97 MB", "finished"], ["12", "0.001", "0.1", "2", "16 kB", "failed"]]
    long = "layer 3: 5 of 8 experts without a token since step 120; router logits grew from 4 to 100: lower the rate"
    printed = printed_on_terminal(
        "from training.report.terminal import Progress, show_fields, show_line, show_table\n"
        f"row, table = {MOE_ROW!r}, ({columns!r}, {cells!r})\n"
        "with Progress(400) as p:\n"
        "    for step in range(1, 401):\n"
        "        evaluation = {'eval/loss': 3.0} if step == 203 else {}\n"
        "        p.update(row | evaluation, step, log=step % 5 == 0 or bool(evaluation))\n"
        f"    p.print({long!r})\n"
        f"show_line({long!r})\nshow_table({long!r}, *table, left=['status'])\n"
        f"show_fields('Fields', {{'a': {long!r}, 'command': 'python ' + 'x' * 79}}, commands=['command'])\n"
    )
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed).replace("\r", "\n")
    lines = [line.rstrip() for line in text.split("\n")]
    assert max(len(line) for line in lines if "python" not in line) <= 80
    words = " ".join(lines).split()
    for word in [*columns, *(word for row in cells for cell in row for word in cell.split()), *long.split()]:
        assert word in words, word
    assert " ".join(words).count(long) == 4 and f"python {'x' * 79}" in "".join(lines)
    assert any("4.97 MB" in line for line in lines)
    history = [line for line in lines if line.startswith("step ") and "loss" in line]
    steps = [*range(5, 203, 20), 203, *range(225, 400, 20), 400]
    assert [line.split()[1] for line in history] == [f"{step}/400" for step in steps]
    assert all("ce  3.2000" in line and "balance 1.0500" in line for line in history)


def test_the_eta_is_smooth() -> None:
    now = 0.0
    with Progress(1000, clock=lambda: now) as progress:
        shown = []
        for step in range(1, 501):
            now += 60.0 if step < 3 else 21.0 if step % 100 == 0 else 1.0  # start, evaluations, steps
            progress.update(MOE_ROW, step, log=False)
            shown.append(progress.eta())
        assert shown[:2] == [None, None] and shown[2] == 997.0
        # The time that is left is 500 steps and 5 evaluations: 600 s. No value jumps by more than a fifth.
        assert progress.eta() == pytest.approx(600, rel=0.02)
        late = [eta for eta in shown[150:] if eta is not None]
        assert max(abs(after / before - 1) for before, after in itertools.pairwise(late)) < 0.2
        progress.go_back(400)
        now += 1000.0  # a checkpoint is loaded
        progress.update(MOE_ROW, 401, log=False)
        assert progress.eta() == pytest.approx(719, rel=0.02)


def test_evaluation(capsys: Capture) -> None:
    bits = {"code": 1.9, "prose": 2.4, "other": 2.0, "broken": math.nan}
    show_evaluation(bits, 3.21, {"code": (2.1, 4.6), "prose": (2.3, 4.5), "broken": (2.0, 4.0)})
    text = plain(capsys)
    assert row_of(text, "domain") == "domain model gzip -9 byte unigram below gzip -9"
    assert row_of(text, "code") == "code 1.900 2.100 4.600 yes"
    assert row_of(text, "prose") == "prose 2.400 2.300 4.500 no"
    assert row_of(text, "other") == "other 2.000 - - -"
    assert row_of(text, "broken") == "broken nan 2.000 4.000 no"
    assert "loss 3.2100" in text and "only the held-out text itself" in text


def test_figures_that_do_not_exist_are_absent(capsys: Capture, tmp_path: Path) -> None:
    assert evaluation_row(Evaluation({"a": TextSums(3.0, 2, 4)}, None)) == {
        "eval/loss": 1.5,
        "eval/bits_per_byte/a": 3.0 / math.log(2) / 4,
    }
    assert evaluation_row(Evaluation({"a": TextSums(0.0, 0, 0)}, None)) == {}
    show_evaluation({}, None, {})
    show_finished(tmp_path, {"step": 3, "eval/loss": None})
    text = plain(capsys)
    assert "loss - nats per token" in text and "finished at step 3 (held-out loss -)" in text


def test_load_in_numbers(capsys: Capture) -> None:
    assert relative_load([[3, 1], [0, 0]]) == [[1.5, 0.5], [0.0, 0.0]]
    show_load([[0.25, 0.75]], {"code": [[0.5, 0.5]], "prose": [[0.0, 1.0]], "silent": [[0.0, 0.0]]})
    text = plain(capsys)
    assert row_of(text, "layer_00") == "layer_00 0.50 1.50"
    assert row_of(text, "code") == "code 25.0% 0/0 1.00 0/1 1.00"
    assert row_of(text, "prose") == "prose 25.0% 0/1 2.00 0/0 0.00"
    assert "silent" not in text
    show_load([[7.0]], {})
    assert row_of(plain(capsys), "layer_00") == "layer_00 1.00"


def test_load_of_many_experts_is_wrapped_then_grouped(capsys: Capture) -> None:
    show_load([[1.0] * 63 + [2.0] for _ in range(3)], {})
    lines = plain(capsys).splitlines()
    assert len(lines) == 2 + 4 * (1 + 3) and max(map(len, lines)) <= 120
    assert lines[-1].split()[-1] == f"{128 / 65:.2f}"
    show_load([[1.0] * 255 + [3.0]], {})
    lines = plain(capsys).splitlines()
    assert len(lines) == 3 + 4 * 2
    assert lines[-1].split()[-1] == f"{3 * 256 / 258:.2f}"


def test_sample_and_end(capsys: Capture) -> None:
    show_sample("The ", "end\x1b[31m [red]\nof\x00 é", "generation is dropless")
    long = "runs/" + "x" * 300
    show_end(
        Path("runs/a"),
        Path(long),
        "python train.py run.name=a",
        "as before",
        "ls runs/a",
        None,
        321.0,
        12_345.0,
        {"goodput": "90 %", "memory": "predicted 1 MB, measured 2 MB"},
    )
    text = plain(capsys)
    assert "brackets)\ngeneration is dropless\n  [The ]end\\x1b[31m [red]\n  of\\x00 é\n" in text
    assert "Done in 5 min 21 s, 12.3 k tokens/s" in text and f"checkpoint  {long}\n" in text
    assert "(as before; docs/runs.md" in text and "  memory      predicted 1 MB" in text


@pytest.mark.parametrize(
    ("start", "length", "text"),
    [
        (0, 10, "with the constant learning rate 1.00e-04"),
        (0, 40, "with the learning rate of the schedule, which ends at step 40"),
        (6, 8, "with the learning rate of the schedule, which ends at step 14"),
        (4, 6, "with the constant learning rate 1.00e-04"),
    ],
)
def test_a_resumed_run_is_told_its_learning_rate(start: int, length: int, text: str) -> None:
    optim = OptimConfig(lr=1e-3, schedule_start=start, schedule_steps=length)
    assert rate_of_resumption(optim, done=10) == text


def test_text_that_stdout_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "ascii").open("w", encoding="ascii") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert printable("é\ud800a\n") == "\\xe9\\ud800a\n"


@pytest.mark.slow
def test_plots_are_reproducible(tmp_path: Path) -> None:
    loads = {
        "one": ([[5.0]], {}),
        "few": ([[1.0, 0.0, 2.0]], {"code": [[1.0, 1.0, 1.0]], "silent": [[0.0, 0.0, 0.0]]}),
        "many": ([[1.0] * 63 + [9.0]] * 3, {str(i): [[1.0] * 64] * 3 for i in range(5)}),
        # A name is no formula, and can have characters that the font lacks.
        "domains": ([[1.0, 2.0]], {"$x^ 日本": [[3.0, 1.0]]}),
    }
    with warnings.catch_warnings(action="error"):
        for name, (load_LE, domains) in loads.items():
            plot_load(load_LE, domains, tmp_path / name)
    # A dense model has no router metrics. One loss is NaN, and one row has an evaluation and no training metrics.
    rows = [{"step": 1, "train/loss": math.nan, "train/ce": 3.0, "optim/lr": 1e-3}, {"step": 1, "eval/loss": 3.1}]
    plot_curves(rows, tmp_path / "dense")
    plot_curves([MOE_ROW | {"step": s, "router/max_vio/layer_00": 0.4} for s in (1, 2, 3)], tmp_path / "moe")
    overviews = {"overview_dense": rows, "overview_moe": overview_rows(range(1, 30, 7), layers=12), "overview_none": []}
    for name, overview in overviews.items():
        plot_overview(overview, tmp_path / name)
    for name in (*loads, "dense", "moe", *overviews):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    first, overview_first = (tmp_path / "few.svg").read_bytes(), (tmp_path / "overview_moe.svg").read_bytes()
    plot_load(*loads["few"], tmp_path / "few")
    plot_overview(overviews["overview_moe"], tmp_path / "overview_moe")
    assert (tmp_path / "few.svg").read_bytes() == first
    assert (tmp_path / "overview_moe.svg").read_bytes() == overview_first
    assert b"<dc:date>" not in first + overview_first


def test_only_the_largest_domains_of_many_are_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.report.plots.MAX_DOMAINS", 2)
    plot_load([[1.0, 2.0]], {f"domain {i}": [[float(i), 1.0]] for i in range(4)}, tmp_path / "load")
    text = (tmp_path / "load.svg").read_text()
    assert [f"domain {i}" in text for i in range(4)] == [False, False, True, True]


def overview_rows(steps: range, layers: int) -> list[Mapping[str, object]]:
    """Rows of a run with 4 experts, one of which gets no token; the last layer has no assignment in the first step."""
    rows = []
    for step in steps:
        shares = {f"router/load/layer_{layer:02d}": [0.5, 0.3, 0.2, 0.0] for layer in range(layers)}
        if step == steps[0]:
            shares[f"router/load/layer_{layers - 1:02d}"] = [math.nan] * 4
        rows.append({"step": step, "train/ce": 3.0 / step, **shares})
    return [*rows, {"step": steps[-1] + 1, "eval/loss": 3.1}]


@pytest.mark.parametrize(("layers", "shown"), [(1, [0]), (4, [0, 1, 2, 3]), (12, [0, 2, 4, 7, 9, 11])])
def test_overview_shows_loss_and_load(tmp_path: Path, layers: int, shown: list[int]) -> None:
    plot_overview(overview_rows(range(1, 30, 7), layers), tmp_path / "overview")
    svg = (tmp_path / "overview.svg").read_text()
    assert [int(layer) for layer in re.findall(r"<!-- layer (\d+) -->", svg)] == shown
    for label in (
        "optimizer step",
        "cross-entropy (nats per token)",
        "expert, by MoE layer",
        "training",
        "held-out text",
    ):
        assert f"<!-- {label} -->" in svg
    plot_overview([{"step": 1, "train/ce": 3.0}], tmp_path / "dense")
    dense = (tmp_path / "dense.svg").read_text()
    assert "<!-- cross-entropy (nats per token) -->" in dense and "expert" not in dense


def write_job(sweep: Path, job: int, experts: int | None, lr: float, result: Mapping[str, object] | None) -> None:
    directory = sweep / str(job)
    directory.mkdir()
    model = f"model: {{num_experts: {experts or 'null'}, top_k: {2 if experts else 'null'}}}"
    # A run writes the sizes that it chose for the parallel axes; a job that failed still has `auto`.
    parallel = f"parallel: {{tensor: {1 if result and result['status'] == 'finished' else 'auto'}}}"
    optim = f"optim: {{lr: {lr}, eps: 0.1}}"
    (directory / "config.yaml").write_text(f"run: {{name: s/{job}}}\n{model}\n{optim}\n{parallel}\n")
    if result is not None:
        (directory / "result.json").write_text(json.dumps(result))


def test_sweep(tmp_path: Path, capsys: Capture) -> None:
    finished = {"status": "finished", "error": None, "name": "s", "step": 30, "wall_s": 20.0, "router/max_vio": 0.3}
    finished |= {"total_params": 4_600_000, "active_params": 2_800_000, "speed/tokens_per_s": 9000.0, "eval/loss": 3.5}
    write_job(tmp_path, 0, 4, 0.001, finished | {"num_experts": 4, "top_k": 2})
    write_job(tmp_path, 1, None, 0.002, finished | {"num_experts": None, "top_k": None, "eval/loss": math.nan})
    write_job(tmp_path, 2, 8, 0.002, {"status": "failed", "error": "model.top_k=9: expected less\nTraceback"})
    write_job(tmp_path, 4, 8, 0.002, None)
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "result.json").write_text("{")
    rows = sweep_table(tmp_path)
    text = plain(capsys)
    assert "2 of 6 jobs finished" in text
    assert row_of(text, "0") == "0 0.001 4 2 4.60 M 2.80 M 3.5000 0.300 9.00 k finished"
    assert row_of(text, "1") == "1 0.002 dense - 4.60 M 2.80 M nan 0.300 9.00 k finished"
    assert row_of(text, "2") == "2 0.002 8 2 - - - - - failed"
    assert "job 2 failed: model.top_k=9: expected less\n" in text and "Traceback" not in text
    assert [row["status"] for row in rows] == ["finished", "finished", "failed", "missing", "missing", "unreadable"]
    with (tmp_path / "sweep.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["job"] for row in table] == list("012345")
    assert table[0]["optim.lr"] == "0.001" and table[0]["eval/loss"] == "3.5" and "optim.eps" not in table[0]
    assert table[2]["error"] == "model.top_k=9: expected less\nTraceback" and table[2]["eval/loss"] == ""
    assert (tmp_path / "sweep.png").exists() and (tmp_path / "sweep.svg").exists()

    (tmp_path / "empty").mkdir()
    assert sweep_table(tmp_path / "empty") == []
