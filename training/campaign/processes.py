"""The campaigns that start processes and disturb them."""

import io
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from parallel.startup.launch import WorkerFailure
from training.campaign.config import CampaignConfig
from training.campaign.runs import EVERY, STEPS, Launch, Reference, Tally, compare, configuration, read_reference
from training.campaign.worker import PROCESSES, train_quietly
from training.checkpoint.manifest import CHECKPOINTS, committed, step_of
from training.config import Config
from training.report.terminal import show_line
from training.run import finished_result

KILLS_PER_RUN = 10
POLL_S = 0.0005
"""Seconds between two looks at a directory. A save of these runs takes several milliseconds."""
PATIENCE_S = 120.0
"""Seconds without a save after which an aimed kill comes at once."""


class Pace(NamedTuple):
    """How long the parts of a run take on this machine, in seconds."""

    start: float
    """From the start of a worker's function to the first step."""
    step: float
    """A step with its share of the saves."""
    save: float
    """The median time for which the temporary directory of a checkpoint exists."""


class Struck(NamedTuple):
    """A signal that was sent."""

    rank: int
    inside: bool
    """Whether the temporary directory of a checkpoint existed immediately before and after the signal was sent."""
    newest: int
    """The step of the newest committed checkpoint immediately before; 0: there was none."""


