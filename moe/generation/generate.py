"""Text generation with a key/value cache: prompts in chunks, then one token per row and step.

Generation is dropless and causal, whatever the router's configuration.

Shapes: B rows (prompts), S tokens of a chunk, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from moe.attention.cache import Cache
from moe.generation.sampling import Chooser, Sampling
from moe.model import ModelInputs, Output, Transformer
from moe.router import Router

PREFILL_CHUNK = 512
"""Prompt tokens per row that one forward pass processes."""


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
    """Continue each prompt by up to `max_tokens` tokens.

    Args:
        model: a model on one rank, or under expert parallelism its part on each rank. Then every rank must call this
            function with the same arguments, and all ranks run until the last row has ended.
        prompts: token ids of each row, at least one per row (usually BOS first). Rows can differ in length.
        sampling: how tokens are chosen; None: greedy.
        stop: token ids that end a row. They are not returned.
        prefill_chunk: prompt tokens per row that one forward pass processes.
        on_token: called with (row, token id) when a token has been chosen, for the rows of a step in order. If it
            returns True, the row ends after this token. Under expert parallelism it must return the same on all ranks.
        on_end: called with the row when it has ended.
        agree: maps the logits of this rank to logits that are the same on all ranks (a broadcast), so that all ranks
            choose the same tokens.

    Returns:
        The new token ids of each row, without the prompt.

    Raises:
        ValueError: no prompt, an empty prompt, a token id outside the vocabulary, `max_tokens` below 0, or
            `prefill_chunk` below 1.
    """
    _check(prompts, model.config.vocab_size or 0, max_tokens, prefill_chunk)
    out: list[list[int]] = [[] for _ in prompts]
    if max_tokens == 0:
        return out
    device = model.embedding.device
    choose = Chooser(sampling or Sampling(), len(prompts))
    longest = max(map(len, prompts)) + max_tokens - 1  # the last token is not fed to the model
    cache = Cache(model.config, len(prompts), max_len=longest, dtype=model.compute_dtype, device=device)
    with generating(model):
        logits_BV = agree(_prefill(model, cache, prompts, prefill_chunk))
        rows = list(range(len(prompts)))
        while True:
            unfinished = []
            for row, token in zip(rows, choose(logits_BV[rows], rows), strict=True):
                ended = token in stop
                if not ended:
                    out[row].append(token)
                    ended = bool(on_token(row, token)) or len(out[row]) == max_tokens
                if ended:
                    on_end(row)
                else:
                    unfinished.append(row)
            rows = unfinished
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
    """Run the prompts, padded on the right, through the model in chunks.

    Returns:
        The logits after the last token of each prompt, fp64 [B, V].
    """
    longest = max(map(len, prompts))
    device = model.embedding.device
    tokens_BS = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    logits_by_row: list[Tensor | None] = [None] * len(prompts)
    for start in range(0, longest, chunk):
        chunk_BS = tokens_BS[:, start : start + chunk]
        positions_BS = torch.arange(start, start + chunk_BS.shape[1], device=device).expand_as(chunk_BS)
        valid_BS = positions_BS < lengths_B.unsqueeze(1)
        # Padding gets the position of the row's last token.
        positions_BS = positions_BS.where(valid_BS, (lengths_B - 1).unsqueeze(1))
        inputs = ModelInputs(chunk_BS, positions_BS, valid_BS=valid_BS)
        logits_BSV = model(inputs, cache=cache).logits_BSV
        for row, prompt in enumerate(prompts):
            if start < len(prompt) <= start + chunk:
                logits_by_row[row] = logits_BSV[row, len(prompt) - 1 - start].double()
    return torch.stack([logits_V for logits_V in logits_by_row if logits_V is not None])


def _step(model: Transformer, cache: Cache, out: list[list[int]], rows: list[int]) -> Tensor:
    """Feed the newest token of each row in `rows`. Return fp64 logits [B, V], which mean nothing for other rows."""
    device = model.embedding.device
    tokens_B1 = torch.tensor([[tokens[-1] if tokens else 0] for tokens in out], device=device)
    valid_B1 = None
    if len(rows) < len(out):
        valid_B1 = torch.zeros_like(tokens_B1, dtype=torch.bool)
        valid_B1[rows] = True
    inputs = ModelInputs(tokens_B1, cache.next_positions(1), valid_BS=valid_B1)
    output: Output = model(inputs, cache=cache)
    return output.logits_BSV[:, 0].double()


@contextmanager
def generating(model: Transformer) -> Iterator[None]:
    """A context in which the model is in evaluation mode, without jitter, and its routers route each token on its own.

    Expert capacity is ignored: it depends on the length of the sequence so far, and a token must not be dropped because
    of other tokens. Expert choice needs the whole sequence. Each token instead takes its `top_k` most probable experts,
    with their probabilities as weights.
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
