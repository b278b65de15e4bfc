"""What can go wrong in a step without an error, and how a run notices it.

Every check uses figures that all ranks have alike, so all ranks come to the same conclusion. After most steps nothing
is exchanged, and the host never waits for the device.
"""

import math
import socket
import statistics
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from common.text import show_ranges
from parallel.collectives import all_gather_json
from parallel.mesh import Mesh
from parallel.weight_specs import kind
from training.config import HealthConfig
from training.links import SlowLinks
from training.report.alarms import Alarm
from training.router_health import RouterHealth, StepFigures
from training.steps import FinishedStep

MAX_REFUSED = 5
"""A step whose gradient norm is not finite changes no weight. After this many in a row the run stops or goes back."""

WINDOW = 64
"""The number of recent losses with which a loss is compared."""
FEWEST_LOSSES = 5
"""No loss is compared with fewer than these."""
NORMAL_MAD = 1.4826
"""The standard deviation of a normal distribution, divided by its median absolute deviation."""
LEAST_DEVIATION = 0.02
"""The standard deviation is taken to be at least this share of the median. Losses that are almost equal would otherwise
make every other loss a spike."""

STEPS = 10
"""The number of steps whose times are compared between ranks at once. The network is measured as often."""
LEAST_DELAY_S = 0.05
"""Ranks that differ by fewer seconds in a step are not called slow."""


class Finding(NamedTuple):
    """What is wrong with a step. The same on all ranks, apart from `lines` and `alarms`, which rank 0 prints."""

    lines: tuple[str, ...] = ()
    row: Mapping[str, Any] = {}
    """Metrics of the step, under their names in `metrics.jsonl`."""
    alarms: tuple[Alarm, ...] = ()
    """Those that start or end."""
    writes: bool = False
    """Whether the row of the step is written although it is not due (`Health.check` decides it)."""
    problem: str | None = None
    """Why the run cannot go on from here."""
    bad_steps: int = 0
    """The number of steps, up to this one, that have the problem."""
    goes_back: bool = False
    """Whether the configuration wants the run to go back to a checkpoint."""
    ends_run: bool = True
    """Whether the problem ends the run if it does not go back. Otherwise it goes on as it is."""


