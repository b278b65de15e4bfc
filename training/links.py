"""The network between the hosts of a run: which connection has become slow.

In a step, every rank waits for the slowest connection, so the time for which a rank waits does not tell which one it
is. Therefore the first rank of each host (its head) sends `MESSAGE` bytes to that of the next host now and then.
"""

import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from parallel.collectives import all_gather_json
from parallel.mesh import Mesh
from training.report.alarms import Alarm

MESSAGE = 2**20
"""Bytes that one host sends to another one."""
REPEATS = 2
"""How often a connection that seems slow is measured again. The fastest measurement counts."""
FACTOR = 3.0
"""A connection is slow if it needs this many times the usual time."""
LEAST_DELAY_S = 0.005
"""Connections that need fewer seconds than this above the usual time are not called slow."""


class Link(NamedTuple):
    """The connection from one rank to another one, in this direction."""

    sender: int
    receiver: int


class SlowLinks:
    """Names connections between hosts that have become slow, or are slower than others. Creating it is collective.

    A connection is reported if it is slow in two checks in a row. What is usual is the best time of this launch, its
    own or the median of all other connections. So nothing is found if all connections are slow from the start.

    Args:
        heads: the first rank of every host. With fewer than two of them nothing is measured.
        timeout_s: the limit of a measurement.
    """

    def __init__(self, mesh: Mesh, heads: Sequence[int], timeout_s: float) -> None:
        self.mesh, self.rounds = mesh, link_rounds(heads)
        self.groups: dict[frozenset[int], dist.ProcessGroup] = {}
        for link in self.rounds:  # Point-to-point operations would need no groups, but torch 2.13 aborts after them.
            if frozenset(link) not in self.groups:
                pair = dist.new_group(sorted(link), backend="gloo", timeout=timedelta(seconds=timeout_s))
                self.groups[frozenset(link)] = pair
        self.best: dict[Link, float] = {}
        self.suspected: set[Link] = set()
        self.slow: set[Link] = set()

    def check(self, step: int, steps: int) -> tuple[tuple[Alarm, ...], dict[str, float]]:
        """Measure all connections after a step. Collective.

        Args:
            step: the number of steps done.
            steps: the number of them since the last check.

        Returns:
            Alarms about connections that have become slow or are no longer, and metrics of the slowest with them.
        """
        if not self.rounds:
            return (), {}
        times = self._measure()
        self.best = best_times(times, self.best)
        for _ in range(REPEATS):
            if slow_links(times, self.best):
                times = best_times(self._measure(), times)
                self.best = best_times(times, self.best)
        usual, found = usual_times(self.best), slow_links(times, self.best)
        before, self.slow = self.slow, found & (self.suspected | self.slow)
        self.suspected = found
        if before == self.slow:
            return (), {}
        hosts, alarms = all_gather_json(socket.gethostname(), self.mesh.world), []
        for link in sorted(before ^ self.slow):
            sender, receiver = (f"rank {rank} ({hosts[rank]})" for rank in link)
            ended = link not in self.slow
            message = (
                f"the network from {sender} to {receiver} is {'no longer ' * ended}slow: 1 MiB takes "
                f"{times[link]:.3f} s ({MESSAGE / 1e6 / times[link]:.1f} MB/s), and usually {usual[link]:.3f} s"
            )
            alarms.append(Alarm(step, "slow_link", None, message, step - steps, ended))
        row: dict[str, float] = {}
        if self.slow:
            slowest = max(self.slow, key=lambda link: times[link])
            row = {"speed/slow_link_from": slowest.sender, "speed/slow_link_to": slowest.receiver}
            row["speed/slow_link_s"] = times[slowest]
        return tuple(alarms), row

    def _measure(self) -> dict[Link, float]:
        """Return the seconds that the head of each host needs to send to that of the next host. Collective.

        A head does not send and receive at the same time: then it would wait for the slower one of two connections.
        """
        message = torch.zeros(MESSAGE, dtype=torch.uint8)
        times = torch.zeros(len(self.rounds), dtype=torch.float64)
        for turn in range(max(self.rounds.values()) + 1):
            dist.all_reduce(torch.zeros(1), group=self.mesh.world)  # All are ready, and nothing else is on its way.
            start = time.monotonic()
            for place, link in enumerate(self.rounds):
                if self.rounds[link] == turn and self.mesh.rank in link:
                    dist.broadcast(message, link.sender, group=self.groups[frozenset(link)])
                    if self.mesh.rank == link.receiver:
                        times[place] = time.monotonic() - start
        dist.all_reduce(times, group=self.mesh.world)
        return dict(zip(self.rounds, times.tolist(), strict=True))


def link_rounds(heads: Sequence[int]) -> dict[Link, int]:
    """Return the connection from each host to the next one, and its round. A host has one connection in a round.

    >>> list(link_rounds([0, 4, 8]).items())
    [(Link(sender=0, receiver=4), 0), (Link(sender=4, receiver=8), 1), (Link(sender=8, receiver=0), 2)]
    """
    hosts = len(heads)
    if hosts < 2:
        return {}
    links = [Link(sender, heads[(place + 1) % hosts]) for place, sender in enumerate(heads)]
    return {link: 2 if hosts % 2 and place == hosts - 1 else place % 2 for place, link in enumerate(links)}


def usual_times(best: Mapping[Link, float]) -> dict[Link, float]:
    """Return the time that each connection should need: its best time, or the median of the others' if that is less.

    Args:
        best: the shortest time that each connection has needed.
    """
    usual = {}
    for link, seconds in best.items():
        usual[link] = min(seconds, statistics.median(other for place, other in best.items() if place != link))
    return usual


def slow_links(times: Mapping[Link, float], best: Mapping[Link, float]) -> set[Link]:
    """Return the connections that need more than `FACTOR` times their usual time, and `LEAST_DELAY_S` more than it.

    Args:
        times: seconds of each connection now.
        best: as in `usual_times`, with `times` included.
    """
    usual = usual_times(best)
    return {link for link, seconds in times.items() if seconds > max(FACTOR * usual[link], usual[link] + LEAST_DELAY_S)}


def best_times(times: Mapping[Link, float], best: Mapping[Link, float]) -> dict[Link, float]:
    """Return the shorter one of two times of each connection. `best` can be empty."""
    return {link: min(seconds, best.get(link, seconds)) for link, seconds in times.items()}
