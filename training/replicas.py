"""State that several ranks store: whether all of them still have the same bits.

Ranks that store the same weights compute the same updates from the same summed gradients, so weights, moments and
buffers stay equal bit for bit. A difference is a fault: of memory, of a processor, or of the program.
"""

import socket
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import TrainingFailure
from common.text import show_ranges
from parallel.collectives import all_gather_json
from training.engine import Engine

MAX_NAMED = 3
"""The differing tensors of a rank that other ranks hear of by name."""


class _Difference(NamedTuple):
    """A tensor that is not equal on all ranks of a group."""

    name: str
    ranks: list[int]
    fingerprint: int
    """That of this rank's tensor."""


class ReplicaCheck:
    """Compares the state that several ranks store, by a fingerprint of every tensor. Nothing else is sent."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.mesh = engine, engine.mesh
        self.last_equal: int | None = None
        """The last step after which all replicas were equal."""

    def compare(self, done: int) -> None:
        """Compare all replicas after step `done`. Collective. The host waits for the device.

        Raises:
            TrainingFailure: on all ranks. It names the tensor, and the ranks that differ from most others.
        """
        if self.mesh.world_size == 1:
            return
        differences = find_differences(self.engine)
        found = torch.tensor(len(differences))
        dist.all_reduce(found, group=self.mesh.world)
        if not found:
            self.last_equal = done
            return
        report = {"host": socket.gethostname(), "count": len(differences), "first": differences[:MAX_NAMED]}
        named = describe(all_gather_json(report, self.mesh.world))
        before = "not compared before" if self.last_equal is None else f"equal after step {self.last_equal}"
        raise TrainingFailure(f"step {done}: {named}; {before}")


def find_differences(engine: Engine) -> list[_Difference]:
    """Return the tensors of this rank that are not equal on all ranks that store them. Collective."""
    by_group: dict[dist.ProcessGroup, dict[str, Tensor]] = {}
    for name, (tensor, group) in engine.replicas().items():
        if group.size() > 1:
            by_group.setdefault(group, {})[name] = fingerprint(tensor).to(engine.mesh.device)
    reduced = {}
    for group, fingerprints in by_group.items():
        values = torch.stack(list(fingerprints.values()))
        # The smallest value, and the complement of the largest one.
        reduced[group] = (values, torch.stack((values, ~values)))
        dist.all_reduce(reduced[group][1], dist.ReduceOp.MIN, group=group)
    found = []
    for group, (values, (smallest, inverted)) in reduced.items():
        for index in (smallest != ~inverted).nonzero().flatten().tolist():
            name = list(by_group[group])[index]
            found.append(_Difference(name, dist.get_process_group_ranks(group), int(values[index])))
    return found


def fingerprint(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as 64-bit integers, an int64 scalar on its device.

    The sum changes if any single element changes.
    """
    flat = tensor.detach().contiguous().flatten()
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    whole = 8 // flat.element_size()
    if flat.storage_offset() % whole:
        flat = flat.clone()
    end = len(flat) // whole * whole  # 64 bits at once are ten times as fast on CPUs.
    total = flat[:end].view(torch.int64).sum()
    return total + flat[end:].sum(dtype=torch.int64) if end < len(flat) else total


def describe(reports: list[dict[str, Any]]) -> str:
    """Return which ranks differ in which tensor, for the first tensor that differs and that all its ranks name.

    A rank names few tensors, and its first ones can be those of a group that another rank is not in.

    Args:
        reports: by rank: its host, the number of its tensors that differ, and the first `_Difference`s.
    """
    found = []
    for name, ranks, _ in (difference for report in reports for difference in report["first"]):
        prints = {rank: value for rank in ranks for other, _, value in reports[rank]["first"] if other == name}
        found.append((len(ranks) - len(prints), name, ranks, prints))
    _, name, ranks, prints = min(found, key=lambda one: one[0])
    (common, votes), *_ = Counter(prints.values()).most_common(1)
    others = max(report["count"] for report in reports) - 1
    more = f" and {others} more tensor{'s' * (others > 1)}" if others else ""
    what = name.removeprefix("model.") + more
    if 2 * votes <= len(ranks):
        return f"ranks {show_ranges(ranks)} differ in {what}, and no value has a majority"
    odd = [rank for rank, value in prints.items() if value != common]
    hosts = ", ".join(sorted({reports[rank]["host"] for rank in odd}))
    same = [rank for rank in prints if rank not in odd]
    plural = len(odd) > 1
    return (
        f"rank{'s' * plural} {show_ranges(odd)} ({hosts}) differ{'s' * (not plural)} from rank{'s' * (len(same) > 1)} "
        f"{show_ranges(same)} in {what}"
    )
