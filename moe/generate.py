"""Text generation by full recomputation: every new token runs the whole context again. Always dropless.

Shapes: B batch, S tokens so far, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moe.model import Transformer
from moe.router import Router


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: list[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    stop: int | None = None,
    agree: Callable[[Tensor], Tensor] = lambda logits_V: logits_V,
) -> list[int]:
    """Continue `prompt` by up to `max_tokens` tokens; the prompt is not part of the result.

    Args:
        model: any layout; under expert parallelism every rank calls with the same arguments.
        prompt: at least one token id (usually BOS first).
        temperature: 0 for greedy.
        seed: of the draws, which are made on the CPU.
        stop: token id that ends generation and is not returned.
        agree: makes the logits of several ranks one (a broadcast), so that all choose the same token.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt:
        raise ValueError("prompt=[]: expected at least one token")
    device = model.embedding.device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    with _dropless(model):
        for _ in range(max_tokens):
            tokens_BS = torch.tensor([tokens], device=device)
            positions_BS = torch.arange(len(tokens), device=device).unsqueeze(0)
            logits_V = agree(model(tokens_BS, positions_BS).logits_BSV[0, -1].double())
            chosen = _choose(logits_V.cpu(), temperature, generator)
            if chosen == stop:
                break
            tokens.append(chosen)
    return tokens[len(prompt) :]


@contextmanager
def _dropless(model: Transformer) -> Iterator[None]:
    """Without expert capacity: C depends on the length so far, and a token must not vanish because others came."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    before = [router.capacity_factor for router in routers]
    for router in routers:
        router.capacity_factor = None
    try:
        yield
    finally:
        for router, capacity_factor in zip(routers, before, strict=True):
            router.capacity_factor = capacity_factor


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(dim=-1), 1, generator=generator))
