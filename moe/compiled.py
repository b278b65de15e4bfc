"""torch.compile of the blocks: identical blocks share one compiled graph, because their weights are its inputs.

A graph is traced for each kind of block (dense or MoE, its window) and each kind of call in training: with or without
padding, packed documents and noise, and for each shape. All sizes are constants of a graph, so a call is computed by
the same graph in every run, whatever was computed before it. Functions whose shapes depend on values, such as the loop
over the rows of each expert on a CPU, are operators that torch.compile does not look into (`torch.library`).

Rounding can differ from that of eager code, because a compiled graph adds up in another order.
"""

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._dynamo.exc import TorchDynamoException, Unsupported

from moe.attention.cache import LayerCache
from moe.graph_limit import raise_graph_limit
from moe.layer import Block
from moe.router import RouterStats
from moe.token_context import TokenContext


class CompiledBlocks:
    """Calls blocks through torch.compile (`Transformer.run_block`).

    Calls in evaluation mode and with a cache are eager: an evaluation has batches with and without padding, and would
    wait for graphs that it calls a few times.

    Attributes:
        refusal: why torch.compile cannot compile a block, e.g. of a plugin's router. All calls are eager from then on.
            None: it can.
    """

    def __init__(self, backend: Any = "inductor", alone: bool = True) -> None:
        """
        Args:
            backend: as in torch.compile.
            alone: whether no other rank trains the model. If one does, only failures that all ranks have in common,
                those of tracing, make calls eager. A failure to generate code, which can be that of one rank, is
                an error.
        """
        self._refusing = TorchDynamoException if alone else Unsupported
        self.refusal: str | None = None
        raise_graph_limit()
        compile_clock().listen()
        # In bf16, kernels on GPUs round where eager code rounds, although they keep numbers in fp32.
        options: Any = {"emulate_precision_casts": True} if backend == "inductor" else None
        self._compiled: Any = torch.compile(_call, backend=backend, options=options, fullgraph=True, dynamic=False)

    def __call__(
        self, block: Block, x_BSD: Tensor, context: TokenContext, cache: LayerCache | None
    ) -> tuple[Tensor, RouterStats | None]:
        """Return what `block(x_BSD, context, cache)` returns."""
        if block.training and cache is None and self.refusal is None:
            try:
                compiled: tuple[Tensor, RouterStats | None] = self._compiled(block, x_BSD, context)
                return compiled
            except self._refusing as error:
                cause = getattr(error, "inner_exception", error)
                self.refusal = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        eager: tuple[Tensor, RouterStats | None] = block(x_BSD, context, cache)
        return eager


def _call(block: Block, x_BSD: Tensor, context: TokenContext) -> Any:
    return block(x_BSD, context)


class CompileClock:
    """Counts what torch.compile has compiled in this process, and how long it took.

    Attributes:
        graphs: number of graphs of forward passes.
        seconds: time of compilation, forward and backward passes.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.seconds = 0.0
        self._start = 0.0

    def listen(self) -> None:
        """Count from now on. (`torch.compiler.reset` ends it.)"""
        if self._begin not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self._begin)
            callback_handler.register_end_callback(self._end)

    def _begin(self, args: CallbackArgs) -> None:
        self._start = time.monotonic()
        self.graphs += args.callback_trigger == CallbackTrigger.DYNAMO

    def _end(self, args: CallbackArgs) -> None:
        self.seconds += time.monotonic() - self._start


@cache
def compile_clock() -> CompileClock:
    """Return the clock of this process."""
    return CompileClock()
