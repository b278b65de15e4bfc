"""The largest number of graphs that torch.compile makes of a function in one process."""

from typing import Any

import torch

MAX_GRAPHS = 64
"""torch's own limit of 8 is too small for the dtypes, windows, masks and kinds of calls of a model. Beyond the limit, a
function compiled with `fullgraph=True` raises an error; it is not run eagerly."""


def raise_graph_limit() -> None:
    """Set the limit to `MAX_GRAPHS`, unless it is higher."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MAX_GRAPHS)
