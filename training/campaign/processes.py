"""The campaigns that start processes and disturb them."""

import io
import os
import random
import resource
import shutil
import signal
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from parallel.startup.launch import WorkerFailure
from training.campaign.config import CampaignConfig
from training.campaign.runs import (
    EVERY,
    STEPS,
    TIMEOUT_S,
    Launch,
    Reference,
    Tally,
    compare,
    configuration,
    read_reference,
    rows_of,
)
from training.campaign.worker import OUTPUT, PROCESSES, Spoiled, train_quietly
from training.checkpoint.manifest import CHECKPOINTS, committed, step_of
from training.config import Config
from training.interruption import SIGNALS
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

    def __init__(
        self, config: Config, launch: Launch, follow: Callable[["Watched"], None], spoiled: Spoiled | None = None
    ) -> None:
        self.directory = Path(config.run.root) / str(config.run.name)
        self.ended = threading.Event()
        self.failure: WorkerFailure | None = None
        """How the launch ended, if a worker failed."""
        self.sent: signal.Signals | None = None
        """The signal that `follow` has sent, and after which the launch should end."""
        self.stopped: int | None = None
        """The number of the signal after which the launch ended."""
        self.printed = io.StringIO()
        """What the launcher has printed."""
        self._config, self._launch, self._spoiled = config, launch, spoiled
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
            with redirect_stdout(self.printed):
                self._launch(self._config, partial(train_quietly, self._work, self._spoiled))
        except WorkerFailure as failure:
            self.failure = failure
        except (KeyboardInterrupt, SystemExit) as stop:
            if self.sent is None:
                raise
            self.stopped = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else int(stop.code or 128) - 128
        finally:
            self.ended.set()
            self._thread.join()
        return self

    @property
    def disturbed(self) -> bool:
        """Whether the launch has ended before the run had finished."""
        return self.failure is not None or self.stopped is not None

    def output(self) -> str:
        """Return what the workers of all launches have printed."""
        return (self._work / OUTPUT).read_text(encoding="utf-8", errors="replace")

    def newest(self) -> int:
        """Return the step of the newest committed checkpoint; 0: there is none."""
        return max((step_of(path) for path in committed(self.directory / CHECKPOINTS)), default=0)

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
    run = configuration(root, "reference", ranks=config.ranks, seed=config.seed, every=1, keep_every=1)
    watched = Watched(run, launch, follow).run()
    if watched.failure is not None:
        raise watched.failure
    first, last = spans[0][0], spans[-1][1]
    step = (last - first) / (STEPS - 1)
    pace = Pace(max(0.0, first - started - step), step, statistics.median(end - begin for begin, end in spans))
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
        newest = watched.newest()
        while self._aimed and watched.wait_for_save(True):
            newest = watched.newest()
            if not watched.ended.wait(self._part * self._pace.save) and watched.saves():
                break
        if watched.ended.is_set() or not pid:
            return
        before = watched.saves()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.struck = Struck(self._rank, before and watched.saves(), newest)


class Disturbance(ABC):
    """Disturbs one run in one way, from a thread that follows the launch. A subclass for each campaign.

    Args:
        rank: the rank that is disturbed.
        after: the number of saves of the run before which nothing happens.
        choose: chooses the rest.
    """

    timeout_s: float | None = None
    """As in `configuration`."""

    def __init__(self, rank: int, after: int, choose: random.Random) -> None:
        self.rank, self.after, self.choose = rank, after, choose
        self.spoiled: Spoiled | None = None
        """What the workers do themselves."""
        self.newest = 0
        """The step of the newest committed checkpoint immediately before the disturbance."""

    @abstractmethod
    def __call__(self, watched: Watched) -> None:
        """Follow the launch."""

    @abstractmethod
    def problem(self, watched: Watched) -> str | None:
        """Return what the run should have told the user, and has not; None if it has told everything."""


class Sudden(Disturbance):
    """Disturbs a rank from this process, at a random moment."""

    def __call__(self, watched: Watched) -> None:
        """Wait for the saves, and for a random part of a second, and disturb the run unless it has ended."""
        pid = watched.process(self.rank)
        for _ in range(self.after):
            watched.wait_for_save(True)
            watched.wait_for_save(False)
        if not watched.ended.wait(self.choose.random() * 0.2):
            self.newest = watched.newest()
            self.disturb(watched, pid)

    @abstractmethod
    def disturb(self, watched: Watched, pid: int) -> None:
        """Disturb the rank whose process id is `pid`."""


