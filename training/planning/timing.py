"""The time of a step, from the operators and collectives of a traced step and the rates of a device.

An operator takes the longer of two times: that of its bytes and that of its floating-point operations. A collective
takes the time of its bytes over its slowest link, and some time to start. What is exposed is an assumption for each
axis:

- `shard`: FSDP gathers weights and scatters gradients while the device computes. What this and its copies take longer
  than the computation of the same phase is exposed. On CPUs all of it is.
- `expert`: exposed, or half of it with `parallel.overlap`.
- all others: exposed.
"""

from collections.abc import Sequence

from parallel.layout import Layout
from parallel.planning.hardware import Hardware
from parallel.planning.plan import bubble
from parallel.planning.times import StepTimes, start_seconds, transfer_seconds
from parallel.planning.traffic import Axis
from parallel.stages import Schedule
from training.planning.operators import Operator
from training.planning.trace import Collective, Trace

MATMULS = ("dense matmul", "grouped matmul")
FSDP_COPIES = "copies of FSDP"
PASSES = ("forward", "backward")
IN_PASSES: tuple[Axis, ...] = ("expert", "expert_tensor", "tensor", "context")
"""Axes that communicate within a stage's passes, for which the next stage waits."""


def step_times(trace: Trace, layout: Layout, accumulation: int, schedule: Schedule, hardware: Hardware) -> StepTimes:
    """Return the times of a step of `accumulation` micro-batches, of which `trace.micro_batches` were traced."""
    repeats = accumulation / trace.micro_batches
    passes = [operator for operator in trace.operators if operator.phase in PASSES]
    seconds = {"matmul": 0.0, "attention": 0.0, "memory-bound": 0.0}
    for operator in passes:
        if operator.group != FSDP_COPIES:
            seconds[kind_of(operator)] += operator.seconds(hardware) * repeats
    computation = sum(seconds.values())
    update = sum(operator.seconds(hardware) for operator in trace.operators if operator.phase not in PASSES)
    exposed: dict[Axis, float] = {}
    for axis in {collective.axis for collective in trace.collectives}:
        here = [collective for collective in trace.collectives if collective.axis == axis]
        once = axis in ("gradients", "bookkeeping") or (axis == "shard" and layout.pipeline > 1)
        waits = _exposed(here, passes, hardware) if axis == "shard" else sum(cost(each, hardware) for each in here)
        exposed[axis] = waits * (1 if once else repeats) * (0.5 if axis == "expert" and layout.overlap else 1)
    idle = bubble(layout.pipeline, accumulation, schedule)
    busy = computation + sum(exposed.get(axis, 0.0) for axis in IN_PASSES)
    return StepTimes(
        matmul=seconds["matmul"],
        attention=seconds["attention"],
        memory_bound=seconds["memory-bound"],
        update=update,
        exposed=exposed,
        bubble=busy * idle / (1 - idle),
    )


def kind_of(operator: Operator) -> str:
    """Return which part of the times an operator of a forward or backward pass belongs to."""
    if operator.group in MATMULS:
        return "matmul"
    return "attention" if operator.group == "attention core" else "memory-bound"


def cost(collective: Collective, hardware: Hardware) -> float:
    """Return the time of one collective."""
    size = len(collective.ranks)
    if size == 1 or (not collective.sent and collective.name.startswith("recv")):
        return 0.0
    inside = max(1, len([rank for rank in collective.ranks if _same_node(rank, collective.ranks[0], hardware)]))
    ring = collective.name != "alltoall_base_"
    transfer = transfer_seconds(hardware, inside, size, collective.sent, ring=ring)
    return transfer + start_seconds(hardware, inside, size)


def _same_node(rank: int, other: int, hardware: Hardware) -> bool:
    return rank // hardware.gpus_per_node == other // hardware.gpus_per_node


def _exposed(collectives: Sequence[Collective], operators: Sequence[Operator], hardware: Hardware) -> float:
    """Return what is exposed of the communication of FSDP, which runs while a GPU computes."""
    exposed = 0.0
    for phase in PASSES:
        here = [operator for operator in operators if operator.phase == phase]
        sending = sum(cost(collective, hardware) for collective in collectives if collective.phase == phase)
        copying = sum(operator.seconds(hardware) for operator in here if operator.group == FSDP_COPIES)
        # A CPU that sends does not compute.
        hidden = 0.0 if hardware.capability is None else sum(operator.seconds(hardware) for operator in here) - copying
        exposed += max(0.0, sending + copying - hidden)
    return exposed
