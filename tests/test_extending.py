"""The complete examples in docs/extending.md and docs/data.md are plugins: they load, and a run can use all of them."""

import json
import re
from pathlib import Path

import pytest

from tests.commands import ROOT, run_python


@pytest.fixture
def plugins(tmp_path: Path) -> list[str]:
    """Write each example to a file. An example is complete if it starts with an import."""
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("extending.md", "data.md")]
    blocks = [block for page in pages for block in re.findall(r"```python\n((?:import|from) .*?)```", page, re.DOTALL)]
    paths = [tmp_path / f"example_{number}.py" for number in range(len(blocks))]
    for path, block in zip(paths, blocks, strict=True):
        path.write_text(block, encoding="utf-8")
    return [str(path) for path in paths]


def test_every_example_registers_its_name(plugins: list[str]):
    program = """
import sys
from common.plugins import load_plugins
load_plugins(sys.argv[1:])
from data.corpora.corpus import CORPORA
from moe.feedforward import ACTIVATIONS
from moe.router import ROUTERS
from training.optimizer import OPTIMIZERS
from training.report.trackers import TRACKERS
from training.schedule import SCHEDULES
last = [list(registry)[-1] for registry in (ROUTERS, ACTIVATIONS, OPTIMIZERS, SCHEDULES, TRACKERS)]
print(*last, *list(CORPORA)[-2:])
"""
    done = run_python("-c", program, *plugins)
    assert done.stdout == "my_router relu2 sgd inverse_sqrt loss_file poems verses\n", done.stderr


@pytest.mark.slow
def test_a_run_uses_every_example(tmp_path: Path, plugins: list[str]):
    poems = tmp_path / "poems.txt"
    poems.write_text("\n\n".join(f"Poem {i}: the wind blows {i * i} leaves over hill {i}." for i in range(900)))
    done = run_python(
        "train.py", f"plugins=[{','.join(plugins)}]", "model=mixtral_tiny", "model.num_layers=1", "train.seq_len=32",
        "train.global_batch=4", "train.steps=3", "train.log_every=1", "tracking=disabled", "run.sample_tokens=0",
        f"run.root={tmp_path}", "run.name=examples", f"data.cache={tmp_path / 'cache'}", "data.vocab_size=310",
        "router.kind=my_router", "model.expert_ffn=relu2", "optim.kind=sgd", "optim.schedule=inverse_sqrt",
        "optim.warmup_steps=1", "data=files", "data.kind=poems", f"data.paths=[{poems}]",
        "tracking.trackers=[loss_file]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "examples" / "metrics.jsonl").read_text().splitlines()]
    assert [row["optim/lr"] for row in rows] == pytest.approx([1e-3, 1e-3 / 2**0.5, 1e-3 / 3**0.5])
    logged = (tmp_path / "examples" / "loss.txt").read_text().split()
    assert logged == [text for row in rows for text in (str(row["step"]), str(row["train/loss"]))]
    state = json.loads((tmp_path / "examples" / "checkpoints" / "step-3" / "manifest.json").read_text())
    assert "momentum_buffer.embedding" in json.dumps(state) and "exp_avg" not in json.dumps(state)
