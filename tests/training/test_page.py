"""The report of a run as an HTML file: what is in it for whole, damaged, dense and hostile runs."""

import base64
import json
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from scripts import report as tool
from training.report.alarms import Alarm
from training.report.page import heldout, paper
from training.report.page.curves import reduced
from training.report.page.gather import expert_frames, load_frames, read_run
from training.report.page.heldout import packed
from training.report.page.write import run_page, write_figures, write_report, write_report_or_say_why
from training.report.plots import thinned
from training.report.probe import ProbeRouting, ProbeTokens, write_routing, write_tokens


def write_run(directory: Path, *, steps: int = 12, layers: int = 2, experts: int = 4, **result: Any) -> Path:
    """A run whose expert 0 gets more with each step, and whose last expert gets nothing."""
    directory.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step, "train/loss": 5.0 - step / 10, "train/ce": 4.9 - step / 10}
        for layer in range(layers):
            share = 0.25 + step / (2 * steps)
            rest = (1 - share) / (experts - 2)
            row[f"router/load/layer_{layer:02d}"] = [share, *[rest] * (experts - 2), 0.0]
            row[f"router/max_vio/layer_{layer:02d}"] = share * experts - 1
        rows.append(row | {"router/max_vio": 0.5, "mine/extra": step * 2})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"name": "r", "prompt": "The "},
        "model": {"num_experts": experts, "top_k": 2, "num_layers": layers},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    whole = {"status": "finished", "name": "r", "step": steps, "eval/loss": 3.5, "total_params": 1000, **result}
    (directory / "result.json").write_text(json.dumps(whole))
    return directory


def write_probe(run: Path, steps: tuple[int, ...] = (0, 4, 12), **changes: Any) -> None:
    """Eight tokens of two domains in two excerpts. At the last step, token 0 moves from expert 1 to 3 in layer 1."""
    pieces = (" the", "<i>", "\n", " the", "1", "+", "1", " the")
    ids, half = np.array([5, 6, 7, 5, 8, 9, 8, 5], np.int32), np.repeat(np.arange(2, dtype=np.int32), 4)
    tokens = ProbeTokens(("prose", "</b>"), ids, half, half, half, pieces)
    (run / "probe").mkdir()
    write_tokens(run / "probe" / "tokens.safetensors", tokens)
    for step in steps:
        experts = np.array([[[0, 1]] * 4 + [[2, 3]] * 4] * 2, np.int32)
        experts[1, 0, 1] = 3 if step == max(steps) else 1
        weights = np.broadcast_to(np.float32([0.75, 0.25]), experts.shape)
        routing = ProbeRouting(experts, weights, np.full((2, 8), 0.125, np.float32), 4)
        write_routing(run / "probe" / f"step-{step}.safetensors", routing, changes.get("digest") or tokens.digest())


def unpacked(array: dict[str, Any]) -> np.ndarray:
    """The numbers that `packed` has packed."""
    codes = np.frombuffer(base64.b64decode(array["data"]), "u1" if array["bits"] == 8 else "<u2")
    return np.where(codes == array["missing"], np.nan, codes * array["scale"]).reshape(array["shape"])


def alarm_line(step: int, message: str, layer: int | None = None, *, ended: bool = False) -> str:
    """A line of `alarms.jsonl`."""
    alarm = Alarm(step=step, rule="dead", layer=layer, message=message, first_step=step, ended=ended)
    return json.dumps(asdict(alarm)) + "\n"


