import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from parallel.planning.hardware import measured_fields


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("stages=layer,lyer", "stages=layer,lyer: expected some of "),
        ("stages=layer:20,lyer:5", "stages=layer:20,lyer:5: expected some of "),
        *(
            (f"stages={value}", f"stages={value}: expected seconds > 0 after each stage or after none")
            for value in ("layer:0", "layer:x", "layer:-1", "layer:inf", "layer:nan", "layer:20,step", "step,layer:20")
        ),
        ("stage=layer", "stage=layer: expected key=value with one of the keys stages, minutes, out, device, size"),
        ("tiny", "tiny: expected key=value with one of the keys"),
        ("size=small", "size=small: expected full or tiny"),
        *(
            (f"minutes={value}", f"minutes={value}: expected a number > 0")
            for value in ("0", "-1", "nan", "inf", "x", "")
        ),
    ],
)
def test_an_option_is_refused_with_one_line(
    argument: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"out={tmp_path / 'out'}", argument])
    assert gpu.main() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def run_fake_stage(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str, minutes: str) -> int:
    """Run `gpu.main` with a stage `layer` of one row and then `body`. Return the exit status."""
    monkeypatch.setattr(gpu, "HERE", folder)
    monkeypatch.setattr(gpu, "GRACE_S", 0.1)
    script = folder / "gpu_stages" / "layer.py"
    script.parent.mkdir()
    script.write_text(
        textwrap.dedent(
            """
            import json, signal, sys, time
            result = {"about": {}, "rows": [{"name": "first", "ms": 1 / 3, "missing": None}]}
            open(json.loads(sys.argv[1])["out"], "w").write(json.dumps(result))
            """
        )
        + body
    )
    arguments = ["gpu.py", "stages=layer", f"minutes={minutes}", f"out={folder / 'out'}"]
    monkeypatch.setattr(sys, "argv", arguments)
    return gpu.main()


@pytest.mark.parametrize(
    ("arguments", "budgets"),
    [
        (["stages=step:100,train:75,tests:45"], [100, 87.5, 52.5]),  # The first stage leaves 20 seconds.
        (["stages=step:100,train:75,tests:45", "minutes=5.5"], [150, 156.25, 93.75]),
        (["stages=tests,memory", "minutes=1"], [60 * 0.2 / 0.28, 60 * 0.08 / 0.28]),
    ],
)
def test_stages_get_their_seconds_and_what_earlier_ones_leave(
    arguments: list[str], budgets: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, found = [0.0], []

    def run_stage(stage: str, budget: float, options: dict[str, str]) -> str:
        now[0] += 80 if stage == "step" else budget
        found.append(budget)
        return "passed"

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"out={tmp_path}", *arguments])
    assert gpu.main() == 0
    assert found == pytest.approx(budgets)


