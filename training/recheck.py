"""A step that is computed twice: whether this machine computes the same bits again."""

import socket

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import TrainingFailure
from moe.config import RouterConfig
from parallel.collectives import all_gather_json
from training.engine import NativeEngine
from training.replicas import fingerprint
from training.step import StepInputs, StepLoss


def recheck(engine: NativeEngine, inputs: StepInputs, router: RouterConfig, done: int) -> None:
    """Compute the gradients of a step twice, compare their bits, and forget them. Collective.

    The same inputs give the same bits on CPUs, and on GPUs with `run.deterministic=true`. If they do not, a processor
    or memory is at fault. Ranks exchange activations and gradients, so that other ranks can differ as a consequence.

    Args:
        done: the number of steps done before.

    Raises:
        TrainingFailure: on all ranks. It names the ranks of which a gradient differs, and one parameter.
    """
    first, second = (_gradient_fingerprints(engine, inputs, router) for _ in range(2))
    differing = [name for name, value in first.items() if second[name] != value]
    found = torch.tensor(len(differing))
    dist.all_reduce(found, group=engine.mesh.world)
    if found:
        reports = all_gather_json([socket.gethostname(), differing[-1:]], engine.mesh.world)
        named = "; ".join(f"rank {rank} ({host}): {name[0]}" for rank, (host, name) in enumerate(reports) if name)
        raise TrainingFailure(f"step {done + 1}: computed twice, with different gradients on {named}")


def _gradient_fingerprints(engine: NativeEngine, inputs: StepInputs, router: RouterConfig) -> dict[str, int]:
    """Return the fingerprint of this rank's gradient of every parameter, before gradients are summed over ranks."""
    config = engine.parts[0].config
    engine.run(inputs.inputs, StepLoss(inputs.batches, router, config, engine.mesh, (inputs.labels, inputs.tokens)))
    engine.trainable.collect_gradients()
    found: dict[str, Tensor] = {
        name: fingerprint(parameter.grad) for name, parameter in engine.parameters.items() if parameter.grad is not None
    }
    engine.trainable.clear_gradients()
    return {name: int(value) for name, value in found.items()}