class Health:
    """All checks of a run. Creating it is collective.

    Args:
        heads: the first rank of each host.
        timeout_s: the limit of a collective.
        routers: the rules over the routers; None: the model is dense.
    """

    def __init__(
        self,
        config: HealthConfig,
        mesh: Mesh,
        heads: Sequence[int],
        timeout_s: float,
        routers: RouterHealth | None = None,
    ) -> None:
        self.refused, self.spikes, self.slow = RefusedSteps(config, mesh), LossSpikes(config), SlowRanks(mesh)
        self.links, self.steps = SlowLinks(mesh, heads, timeout_s), 0
        self.routers = routers

    def check(self, step: FinishedStep) -> Finding:
        """Look at a finished step. Collective; nothing is exchanged after most steps."""
        refused, spike, slow = self.refused.check(step), self.spikes.check(step), self.slow.check(step)
        result, router_alarms = step.result, list[Alarm]()
        if self.routers is not None and result.counts_LE is not None:
            norms_L = () if result.norms_2LF is None else result.norms_2LF[1, :, 0].tolist()
            router_alarms = self.routers.check(step.done, StepFigures(result.counts_LE, result.layers, norms_L))
        self.steps += 1
        link_alarms, link_row = self.links.check(step.done, STEPS) if self.steps % STEPS == 0 else ((), {})
        alarms = (*router_alarms, *spike.alarms, *slow.alarms, *link_alarms)
        # Alarms about speed are not among the metrics, which do not depend on the clock except for `speed/`.
        ended = {f"alarm/{alarm.rule}": 0 for alarm in (*router_alarms, *spike.alarms) if alarm.ended}
        active = {"alarm/loss_spike": 1} if self.spikes.since is not None else {}
        if self.routers is not None:
            active |= self.routers.row()
        found = refused if refused.problem else spike
        return found._replace(
            lines=refused.lines,
            row={**refused.row, **spike.row, **slow.row, **link_row, **ended, **active},
            alarms=alarms,
            writes=bool(alarms or refused.row or slow.row),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a later launch needs to come to the same conclusions, as JSON values."""
        return self.spikes.state_dict() | ({} if self.routers is None else {"routers": self.routers.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as after `state`, which is empty for a new run."""
        self.refused.in_a_row = 0  # No checkpoint is written after a step that was refused.
        self.slow.times.clear()
        self.spikes.load_state_dict(state)
        if self.routers is not None:
            self.routers.load_state_dict(state.get("routers", {}))


class LossSpikes:
    """Finds a loss that is far above those of the steps before, by their median and median absolute deviation."""

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.since: int | None = None
        """The first of the last steps whose loss was too high. Only this one is reported, and the end."""

    def check(self, step: FinishedStep) -> Finding:
        """Look at a finished step. A loss that is not finite is left to `RefusedSteps`."""
        loss, z = step.result.loss, self.z_score(step.result.loss)
        if not math.isfinite(loss):
            return Finding()
        typical = statistics.median(self.losses) if self.losses else loss
        self.losses.append(loss)
        since, above = self.since, self.config.spike_z is not None and z > self.config.spike_z
        if above == (since is not None):
            return Finding()
        if since is not None:
            self.since = None
            message = f"the loss is {loss:.5g}, as before the jump in step {since}"
            return Finding(alarms=(Alarm(step.done, "loss_spike", None, message, since, ended=True),))
        self.since = step.done
        message = f"the loss is {loss:.5g}, after a median of {typical:.5g} (robust z-score {z:.3g})"
        back = self.config.on_spike == "rewind"
        alarm = Alarm(step.done, "loss_spike", None, message, step.done)
        return Finding((), {"health/loss_z": z}, (alarm,), False, message if back else None, 1, back, ends_run=False)

    def z_score(self, loss: float) -> float:
        """Return how many standard deviations `loss` is above the median of the losses before; 0 if they are few.

        The standard deviation is that of a normal distribution with the same median absolute deviation (MAD), and at
        least `LEAST_DEVIATION` of the median.
        """
        if len(self.losses) < FEWEST_LOSSES:
            return 0.0
        median = statistics.median(self.losses)
        mad = statistics.median(abs(one - median) for one in self.losses)
        return (loss - median) / max(NORMAL_MAD * mad, LEAST_DEVIATION * abs(median), sys.float_info.min)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent losses as JSON values."""
        return {"losses": list(self.losses), "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as after `state`; empty: as at the start."""
        self.losses = deque(state.get("losses", ()), maxlen=WINDOW)
        self.since = state.get("since")


class SlowRanks:
    """Names ranks that need much more time for a step than the others, without the time in which they wait for others.

    The times of `STEPS` steps are compared at once. A single slow step, in which a rank compiles or reads a file, does
    not change their median.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.times: list[float] = []
        self.slow: set[int] = set()

    def check(self, step: FinishedStep) -> Finding:
        """Look at a finished step. Collective after every `STEPS` steps."""
        if self.mesh.world_size == 1:
            return Finding()
        self.times.append(step.own_seconds)
        if len(self.times) < STEPS:
            return Finding()
        times = torch.zeros(self.mesh.world_size, dtype=torch.float64)
        times[self.mesh.rank], self.times = statistics.median(self.times), []
        dist.all_reduce(times, group=self.mesh.world)
        before, self.slow = self.slow, slow_ranks(times.tolist(), self.mesh.layout.pipeline)
        changed = before ^ self.slow
        if not changed:
            return Finding()
        hosts, alarms, first = all_gather_json(socket.gethostname(), self.mesh.world), [], step.done - STEPS + 1
        for rank in sorted(changed):
            others, ended = (
                statistics.median(peers(times.tolist(), rank, self.mesh.layout.pipeline)),
                rank not in self.slow,
            )
            message = (
                f"rank {rank} ({hosts[rank]}) is {'no longer ' * ended}slow: it needs {times[rank]:.2f} s for a step, "
                f"and other ranks {others:.2f} s (steps {first} to {step.done}, without waiting for each other)"
            )
            alarms.append(Alarm(step.done, "slow_rank", None, message, first, ended))
        row = (
            {"speed/slow_rank": min(self.slow), "speed/slow_rank_s": float(times[min(self.slow)])} if self.slow else {}
        )
        return Finding((), row, tuple(alarms))


def slow_ranks(times: Sequence[float], stages: int) -> set[int]:
    """Return the ranks whose time is more than twice the median of their peers, or a second and a quarter of it longer.

    Differences below `LEAST_DELAY_S` do not count.

    Args:
        times: seconds for a step, by rank.
        stages: the pipeline ranks.
    """
    slow = set()
    for rank, own in enumerate(times):
        others = statistics.median(peers(times, rank, stages))
        if own > others + LEAST_DELAY_S and (own > 2 * others or own > max(others + 1, 1.25 * others)):
            slow.add(rank)
    return slow


def peers(times: Sequence[float], rank: int, stages: int) -> list[float]:
    """Return the times of the other ranks with the same layers; if there is none, of all other ranks."""
    size = len(times) // stages
    first = rank // size * size
    same_layers = [times[other] for other in range(first, first + size) if other != rank]
    return same_layers or [time for other, time in enumerate(times) if other != rank]


class RefusedSteps:
    """Names the rank and the parameter whose gradient is not finite, and counts such steps in a row."""

    def __init__(self, config: HealthConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.in_a_row = 0

    def check(self, step: FinishedStep) -> Finding:
        """Look at a finished step. Collective if its gradient norm is not finite, which is so on all ranks or none."""
        norm = step.result.grad_norm
        if math.isfinite(norm):
            self.in_a_row = 0
            return Finding()
        self.in_a_row += 1
        own = {"host": socket.gethostname(), "parameters": len(step.nonfinite), "last": step.nonfinite[-1:]}
        found = {rank: report for rank, report in enumerate(all_gather_json(own, self.mesh.world)) if report["last"]}
        row: dict[str, Any] = {"health/refused_in_a_row": self.in_a_row}
        if found:
            first = min(found)
            row |= {"health/refused_rank": first, "health/refused_parameter": found[first]["last"][0]}
        reaction = "the run goes back" if self.config.on_nan == "rewind" else "the run ends"
        line = (
            f"step {step.done} changed no weight: its gradient norm is {norm}; {self._origin(found)} "
            f"({self.in_a_row} in a row; after {MAX_REFUSED} {reaction})"
        )
        if self.in_a_row < MAX_REFUSED:
            return Finding((line,), row)
        count, self.in_a_row = self.in_a_row, 0
        problem = f"the gradient norm has not been finite for {count} steps in a row"
        return Finding((line,), row, (), False, problem, count, self.config.on_nan == "rewind")

    def _origin(self, found: dict[int, dict[str, Any]]) -> str:
        """Return which ranks have which gradients that are not finite, before gradients are summed over ranks."""
        if not found:
            return "the engine does not know on which rank"
        # The backward pass carries a value that is not finite from the last parameter to those before it.
        by_content: dict[tuple[str, int], list[int]] = {}
        for rank, report in found.items():
            by_content.setdefault((report["last"][0], report["parameters"]), []).append(rank)
        places = []
        for (last, parameters), ranks in by_content.items():
            hosts = ", ".join(sorted({found[rank]["host"] for rank in ranks}))
            more = f" and {parameters - 1} before it" if parameters > 1 else ""
            places.append(f"rank{'s' * (len(ranks) > 1)} {show_ranges(ranks)} ({hosts}): the gradient of {last}{more}")
        shards = self.mesh.shard.size() if any(kind(last) != "router" for last, _ in by_content) else 1
        summed = f" (parallel.shard: summed over {shards} ranks before it is checked)" if shards > 1 else ""
        return "; ".join(places) + summed
