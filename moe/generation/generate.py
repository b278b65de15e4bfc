"""Text generation through the cache: prompts in chunks, then one token a row and step. Always dropless and causal.

Shapes: B rows (prompts), S tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moe.attention.cache import Cache
from moe.generation.sampling import Chooser, Sampling
from moe.model import ModelInputs, Transformer
from moe.router import Router

PREFILL_CHUNK = 512
"""Prompt tokens of a row that run through the model at once."""


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    prefill_chunk: int = PREFILL_CHUNK,
    on_token: Callable[[int, int], bool | None] = lambda row, token: None,
    on_end: Callable[[int], None] = lambda row: None,
    agree: Callable[[Tensor], Tensor] = lambda logits_BV: logits_BV,
) -> list[list[int]]:
    """Continue each prompt by up to `max_tokens` tokens; the prompts are not part of the result.

    Args:
        model: any layout; under expert parallelism every rank calls with the same arguments, and all go on until the
            last row ends.
        prompts: of any lengths, each at least one token id (usually BOS first).
        sampling: None for greedy.
        stop: token ids that end a row and are not returned.
        on_token: called with (row, token id) as soon as a token is chosen, the rows of a step in order; a true result
            ends the row after this token. Under expert parallelism its results must be the same on all ranks.
        on_end: called with the row once it has ended.
        agree: makes the logits of several ranks one (a broadcast), so that all choose the same tokens.

    Raises:
        ValueError: no prompt, an empty one, token ids beyond the vocabulary, or a number below its least.
    """
    _check(prompts, model.config.vocab_size or 0, max_tokens, prefill_chunk)
    out: list[list[int]] = [[] for _ in prompts]
    if max_tokens == 0:
        return out
    device = model.embedding.device
    choose = Chooser(sampling or Sampling(), len(prompts))
    longest = max(map(len, prompts)) + max_tokens - 1  # the last token is never fed back
    cache = Cache(model.config, len(prompts), max_len=longest, dtype=model.compute_dtype, device=device)
    with _generating(model):
        logits_BV = agree(_prefill(model, cache, prompts, prefill_chunk))
        rows = list(range(len(prompts)))
        while True:
            going_on = []
            for row, token in zip(rows, choose(logits_BV[rows], rows), strict=True):
                ended = token in stop
                if not ended:
                    out[row].append(token)
                    ended = bool(on_token(row, token)) or len(out[row]) == max_tokens
                if ended:
                    on_end(row)
                else:
                    going_on.append(row)
            rows = going_on
            if not rows:
                return out
            logits_BV = agree(_step(model, cache, out, rows))


def _check(prompts: Sequence[Sequence[int]], vocab_size: int, max_tokens: int, prefill_chunk: int) -> None:
    if not prompts:
        raise ValueError("prompts=[]: expected at least one prompt")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{row}]=[]: expected at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"prompts[{row}]: expected token ids from 0 to {vocab_size - 1}, found {max(prompt)}")
    for key, value, least in (("max_tokens", max_tokens, 0), ("prefill_chunk", prefill_chunk, 1)):
        if value < least:
            raise ValueError(f"{key}={value}: expected an integer >= {least}")


def _prefill(model: Transformer, cache: Cache, prompts: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """Run the prompts, padded on the right, through the model; returns the logits after the last token of each, fp64
    [B, V]."""
    longest = max(map(len, prompts))
    device = model.embedding.device
    tokens_BS = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    after: list[Tensor | None] = [None] * len(prompts)
    for start in range(0, longest, chunk):
        piece_BS = tokens_BS[:, start : start + chunk]
        positions_BS = torch.arange(start, start + piece_BS.shape[1], device=device).expand_as(piece_BS)
        valid_BS = positions_BS < lengths_B.unsqueeze(1)
        # A row that is through stays where it stopped.
        positions_BS = positions_BS.where(valid_BS, (lengths_B - 1).unsqueeze(1))
        inputs = ModelInputs(piece_BS, positions_BS, valid_BS=valid_BS)
        logits_BSV = model(inputs, cache=cache).logits_BSV
        for row, prompt in enumerate(prompts):
            if start < len(prompt) <= start + chunk:
                after[row] = logits_BSV[row, len(prompt) - 1 - start].double()
    return torch.stack([logits_V for logits_V in after if logits_V is not None])


def _step(model: Transformer, cache: Cache, out: list[list[int]], rows: list[int]) -> Tensor:
    """Feed the newest token of each of `rows`; returns fp64 logits [B, V], without meaning for the other rows."""
    device = model.embedding.device
    tokens_B1 = torch.tensor([[tokens[-1] if tokens else 0] for tokens in out], device=device)
    valid_B1 = None
    if len(rows) < len(out):
        valid_B1 = torch.zeros_like(tokens_B1, dtype=torch.bool)
        valid_B1[rows] = True
    inputs = ModelInputs(tokens_B1, cache.next_positions(1), valid_BS=valid_B1)
    return model(inputs, cache=cache).logits_BSV[:, 0].double()


@contextmanager
def _generating(model: Transformer) -> Iterator[None]:
    """In evaluation mode (no jitter), and every token routed as if it were alone.

    Without expert capacity: C depends on the length so far, and a token must not vanish because others came. Experts
    that choose tokens would need the whole sequence: instead each token takes its `top_k` most probable experts, with
    these probabilities as weights.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    training = model.training
    model.eval()
    for router in routers:
        router.generating = True
    try:
        yield
    finally:
        model.train(training)
        for router in routers:
            router.generating = False