def script_of(page: str) -> dict[str, Any]:
    """The JSON that the script of a page reads."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_the_page_has_every_metric_and_every_step_of_the_loads(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure

    page = write_report(write_run(tmp_path / "r")).read_text(encoding="utf-8")
    script = script_of(page)
    assert {"curve-loss", "curve-max_vio", "curve-other-0", "load", "history", "straggler"} <= script["figures"].keys()
    assert "metrics.jsonl has no norms of experts" in page
    drawn = [trace["name"] for trace in script["figures"]["curve-loss"]["data"]]
    assert drawn == ["+ auxiliary", "training"], "the main curve is above the one that is almost equal to it"
    assert script["figures"]["curve-other-0"]["data"][0]["y"] == [step * 2 for step in range(1, 13)]
    assert script["router"]["steps"] == list(range(1, 13))
    last = script["router"]["values"][-1]
    assert last == [[3.0, 0.5, 0.5, 0.0]] * 2, "shares of 0.75, 0.125, 0.125 and 0 of 4 experts"
    for figure in script["figures"].values():
        Figure(figure)  # plotly refuses properties that it does not have
    assert "held-out loss" in page and "3.5000" in page


def test_text_of_a_run_is_text(tmp_path: Path) -> None:
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = write_run(tmp_path / "r", sample=attack, name=attack, torch=attack)
    (run / "alarms.jsonl").write_text(alarm_line(3, attack) + '{"step": 4, "mess')
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, attack: 1.0, f"eval/bits_per_byte/{attack}": 2.0}) + "\n")
    page = run_page(read_run(run))
    # The page has three script elements, and no other element comes from the run.
    assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == 3 and "<img" not in page
    titles = [figure["layout"]["title"]["text"] for figure in script_of(page)["figures"].values()]
    assert any("&lt;img" in title for title in titles) and not any("<" in title for title in titles)


def test_the_state_of_a_run_that_failed_or_goes_on_after_its_result(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", status="failed", error="the disk is full\nTraceback")
    assert read_run(run).notes == ["The run has failed: the disk is full Traceback"]
    (run / "result.json").write_text('{"status": "finished", "step": 10}')
    data = read_run(run, reason="The run was ended by SIGTERM.")
    assert data.notes == ["The run was ended by SIGTERM. result.json is that of step 10."]
    assert data.status == "not finished" and "12 of ?" in run_page(data)


@pytest.mark.parametrize("lost", ["metrics.jsonl", "result.json", "config.yaml"])
def test_a_run_without_one_of_its_files_has_a_report_that_says_so(lost: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    (run / lost).unlink()
    data = read_run(run)
    assert any(lost in note for note in data.notes)
    assert all(note in run_page(data) for note in data.notes)


def test_damaged_rows_are_left_out_and_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:40]
    short, text = json.loads(lines[5]), json.loads(lines[6])
    short["router/load/layer_01"] = [1.0]
    text["router/load/layer_00"] = "all"
    lines[5:7] = [json.dumps(short), json.dumps(text)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 13, "train/lo')
    data = read_run(run)
    assert data.notes == ["Damaged lines of metrics.jsonl are left out: 4."]
    loads = load_frames(data.rows)
    assert loads is not None and loads.steps == [1, 2, 3, 5, 8, 9, 10, 11, 12]
    run_page(data)
    (run / "metrics.jsonl").write_text("nothing\n")
    (run / "result.json").write_text("[]")
    (run / "config.yaml").write_text("a: [")
    run_page(read_run(run))


def test_a_dense_run_has_curves_and_no_router(tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/ce": 2.0}\n')
    (run / "config.yaml").write_text("model: {num_experts: null}\n")
    page = run_page(read_run(run))
    assert "dense model" in page and 'id="step"' not in page
    assert script_of(page)["router"] is None and script_of(page)["figures"].keys() == {"curve-loss"}


def test_the_probe(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure

    run = write_run(tmp_path / "r")
    write_probe(run)
    page = run_page(read_run(run))
    script = script_of(page)
    router = script["router"]
    assert router["steps"] == list(range(13)) and [loads is None for loads in router["values"]] == [True] + [False] * 12
    found = script["heldout"]
    assert found["words"] == ["␣the"], "the only token id that occurs three times"
    # Expert 0 has half of the assignments of the four tokens of the first domain: 0.5 * 4 experts.
    assert unpacked(found["by_domain"])[0, 0] == pytest.approx(np.array([[2, 0], [2, 0], [0, 2], [0, 2]]), abs=1e-3)
    assert unpacked(found["by_word"]).shape == (3, 2, 4, 1)
    pairs = unpacked(found["pairs"])[2, 1]
    assert pairs[0] == pytest.approx([1, 0.75, 0, 0.25], abs=1e-4) and found["pairs"]["steps"] == [0, 4, 12]
    text = found["text"]
    assert text["pieces"][1] == "<i>" and text["excerpts"][1] == {"domain": "</b>", "size": 4} and text["of"] == 8
    assert unpacked(text["experts"])[2, 1, 0].tolist() == [0, 3]
    assert unpacked(text["weights"])[0, 0, 0] == pytest.approx([0.75, 0.25], abs=4e-3)
    churn, saturation = script["figures"]["churn"]["data"], script["figures"]["saturation"]["data"]
    assert [trace["y"] for trace in churn] == [[0, 0], [0, 0.125], [0, 0.0625]], "two layers and their mean"
    assert saturation[1]["y"] == [0.9375, 0.9375, 1.0]
    for figure in script["figures"].values():
        Figure(figure)
    assert "</b>" not in re.sub(r"<b>[\d.]+</b>", "", page)


def test_a_probe_that_cannot_be_used_is_a_note(tmp_path: Path) -> None:
    run = write_run(tmp_path / "other")
    write_probe(run, digest="of another tokenizer")
    page = run_page(read_run(run))
    assert page.count("expected the tokens of tokens.safetensors, found others") == 3
    assert script_of(page)["heldout"] is None and "load" in script_of(page)["figures"]
    run = write_run(tmp_path / "layers", layers=3)
    write_probe(run)
    assert "layers or experts differ from those of the loads are left out: 3." in run_page(read_run(run))
    run = write_run(tmp_path / "damaged")
    write_probe(run)
    (run / "probe" / "step-4.safetensors").write_bytes(b"nothing")
    page = run_page(read_run(run))
    assert script_of(page)["heldout"]["text"]["steps"] == [0, 12] and "step-4.safetensors is damaged" in page
    (run / "probe" / "tokens.safetensors").write_bytes(b"nothing")
    page = run_page(read_run(run))
    assert script_of(page)["heldout"] is None and "tokens.safetensors is damaged" in page


def test_packed_numbers() -> None:
    values = np.array([[0.0, 0.5], [np.nan, 8.0]])
    assert unpacked(packed(values)) == pytest.approx(values, abs=1e-4, nan_ok=True)
    assert unpacked(packed(values, levels=250)) == pytest.approx(values, abs=8 / 500, nan_ok=True)
    for top in (1, 253, 254, 255, 5000):
        whole = np.arange(top + 1)
        assert (unpacked(packed(whole, whole=True)) == whole).all()
    assert unpacked(packed(np.zeros(3))).tolist() == [0, 0, 0]


def test_a_large_probe_is_thinned_and_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    write_probe(run, tuple(range(1, 13)))
    # A token takes 2 layers * (2 experts + 2 weights + 2 bytes of margin) = 12 bytes a step.
    monkeypatch.setattr(heldout, "MAX_ROUTING_BYTES", 12 * 8 * 4)
    text = script_of(run_page(read_run(run)))["heldout"]["text"]
    assert len(text["steps"]) == heldout.MIN_STEPS and len(text["pieces"]) == 4 and text["of"] == 8
    monkeypatch.setattr(heldout, "MAX_STATISTICS", 31)
    page = run_page(read_run(run))
    script = script_of(page)["heldout"]
    assert script["pairs"] is None and script["by_domain"] is None and len(script["by_word"]["steps"]) == 3
    assert "The page has no co-activation" in page and 'id="pairs"' not in page and 'id="words"' in page


def test_long_runs_are_thinned() -> None:
    assert thinned(5, 9) == [0, 1, 2, 3, 4] and thinned(101, 3) == [0, 50, 100]
    values = [0.0] * 10_000
    values[1234], values[7777] = 9.0, -9.0
    steps, kept = reduced(list(range(10_000)), values, 100)
    assert len(steps) <= 100 and {1234, 7777, 0, 9999} <= set(steps)
    assert [values[step] for step in steps] == kept
    rows = [{"step": step, "router/load/layer_00": [0.5, 0.5]} for step in range(1000)]
    frames = expert_frames(rows, "router/load")
    assert frames is not None and len(frames.steps) == 240 and frames.steps[-1] == 999


def test_the_straggler_price_is_the_logged_one_or_that_of_the_last_loads(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")

    def drawn() -> list[list[float]]:
        return [trace["y"] for trace in script_of(run_page(read_run(run)))["figures"]["straggler"]["data"]]

    # Relative loads of 3, 0.5, 0.5 and 0: two ranks in order get 3.5 and 0.5 of 4, placed by load 3 and 1.
    assert drawn() == [[1.75, 3.0], [1.5, 3.0]]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "router/straggler/ep_2": 1.25}\n{"step": 14}\n')
    assert drawn() == [[1.25]]


def write_sweep(directory: Path) -> Path:
    """Two seeds of 4 experts and one of 8; a job that failed; one that has not ended; and one that has not begun."""
    for job, (experts, seed, loss) in {
        0: (4, 0, 3.0),
        1: (4, 1, 3.5),
        2: (8, 0, 2.5),
        3: (8, 1, None),
        5: (8, 2, 2.0),
    }.items():
        run = write_run(directory / str(job), experts=experts, num_experts=experts, top_k=2, wall_s=10.0 * experts)
        config = {"run": {"seed": seed, "name": f"s/{job}"}, "model": {"num_experts": experts, "top_k": 2}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        result = json.loads((run / "result.json").read_text()) | {"eval/loss": loss, "total_params": experts * 100}
        if loss is None:
            result = {"status": "failed", "error": "</script><script>alert(1)</script>"}
        (run / "result.json").write_text(json.dumps(result))
    (directory / "5" / "result.json").unlink()
    return directory


def test_a_sweep_has_a_row_a_run_and_a_point_a_group(tmp_path: Path) -> None:
    from plotly.graph_objects import Figure

    sweep = write_sweep(tmp_path / "s")
    (sweep / "2" / "report.html").write_text("")
    page = write_report(sweep).read_text(encoding="utf-8")
    figures = script_of(page)["figures"]
    (line,) = figures["cost-total"]["data"]
    assert (line["name"], line["x"], line["y"]) == ("top-2", [400, 800], [3.25, 2.5])
    assert line["error_y"]["array"] == [pytest.approx(0.35355, abs=1e-5), 0], "the deviation of 3.0 and 3.5"
    assert line["text"] == ["4x2", "8x2"] and "mean of 2 runs 0, 1" in line["customdata"][0]
    assert figures["cost-wall"]["data"][0]["x"] == [40, 80] and "cost-active" not in figures
    assert [figure for figure in figures if figure.startswith("small-")] == ["small-0", "small-1"]
    for figure in figures.values():
        Figure(figure)
    assert "3 of 6 runs are not finished." in page and "missing: no result.json" in page
    assert len(re.findall("<script", page)) == 3 and 'href="2/report.html"' in page and 'href="0' not in page


def test_half_a_sweep(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "s")
    (sweep / "sweep.jsonl").write_text('{"jobs": 8, "arguments": ["-m"]}\n{"job": 0, "arg')
    for job in (0, 1, 2, 3, 5):
        path = sweep / str(job) / "config.yaml"
        config = yaml.safe_load(path.read_text())
        # Job 3 has failed before the run had replaced null by the length of its schedule.
        config |= {
            "optim": {"schedule_steps": None if job == 3 else 60},
            "data": {"a_long_name": f"corpus-{'x' * 15}-{job}"},
        }
        path.write_text(yaml.safe_dump(config))
    page = write_report(sweep).read_text(encoding="utf-8")
    assert "2 of 8 jobs of the sweep have not begun." in page
    assert "data.a_long_name" in page and "schedule_steps" not in page
    titles = [figure["layout"]["title"]["text"] for figure in script_of(page)["figures"].values()]
    assert f"4 experts, top-2,<br>a_long_name=corpus-{'x' * 15}-0" in titles


def test_runs_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sweep, out = write_sweep(tmp_path / "s"), tmp_path / "page.html"
    assert call(monkeypatch, f"runs=[{sweep}/0,{sweep}/2]", f"out={out}") == 0
    assert script_of(out.read_text(encoding="utf-8"))["figures"]["cost-total"]["data"][0]["y"] == [3.0, 2.5]


def test_figures_for_papers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "r", steps=3, layers=1)
    write_probe(run)
    for path in (run / "probe").glob("step-*"):
        path.unlink()
    assert call(monkeypatch, f"run={run}", "format=svg") == 0 and capsys.readouterr().out == f"{run / 'figures'}\n"
    first = {path.name: path.read_bytes() for path in (run / "figures").iterdir()}
    names = ("curve-loss", "curve-max_vio", "curve-other-0", "history-00", "load", "straggler")
    assert sorted(first) == [f"{name}.svg" for name in names]
    assert call(monkeypatch, f"run={run}", "format=svg", f"out={tmp_path / 'again'}") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first
    assert call(monkeypatch, f"run={run}", "format=png", f"out={run / 'config.yaml'}") == 2


def test_figures_show_the_chosen_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, drawn = write_run(tmp_path / "r"), dict[str, dict[str, Any]]()
    write_probe(run)
    monkeypatch.setattr(
        paper, "_draw", lambda axes, figure: drawn.setdefault(figure["layout"]["title"]["text"], figure)
    )
    monkeypatch.setattr(paper, "figure", lambda *_, **__: nullcontext(SimpleNamespace(add_subplot=lambda: None)))

    def figures(step: int | None) -> dict[str, dict[str, Any]]:
        drawn.clear()
        write_figures(run, tmp_path, "png", step)
        return dict(drawn)

    of_6 = figures(6)
    # Expert 0 has a share of 0.25 + 6/24 of 4 experts, and the two ranks in order have 5/6 and 1/6 of the load.
    assert 2 ** of_6["Load at step 6"]["data"][0]["z"][0] == pytest.approx([2, 1, 1, 0], abs=1e-6)
    assert of_6["Straggler price (slowest rank / mean)"]["data"][0]["y"] == [1.5, 2.0]
    assert "Domains, layer 0, step 4" in of_6 and "Loss (nats per token)" in of_6
    last = figures(None)
    assert {"Load at step 12", "Domains, layer 0, step 12"} <= last.keys() and len(last) == len(of_6)
    of_0 = figures(0)
    assert "Domains, layer 0, step 0" in of_0 and not any(name.startswith(("Load at", "Straggler")) for name in of_0)
    (run / "probe" / "step-0.safetensors").unlink()
    assert not any(name.startswith("Domains") for name in figures(1)), "no step up to 1 is probed"


@pytest.mark.slow
def test_figures_of_the_probe_and_of_a_sweep(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", steps=2)
    write_probe(run, (0, 2))
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({k: v for k, v in json.loads(line).items() if k == "step" or "load" in k}) + "\n"
            for line in (run / "metrics.jsonl").read_text().splitlines()
        )
    )
    (run / "probe" / "step-0.safetensors").unlink()
    names = {path.stem for path in write_figures(run, None, "png").iterdir()}
    of_a_layer = {f"{name}-{layer}" for name in ("domains", "history", "pairs", "words") for layer in ("00", "01")}
    assert names == {"load", "straggler"} | of_a_layer
    sweep = write_sweep(tmp_path / "s")
    assert {path.name for path in write_figures(sweep, None, "png").iterdir()} == {
        f"{name}.png" for name in ("cost-total", "cost-wall", "small-0", "small-1")
    }


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return int(ended.value.code or 0)


def test_the_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    assert call(monkeypatch, f"run={run}", f"out={tmp_path / 'page.html'}") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n" and not (run / "report.html").exists()
    (tmp_path / "file").write_text("")
    for arguments, line in {
        (): "run=null: expected a run or a sweep, or else runs=[...]",
        (f"run={run}", f"runs=[{run}]"): f"run={run}: expected a run or a sweep, or else runs=[...]",
        (f"run={run}", "step=3"): "step=3: expected null for a page, which has every step",
        (
            f"run={run}",
            "format=svg",
            "step=15",
        ): "step=15: expected a step of which the run has loads or a probe; the nearest is 12",
        (f"runs=[{run}]",): "out=null: expected a file for the report of several runs",
        (f"runs=[{run},{tmp_path}]", f"out={tmp_path}/a"): f"runs={tmp_path}: expected directories of runs",
        (f"run={tmp_path / 'none'}",): f"run={tmp_path / 'none'}: expected a run's directory",
        (f"run={run}", f"out={tmp_path}"): f"out={tmp_path}: expected a place for a file that can be written",
        (f"run={run}", f"out={tmp_path}/a/b"): f"out={tmp_path}/a/b: expected a place for a file that can be written",
        (f"run={run}", f"out={tmp_path}/file/b"): f"out={tmp_path}/file/b: expected a place",
    }.items():
        assert call(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {line}") and error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "page.html", "r"]


def test_a_run_does_not_fail_with_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert write_report_or_say_why(tmp_path / "none", said.append) is None
    monkeypatch.setattr("training.report.page.write.run_page", lambda data: 1 / 0)
    assert write_report_or_say_why(write_run(tmp_path / "r"), said.append) is None
    assert [line.startswith("warning: report.html cannot be written: ") for line in said] == [True, True]
    assert "ZeroDivisionError" in said[1]