class Stop(Sudden):
    """Stops a rank with SIGSTOP. It counts as noticed if the launch ends in time with one line that names the rank."""

    timeout_s = TIMEOUT_S

    def disturb(self, watched: Watched, pid: int) -> None:
        self.start = time.monotonic()
        os.kill(pid, signal.SIGSTOP)

    def problem(self, watched: Watched) -> str | None:
        took, said = time.monotonic() - self.start, str(watched.failure)
        named = said.startswith((f"rank {self.rank} (", f"worker {self.rank} (")) and "\n" not in said.strip()
        return None if named and took <= TIMEOUT_S + 5 else f"rank {self.rank} stopped, {took:.1f} s: {said}"


class Signal(Sudden):
    """Sends SIGTERM, SIGINT, SIGHUP or SIGUSR1 to the launcher or to a rank. The run saves its last step and ends."""

    def disturb(self, watched: Watched, pid: int) -> None:
        self.number = self.choose.choice(SIGNALS)
        watched.sent = self.number
        os.kill(self.choose.choice((pid, os.getpid())), self.number)

    def problem(self, watched: Watched) -> str | None:
        saved, last = watched.newest(), max(rows_of(watched.directory))
        resumes = any(line.split()[:1] == ["resume"] for line in watched.printed.getvalue().splitlines())
        if watched.stopped == self.number and saved == last and resumes:
            return None
        return (
            f"{self.number.name}: ended by {watched.stopped} ({watched.failure}), the last step is {last}, step "
            f"{saved} is saved, {'a' if resumes else 'no'} command that resumes the run"
        )


class NotANumber(Disturbance):
    """A gradient of a rank is NaN from one step on. The run ends after five such steps, and names it."""

    def __init__(self, rank: int, after: int, choose: random.Random) -> None:
        super().__init__(rank, after, choose)
        parameter = choose.choice(("layers.0.attention_norm.weight", "layers.1.ffn.router.weight", "head.weight"))
        self.spoiled = Spoiled(rank, parameter, EVERY * after + choose.randrange(1, 1 + EVERY))

    def __call__(self, watched: Watched) -> None:
        assert self.spoiled is not None
        self.newest = (self.spoiled.since - 1) // EVERY * EVERY

    def problem(self, watched: Watched) -> str | None:
        assert self.spoiled is not None
        lines = [line for line in watched.output().splitlines() if self.spoiled.parameter in line]
        named = any(f"rank {self.rank} " in line and f"step {self.spoiled.since}" in line for line in lines)
        said = str(watched.failure).strip()
        return None if named and "\n" not in said and watched.newest() == self.newest else f"{self.spoiled}: {said}"


class Disk(Sudden):
    """The kernel refuses a rank to write beyond a number of bytes of any file, as it does on a disk that is full."""

    def disturb(self, watched: Watched, pid: int) -> None:
        self.limit = self.choose.randrange(2**12, 2**17)
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (self.limit, self.limit))

    def problem(self, watched: Watched) -> str | None:
        said = str(watched.failure).strip()
        return None if "\n" not in said and "File too large" in said else f"{self.limit} bytes: {said}"


DISTURBANCES: Mapping[str, type[Disturbance]] = {"stop": Stop, "signal": Signal, "nan": NotANumber, "disk": Disk}


def disturb(name: str, config: CampaignConfig, root: Path, launch: Launch, reference: Reference) -> Tally:
    """Disturb `config.faults` runs in the way `name`, continue each, and compare them with the reference."""
    tally, choose = Tally(name), random.Random(f"{name} {config.seed}")
    for number in range(config.faults):
        disturbance = DISTURBANCES[name](choose.randrange(config.ranks), choose.randrange(1, 9), choose)
        what = f"{name}-{number}"
        make = partial(configuration, root, what, ranks=config.ranks, seed=config.seed)
        run = make(timeout_s=disturbance.timeout_s, background=number % 2 == 1)
        watched = Watched(run, launch, disturbance, disturbance.spoiled).run()
        tally.tried += 1
        problem = disturbance.problem(watched) if watched.disturbed else "the run has finished as if nothing had been"
        tally.unnoticed += [] if problem is None else [f"{what}: {problem}"]
        compare(watched.directory, reference, tally, what, at_least=disturbance.newest)
        again = Watched(make(), launch, lambda watched: None).run()
        if again.disturbed:
            tally.lost.append(f"{what}: the run cannot continue: {again.failure}")
        compare(watched.directory, reference, tally, f"{what}, end", at_least=STEPS)
    return tally
