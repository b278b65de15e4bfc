"""What a run spends its time on, and what it says about a restart."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parallel.startup.failures import describe_failure, failures_recorded, last_failure, read_reports, write_report
from parallel.startup.launch import _to_failure
from training.report.goodput import FILE, Goodput, goodput_line


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_time_is_counted_by_cause_over_a_restart(tmp_path: Path) -> None:
    clock, wall = Clock(100.0), Clock(5000.0)
    first = Goodput(tmp_path, 98.0, new=True, restarted=False, clock=clock, wall_clock=wall)
    with first.spent_on("load"):
        clock.now += 3
    first.started()
    for done, refused in ((1, False), (2, False), (3, True), (4, False)):
        clock.now += 10
        first.step(done, 9.0, refused=refused)
    with pytest.raises(OSError), first.spent_on("save"):
        clock.now += 5
        raise OSError
    first.write()
    assert json.loads((tmp_path / FILE).read_text())["furthest_step"] == 4
    summary = first.summary()
    expected = {"step": 27.0, "skipped": 9.0, "start": 2.0, "load": 3.0, "save": 5.0, "other": 4.0}
    assert {cause: seconds for cause, seconds in summary["seconds"].items() if seconds} == expected
    assert summary["wall_s"] == 50.0 and summary["share"] == 27 / 50

    # The process was killed, and another one has started 20 seconds later, two seconds ago. It repeats steps 3 and 4.
    clock, wall = Clock(9.0), Clock(5022.0)
    second = Goodput(tmp_path, 7.0, new=False, restarted=True, clock=clock, wall_clock=wall)
    second.started()
    for done in (3, 4, 5):
        clock.now += 1
        second.step(done, 1.0, refused=False)
    summary = second.summary()
    expected |= {"step": 28.0, "repeated": 2.0, "start": 4.0, "down": 20.0}
    assert {cause: seconds for cause, seconds in summary["seconds"].items() if seconds} == expected
    assert summary["wall_s"] == 75.0 and second.restarts == 1
    assert goodput_line(summary, second.restarts) == (
        "37.3 % of 1 min 15 s in optimizer steps; from a failure to the restart 20.0 s, steps that changed no weight "
        "9.00 s, saving checkpoints 5.00 s, start 4.00 s, other 4.00 s, loading checkpoints 3.00 s, repeated steps "
        "2.00 s; 1 restart"
    )


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[1]",
        '{"step": "x", "restarts": -1}',
        "{",
        '{"step": 1e999, "restarts": 1e999}',
        f'{{"step": {10**400}}}',
    ],
)
def test_an_account_that_is_missing_or_damaged_starts_again(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    account = Goodput(tmp_path, 0.0, new=False, restarted=False, clock=Clock(0.0))
    assert sum(account.seconds.values()) == account.restarts == account.furthest == 0
    assert account.summary()["share"] is None


def test_a_new_run_does_not_continue_the_account_of_another(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"step": 5.0, "restarts": 3}')
    assert Goodput(tmp_path, 0.0, new=False, restarted=True, clock=Clock(0.0)).restarts == 4
    assert Goodput(tmp_path, 0.0, new=True, restarted=False, clock=Clock(0.0)).restarts == 0


def test_the_failure_before_a_restart_in_one_line(tmp_path: Path) -> None:
    messages = {2: "Traceback\n  ...\nOSError: no disk\n"}
    assert describe_failure({2: 1, 4: 1}, messages) == "rank 2 ended with exit status 1: OSError: no disk"
    messages[3] = "step 3: no memory"
    assert describe_failure({2: 1, 3: 1}, messages) == "rank 3 ended with exit status 1: step 3: no memory"
    # A rank that was killed comes before the ranks that lost their connection to it.
    assert describe_failure({2: 1, 3: -9}, messages) == "rank 3 was killed by SIGKILL"
    assert describe_failure({5: 7}, messages) == "rank 5 ended with exit status 7"
    assert last_failure(tmp_path, 0) is None and last_failure(tmp_path, 1) is None
    (tmp_path / "failure-0.txt").write_text("rank 3 was killed by SIGKILL")
    assert last_failure(tmp_path, 1) == "rank 3 was killed by SIGKILL"


def test_a_worker_that_is_killed_in_its_report_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent ends the other workers as soon as one has failed, also those that are writing."""
    for rank in (10, 9):
        write_report(tmp_path, 0, rank, 1, "step 3: no memory")

    def killed(self: Path, *_: object) -> None:
        raise KeyboardInterrupt

    for method in ("replace", "rename"):
        monkeypatch.setattr(Path, method, killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, 0, 1, 1, "a connection was lost")
    assert read_reports(tmp_path, 1) == {}
    report = {"exitcode": 1, "message": "step 3: no memory"}
    assert list(read_reports(tmp_path, 0).items()) == [(9, report), (10, report)]


def test_the_agent_of_torch_is_restored(tmp_path: Path) -> None:
    from torch.distributed.launcher import api

    before = api.LocalElasticAgent
    with failures_recorded(tmp_path):
        assert api.LocalElasticAgent is not before and issubclass(api.LocalElasticAgent, before)
    assert api.LocalElasticAgent is before


def test_a_killed_worker_is_reported_and_not_one_that_lost_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reports the first worker that it finds ended, and ends the others with SIGTERM before it returns."""
    from torch.distributed.launcher import api

    workers = [SimpleNamespace(pid=7 + rank, exitcode=0, global_rank=rank) for rank in range(3)]

    class Agent:
        _remaining_restarts = 0
        _pcontext = SimpleNamespace(_pc=SimpleNamespace(processes=workers))

        def _monitor_workers(self, group: object) -> SimpleNamespace:
            workers[0].exitcode, workers[1].exitcode, workers[2].exitcode = 1, -9, -15
            failures = {0: SimpleNamespace(exitcode=1)}
            return SimpleNamespace(is_failed=lambda: True, failures=failures)

    monkeypatch.setattr(api, "LocalElasticAgent", Agent)
    with failures_recorded(tmp_path):
        group = SimpleNamespace(workers=workers, spec=SimpleNamespace(max_restarts=0))
        agent: Any = api.LocalElasticAgent
        result = agent()._monitor_workers(group)
    assert {rank: failure.exitcode for rank, failure in result.failures.items()} == {1: -9}
    assert last_failure(tmp_path, 1) == "rank 1 was killed by SIGKILL"


def test_a_killed_worker_comes_before_the_mistake_that_another_one_reports() -> None:
    """The workers that are left say that a rank has ended. A worker that has killed a stopped one says why."""
    error = SimpleNamespace(get_first_failure=lambda: (0, SimpleNamespace(exitcode=-9, pid=7)))
    mistake = {"exitcode": 2, "message": "a rank ended"}
    assert str(_to_failure(error, {1: mistake})) == "worker 0 (process 7) was killed by SIGKILL"
    reason = {"exitcode": 1, "message": "rank 0 (process 7) was stopped, and is killed"}
    assert str(_to_failure(error, {1: reason})) == "rank 0 (process 7) was stopped, and is killed"
