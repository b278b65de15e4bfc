"""What can go wrong in a step without an error, and how a run notices it.

Every check uses figures that all ranks have alike, so all ranks come to the same conclusion and no rank waits for
another. A step in which all is well costs no additional collective, and the host does not wait for the device.
"""

import math
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

from common.text import show_ranges
from parallel.collectives import all_gather_json
from parallel.mesh import Mesh
from parallel.weight_specs import kind
from training.config import HealthConfig
from training.steps import FinishedStep

MAX_REFUSED = 5
"""A step whose gradient norm is not finite changes no weight. After this many in a row the run stops or goes back."""


class Finding(NamedTuple):
    """What is wrong with a step. The same on all ranks, apart from `lines`, which rank 0 prints."""

    lines: tuple[str, ...] = ()
    row: Mapping[str, Any] = {}
    """Metrics of the step, under their names in `metrics.jsonl`."""
    problem: str | None = None
    """Why the run cannot go on from here."""
    bad_steps: int = 0
    """The number of steps, up to this one, that have the problem."""
    goes_back: bool = False
    """Whether the configuration wants the run to go back to a checkpoint. Otherwise a problem ends it."""


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
        return Finding((line,), row, problem, count, self.config.on_nan == "rewind")

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
