import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("stages=layer,lyer", "stages=layer,lyer: expected some of "),
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


def test_a_tiny_run_of_a_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "stages=calibrate", "device=cpu", "size=tiny", f"out={tmp_path}"])
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    assert gpu.main() == 0
    assert "FAILED" not in capsys.readouterr().out
    hardware = json.loads((tmp_path / "hardware.json").read_text())
    matmul = hardware["measured"]["matmul"][0]
    assert matmul["tflops"] == pytest.approx(2 * matmul["m"] * matmul["k"] * matmul["n"] / matmul["ms"] / 1e9)
    assert hardware["rates"]["matmul"] == pytest.approx(matmul["tflops"] * 1e12)
    assert {"grouped_matmul_forward", "attention_forward", "copy", "adamw"} <= hardware["rates"].keys()


def test_inputs_make_the_router_choose_the_wanted_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(gpu.HERE / "gpu_stages"))
    import layer
    import stage

    shape = layer.Shape("test", tokens=512, dim=64, hidden=32, experts=16, top_k=3, shared=1)
    weights = layer.Weights(shape, torch.device("cpu"))
    xs = layer.inputs(shape, weights, seq_len=128)
    mixwright = layer.mixwright_layer(shape, weights, torch.float32)
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


@pytest.mark.slow
def test_a_tiny_run_of_the_stage_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = ["gpu.py", "stages=layer", "device=cpu", "size=tiny", "minutes=6", f"out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    assert gpu.main() == 0
    rows = json.loads((tmp_path / "layer.json").read_text())["rows"]
    assert {"Mixwright, fp32, compiled", "transformers, grouped_mm"} <= {row.get("implementation") for row in rows}
    assert any(row.get("part") == "combine" for row in rows) and any(row.get("kernel") for row in rows)
