"""The jobs of a sweep: their number, their record, and what goes on after an interruption."""

import json
import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.errors import RunError, UserError
from scripts.cli.command_line import sweep_directory
from scripts.cli.overrides import PARSER
from scripts.cli.sweeps import begin_job, count_jobs, end_job, finished_job
from tests.test_train import cache, run  # noqa: F401
from training.config import Config
from training.owner import RunOwner
from training.report.sweep import SweepRecord

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def start_sweep(root: Path, *arguments: str) -> SweepRecord:
    """Begin a sweep with the name s, and return its record."""
    with RunOwner(sweep=True) as owner:
        directory = sweep_directory(["-m", f"run.root={root}", "run.name=s", *arguments], owner)
    assert directory == root / "s"
    return SweepRecord.read(root / "s")


def test_the_number_of_jobs(tmp_path: Path) -> None:
    for arguments, total in (
        (["run.seed=1,2,3", "model.top_k=1,2", "train.steps=9"], 6),
        (["run.seed=range(0,5)", "router=glam,switch"], 10),
        (["run.seed=1,2", "optim.lr=interval(0.1,1)"], None),
        (["+hydra.sweeper.n_trials=7"], 7),
    ):
        assert start_sweep(tmp_path, *arguments).total == total, arguments
    # A preset can choose values, too. The command line replaces them.
    hydra = OmegaConf.create({"sweeper": {"params": {"run.seed": "1,2,3", "optim.lr": "0.1,0.2"}}})
    assert count_jobs(PARSER.parse_overrides(["model.top_k=1,2", "optim.lr=0.3"]), hydra) == 6


def test_a_job_is_told_and_recorded_and_must_not_change(tmp_path: Path, capsys: Capture) -> None:
    start_sweep(tmp_path, "train.steps=9", "model.top_k=1,2", "run.seed=1,2,3")
    jobs = [[f"model.top_k={k}", f"run.seed={seed}", "train.steps=9"] for k in (1, 2) for seed in (1, 2, 3)]
    for number in (0, 1):
        begin_job(tmp_path / "s", number, jobs[number])
    assert "Sweep s: job 2 of 6 (directory 1): model.top_k=1 run.seed=2\n" in capsys.readouterr().out
    # The sweep goes on: it may run on more processes, and have more jobs behind those that it has begun.
    record = start_sweep(tmp_path, "train.steps=9", "model.top_k=1,2", "run.seed=1,2,3", "launch.nproc=2")
    assert record.jobs == {0: jobs[0], 1: jobs[1]} and record.total == 6
    begin_job(tmp_path / "s", 1, [*jobs[1], "launch.nproc=2", "run.name=s", "tracking=disabled"])
    with pytest.raises(RunError) as caught:
        begin_job(tmp_path / "s", 1, jobs[2])
    assert str(caught.value) == (
        "run.name=s: expected the command of the sweep, or another name; job 1 was started with run.seed=2, and would "
        "have run.seed=3"
    )
    with (tmp_path / "s" / "sweep.jsonl").open("a") as file:
        file.write('{"job": 2, "argu')  # a kill
    assert SweepRecord.read(tmp_path / "s").jobs == record.jobs
    begin_job(tmp_path / "s", 3, jobs[3])
    assert SweepRecord.read(tmp_path / "s").jobs == record.jobs | {3: jobs[3]}


def test_a_directory_with_jobs_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s" / "0").mkdir(parents=True)
    with pytest.raises(RunError, match=r"^run\.name=s: expected a free name for a sweep, or that of one to continue"):
        start_sweep(tmp_path, "run.seed=1,2")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["0"]
    os.mkfifo(tmp_path / "s" / "sweep.jsonl")
    with pytest.raises(UserError, match=r"sweep\.jsonl is a named pipe|expected a free name for a sweep"):
        start_sweep(tmp_path, "run.seed=1,2")


def test_a_sweep_that_does_not_start_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunOwner(sweep=True) as owner:
        sweep_directory(["-m", f"run.root={tmp_path}", "run.name=s", "run.seed=1,2"], owner)
        assert (tmp_path / "s" / "sweep.jsonl").is_file()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_written_after_each_job(tmp_path: Path, capsys: Capture) -> None:
    start_sweep(tmp_path, "model.top_k=1,2,4")
    for number, loss in enumerate((3.5, 3.25)):
        job = tmp_path / "s" / str(number)
        job.mkdir()
        (job / "config.yaml").write_text(f"model:\n  top_k: {2**number}\noptim:\n  lr: {0.1 + number}\n")
        result = {"status": "finished", "eval/loss": loss, "num_experts": 4, "top_k": 2**number}
        (job / "result.json").write_text(json.dumps(result))
        end_job(tmp_path / "s")
        assert len((tmp_path / "s" / "sweep.csv").read_text().splitlines()) == 2 + number
    text = capsys.readouterr().out
    assert "Sweep s: 1 of 3 jobs finished\nbest: job 0, held-out loss 3.5000\n" in text
    assert "Sweep s: 2 of 3 jobs finished\nbest: job 1, held-out loss 3.2500: optim.lr=1.1 top_k=2\n" in text


def test_a_finished_job_is_not_run_again(tmp_path: Path) -> None:
    from dataclasses import replace

    from tests.test_conf import composed

    config: Config = composed(["train.steps=9"])
    config = replace(config, run=replace(config.run, root=str(tmp_path), name="s/0"))
    assert finished_job(config) == {}
    (tmp_path / "s" / "0").mkdir(parents=True)
    for result, done in (
        ({"status": "failed", "error": "a"}, False),
        ({"status": "finished", "step": 8, "eval/loss": 3.5}, False),
        ({"status": "finished", "step": 9, "eval/loss": 3.5}, True),
    ):
        (tmp_path / "s" / "0" / "result.json").write_text(json.dumps(result))
        assert finished_job(config) == (result if done else {})


@pytest.mark.slow
def test_optuna_chooses_values_and_an_interrupted_sweep_chooses_the_same(
    tmp_path: Path,
    cache: str,  # noqa: F811
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra [sweep]")
    arguments = (
        "-m",
        "hparams_search=optuna",
        "hydra.sweeper.n_trials=2",
        "run.name=s",
        "train.steps=1",
        "tracking=disabled",
    )
    out = run(tmp_path, cache, *arguments)
    assert "job 2 of 2" in out and "Sweep: 2 of 2 jobs finished" in out and "router.balance_coef=" in out
    jobs = SweepRecord.read(tmp_path / "s").jobs
    assert jobs[0] != jobs[1]
    (tmp_path / "s" / "1" / "result.json").unlink()
    out = run(tmp_path, cache, *arguments)
    assert out.count("finished before") == 1 and SweepRecord.read(tmp_path / "s").jobs == jobs