class Watched:
    """A launch of a run, while a thread of this process follows it.

    Args:
        directory: the run's directory.
        follow: runs in the thread. It ends soon after `ended` is set.
    """

    def __init__(self, config: Config, launch: Launch, follow: Callable[["Watched"], None]) -> None:
        self.directory = Path(config.run.root) / str(config.run.name)
        self.ended = threading.Event()
        self.failure: WorkerFailure | None = None
        """How the launch ended; None: the run has finished."""
        self._config, self._launch = config, launch
        self._left_over = self._temporary()
        self._work = Path(config.run.root)
        self._thread = threading.Thread(target=follow, args=(self,), daemon=True)

    def run(self) -> "Watched":
        """Launch the run and wait for its end."""
        processes = self._work / PROCESSES
        shutil.rmtree(processes, ignore_errors=True)
        processes.mkdir(parents=True)
        self._thread.start()
        try:
            with redirect_stdout(io.StringIO()):
                self._launch(self._config, partial(train_quietly, self._work))
        except WorkerFailure as failure:
            self.failure = failure
        finally:
            self.ended.set()
            self._thread.join()
        return self

    def process(self, rank: int) -> int:
        """Wait for the start of a rank, and return its process id; 0 if the launch ends before."""
        file = self._work / PROCESSES / str(rank)
        while not file.exists():
            if self.ended.wait(POLL_S):
                return 0
        return int(file.read_text())

    def saves(self) -> bool:
        """Return whether a checkpoint is being written: there is a temporary directory that this launch has made."""
        return not self._temporary() <= self._left_over

    def wait_for_save(self, expected: bool, timeout: float = PATIENCE_S) -> bool:
        """Wait until `saves` returns `expected`. Return False if the launch ends before, or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.saves() != expected:
            if time.monotonic() > deadline or self.ended.wait(POLL_S):
                return False
        return True

    def _temporary(self) -> set[tuple[str, int, int]]:
        """Return the name, the inode and the time of the last change of the temporary directories of checkpoints."""
        found = set()
        with suppress(FileNotFoundError):
            for entry in os.scandir(self.directory / CHECKPOINTS):
                if entry.name.startswith(".tmp-"):
                    status = entry.stat()
                    found.add((entry.name, status.st_ino, status.st_mtime_ns))
        return found


def run_reference(config: CampaignConfig, root: Path, launch: Launch) -> tuple[Reference, Pace]:
    """Train the run that is not disturbed, and measure it."""
    spans: list[tuple[float, float]] = []
    started = 0.0

    def follow(watched: Watched) -> None:
        nonlocal started
        watched.process(config.ranks - 1)
        started = time.monotonic()
        while watched.wait_for_save(True):
            begin = time.monotonic()
            watched.wait_for_save(False)
            spans.append((begin, time.monotonic()))

    # Every checkpoint is kept.
    run = configuration(root, "reference", ranks=config.ranks, seed=config.seed, keep_every=EVERY)
    watched = Watched(run, launch, follow).run()
    if watched.failure is not None:
        raise watched.failure
    first, last = spans[0][0], spans[-1][1]
    step = (last - first) / (STEPS - EVERY)
    pace = Pace(max(0.0, first - started - EVERY * step), step, statistics.median(end - begin for begin, end in spans))
    return read_reference(watched.directory), pace


def kill(config: CampaignConfig, root: Path, launch: Launch, reference: Reference, pace: Pace) -> Tally:
    """Kill ranks with SIGKILL, continue the runs, and compare them with the reference after every kill and at the end.

    A share `config.inside` of the kills is aimed: it waits for a save, and then for a random part of the time that a
    save takes. The others come at a random moment from the start of the process to the end of its eighth step. The
    checkpoints of every other run are written in the background.
    """
    tally, choose, number = Tally("kill", inside=0), random.Random(config.seed), 0
    while tally.tried < config.kills and not (tally.lost or tally.corrupted):
        run = configuration(root, f"kill-{number}", ranks=config.ranks, seed=config.seed, background=number % 2 == 1)
        _kill_run(config, run, launch, reference, pace, tally, choose)
        number += 1
        show_line(f"kill: {tally.tried} of {config.kills}, {tally.inside} inside a save")
    return tally


def _kill_run(
    config: CampaignConfig,
    run: Config,
    launch: Launch,
    reference: Reference,
    pace: Pace,
    tally: Tally,
    choose: random.Random,
) -> None:
    """Start one run again and again, until it has finished."""
    kills = 0
    while True:
        last = kills == KILLS_PER_RUN or tally.tried == config.kills
        killer = Killer(choose.randrange(config.ranks), choose.random() < config.inside, choose, pace)
        watched = Watched(run, launch, (lambda watched: None) if last else killer).run()
        what = f"{run.run.name}, kill {tally.tried + 1}"
        struck = killer.struck
        if watched.failure is None:
            # A signal that came when the process had done everything has not disturbed the run.
            finished = finished_result(watched.directory, STEPS) is not None
            if not finished:
                tally.lost.append(f"{what}: the launch ended without an error, and the run has not finished")
            compare(watched.directory, reference, tally, f"{run.run.name}, end", at_least=STEPS)
            return
        if struck is None:
            tally.lost.append(f"{what}: the run cannot continue: {watched.failure}")
            return
        kills += 1
        tally.tried += 1
        tally.inside = (tally.inside or 0) + struck.inside
        if f"worker {struck.rank} " not in str(watched.failure) or signal.SIGKILL.name not in str(watched.failure):
            tally.unnoticed.append(
                f"{what}: the launcher does not say that rank {struck.rank} was killed: {watched.failure}"
            )
        compare(watched.directory, reference, tally, what, at_least=struck.newest)
        if tally.lost or tally.corrupted:
            return


class Killer:
    """Sends SIGKILL to one rank of a launch.

    Args:
        aimed: whether it waits for a save.
        choose: chooses the moment.
    """

    def __init__(self, rank: int, aimed: bool, choose: random.Random, pace: Pace) -> None:
        self.struck: Struck | None = None
        self._rank, self._aimed, self._pace = rank, aimed, pace
        self._skipped, self._part = choose.randrange(3), choose.random()

    def __call__(self, watched: Watched) -> None:
        """Wait for the moment, and send the signal unless the launch ends before."""
        pid = watched.process(self._rank)
        if not self._aimed:
            watched.ended.wait(self._part * (self._pace.start + 8 * self._pace.step))
        for _ in range(self._skipped if self._aimed else 0):
            watched.wait_for_save(True)
            watched.wait_for_save(False)
        newest = self._newest(watched)
        while self._aimed and watched.wait_for_save(True):
            newest = self._newest(watched)
            if not watched.ended.wait(self._part * self._pace.save) and watched.saves():
                break
        if watched.ended.is_set() or not pid:
            return
        before = watched.saves()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.struck = Struck(self._rank, before and watched.saves(), newest)

    def _newest(self, watched: Watched) -> int:
        return max((step_of(path) for path in committed(watched.directory / CHECKPOINTS)), default=0)
