"""A model directory as a model on this rank, for generation and evaluation."""

import torch

from moe.model import Transformer
from moe.quantization import QuantizeConfig
from parallel.apply import Storage, build_model
from parallel.config import ParallelConfig
from parallel.mesh import Mesh, build_mesh
from training.formats.reader import ModelReader


def load_model(
    source: ModelReader, device: torch.device, dtype: torch.dtype, quantize: QuantizeConfig
) -> tuple[Transformer, Mesh]:
    """Return this rank's part of the model, with its weights, and the mesh of the initialised world.

    The experts are spread over the ranks; everything else is replicated. The model cannot train.

    Args:
        dtype: compute dtype, in which the weights are stored unless `quantize` stores them in fewer bits.

    Raises:
        ModelError: a file of the directory cannot be read.
    """
    world_size = torch.distributed.get_world_size()
    mesh = build_mesh(device, ParallelConfig().layout(world_size, source.model))
    storage = Storage(inference=True, quantize=quantize)
    model = build_model(source.model, source.router, mesh, compute_dtype=dtype, seed=None, storage=storage)
    source.fill(model)
    return model, mesh
