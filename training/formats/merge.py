"""A run with adapters as the model that it computes: the products of the adapters are added to the weights."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from common.errors import ModelError, require
from moe.config import split_adapter_name
from moe.region import Region
from training.formats.reader import ModelReader, ReadRequest


class MergedReader(ModelReader):
    """Reads the model of a run with adapters as one without them.

    Each matrix is computed in fp64 as a whole, also if a part of it is requested, and then rounded to the requested
    dtype. The result therefore depends on the values of the weights and of the adapters only.

    Args:
        source: a reader of a run with adapters.
    """

    def __init__(self, source: ModelReader) -> None:
        assert source.model.adapter is not None
        self.kind, self.path, self.directory, self.shown = source.kind, source.path, source.directory, source.shown
        self.model, self.router = replace(source.model, adapter=None), source.router
        self.source, self.scale = source, source.model.adapter.scale
        self.adapters: dict[str, dict[str, str]] = {}
        """Weight -> which parameter of its adapter -> its name."""
        for name in source.shapes:
            weight, part = split_adapter_name(name)
            if part is not None:
                self.adapters.setdefault(weight, {})[part] = name
        self.shapes = {name: shape for name, shape in source.shapes.items() if split_adapter_name(name)[1] is None}

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def copy(self, requests: Iterable[ReadRequest]) -> None:
        unchanged = []
        for request in requests:
            name, region, target = request
            if name not in self.adapters:
                unchanged.append(request)
            elif len(region.shape) == 2:
                target.copy_(self._merged(name)[region.slices(Region.whole(self.shapes[name]))])
            else:
                matrix = Region(region.offset[1:], region.shape[1:]).slices(Region.whole(self.shapes[name][1:]))
                for index in range(region.shape[0]):
                    target[index].copy_(self._merged(name, region.offset[0] + index)[matrix])
        self.source.copy(unchanged)

    def _merged(self, name: str, expert: int | None = None) -> Tensor:
        """Return a whole matrix with its adapter, in fp64.

        Args:
            expert: the index of a matrix in a stack; None: the weight is one matrix.
        """

        def read(name: str) -> Tensor:
            shape = self.source.shapes[name]
            if expert is None:
                return self.source.read(name, Region.whole(shape), torch.float64)
            region = Region((expert, *(0 for _ in shape[1:])), (1, *shape[1:]))
            return self.source.read(name, region, torch.float64).squeeze(0)

        parts = {part: read(parameter) for part, parameter in self.adapters[name].items()}
        weight = torch.addmm(read(name), parts["b"], parts["a"], alpha=self.scale)
        if "magnitude" in parts:
            weight *= (parts["magnitude"] / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
        return weight


def without_adapters(reader: ModelReader) -> ModelReader:
    """Return a reader of the same model without adapters: `reader` itself, or one that merges them into the weights."""
    return reader if reader.model.adapter is None else MergedReader(reader)


def expect_no_adapters(reader: ModelReader, shown: str) -> None:
    """Raise ModelError if the model has adapters.

    Args:
        shown: the key and the directory, for the message.
    """
    require(
        reader.model.adapter is None,
        ModelError,
        f"{shown}: expected a model without adapters; python scripts/merge.py run={reader.path} out=DIR merges them",
    )