@pytest.mark.parametrize("body", ["time.sleep(60)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"])
def test_a_stage_that_is_cut_off_keeps_its_rows(
    body: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The time must suffice for Python to start, also on a busy machine.
    assert run_fake_stage(monkeypatch, tmp_path, body, "0.02") == 1
    output = capsys.readouterr().out
    assert "cut off" in output and "failed or unfinished: layer" in output
    assert "first  0.3333  -" in output
    assert json.loads((tmp_path / "out" / "layer.json").read_text())["rows"][0]["ms"] == 1 / 3


@pytest.mark.parametrize(("body", "status"), [("sys.exit(0)", 0), ("sys.exit(1)", 1)])
def test_the_exit_status_is_that_of_the_stages(
    body: str, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run_fake_stage(monkeypatch, tmp_path, body, "1") == status


@pytest.mark.slow
def test_a_tiny_run_of_a_stage_on_two_ranks(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    stage = ["benchmarks/gpu.py", "stages=calibrate", "device=cpu", "size=tiny", f"out={tmp_path}"]
    done = subprocess.run(
        torchrun + stage,
        cwd=gpu.HERE.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("== calibrate: at most") == 1  # Rank 0 prints.
    hardware = json.loads((tmp_path / "hardware.json").read_text())
    largest = [hardware["measured"][kind][-1] for kind in ("all_gather", "reduce_scatter", "all_to_all")]
    # Each of the two ranks sends half of the tensor.
    assert [row["GB_per_s"] for row in largest] == pytest.approx([row["MB"] / 2 / row["ms"] for row in largest])
    assert hardware["rates"]["link"] == pytest.approx(3e9 / sum(1 / row["GB_per_s"] for row in largest))
    smallest = [hardware["measured"][kind][0]["ms"] for kind in ("all_gather", "reduce_scatter", "all_to_all")]
    assert hardware["rates"]["link_latency_s"] == pytest.approx(sum(smallest) / 3e3)
    matmul = hardware["measured"]["matmul"][0]
    assert matmul["tflops"] == pytest.approx(2 * matmul["m"] * matmul["k"] * matmul["n"] / matmul["ms"] / 1e9)
    assert hardware["rates"]["matmul"] == pytest.approx(matmul["tflops"] * 1e12)
    assert {"grouped_matmul_forward", "attention_forward", "copy", "adamw"} <= hardware["rates"].keys()
    assert {"matmul", "link", "link_latency_s", "wide_matmul", "bandwidth"} <= measured_fields(hardware["rates"]).keys()


def test_inputs_make_the_router_choose_the_wanted_experts() -> None:
    from benchmarks.gpu_stages import layer, stage

    shape = layer.Shape("test", tokens=512, dim=64, hidden=32, experts=16, top_k=3, shared=1)
    weights = layer.Weights(shape, torch.device("cpu"))
    xs = layer.inputs(shape, weights, seq_len=128)
    mixwright = layer.layer_with(shape, weights, torch.float32)
    chosen = {name: mixwright.router(x_BSD, None, None)[0].experts_TK for name, x_BSD in xs.items()}
    assert chosen["balanced"].sort().values.equal(stage.balanced_experts(512, 3, 16).sort().values)
    assert chosen["balanced"].flatten().bincount().tolist() == [96] * 16
    wanted_TK = stage.skewed_logits(512, 16).topk(3).indices
    assert (chosen["skewed"] == wanted_TK).all(dim=1).float().mean() > 0.97  # the input is rounded to bf16
    assert layer.rows_per_expert(xs["skewed"], weights, 3).sum() == 512 * 3
    # The largest share of zipf_shares(16), of which each token takes three.
    assert 0.12 < chosen["skewed"].flatten().bincount().max() / (512 * 3) < 0.2

    y_BSD = layer.mixwright(shape, weights, torch.float32).call(xs["skewed"])
    loop_BSD = layer.plain_loop(shape, weights).call(xs["skewed"])
    assert stage.relative_error(loop_BSD, y_BSD) < 0.05  # The routers differ in precision and choose alike, mostly.


def test_short_calls_are_measured_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_stages import stage

    now, durations = [0.0], iter([0.5, 0.02, 0.02, 0.02, 0.08] + [0.02] * 7)
    for clock in ("perf_counter", "process_time"):  # the second one with one thread
        monkeypatch.setattr(stage.time, clock, lambda: now[0])

    def call() -> None:
        now[0] += next(durations)

    times = stage.times_of(call, torch.device("cpu"), rounds=5, warm_up=2, least_ms=200.0)
    assert times == pytest.approx([20, 20, 80] + [20] * 7)
    durations = iter([0.5] * 8)
    assert len(stage.times_of(call, torch.device("cpu"), rounds=5, warm_up=3, least_ms=200.0)) == 5


def test_the_seconds_of_the_parts_of_a_run() -> None:
    from benchmarks.gpu_stages import train

    lines = [
        (10.0, "reading the corpus"),
        (14.0, "corpus files-199cda in /tmp/cache"),
        (17.0, "run directory /tmp/run"),
        (38.0, "step  1/30  loss 9.9"),
        (43.0, "step 25/30  loss 7.0"),
        (46.0, "step 30/30  loss 6.9"),
        (48.0, "Held-out text: loss 6.8"),
    ]
    rows = [{"step": 25}, {"step": 30, "speed/tokens_per_s": 5000.0}]
    assert train.evaluation_seconds(lines, rows, tokens=1000) == 2.0
    assert list(train.phases(lines, 55.0).values()) == [10, 4, 3, 21, 8, 2, 7]
    # A run that was killed in its evaluation.
    assert list(train.phases(lines[:5], 63.0).items())[-1] == ("steps, unfinished", 25.0)


@pytest.mark.slow
def test_a_tiny_run_of_the_stage_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["gpu.py", "stages=layer", "device=cpu", "size=tiny", "minutes=6", f"out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    assert gpu.main() == 0
    rows = json.loads((tmp_path / "layer.json").read_text())["rows"]
    assert {"Mixwright, fp32, compiled", "transformers, grouped_mm"} <= {row.get("implementation") for row in rows}
    assert any(row.get("part") == "combine" for row in rows) and any(row.get("kernel") for row in rows)
