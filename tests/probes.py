"""A probe with made-up routings, for tests of what reads one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.report.probe import (
    PROBE,
    TOKENS_FILE,
    ProbeRouting,
    ProbeTokens,
    step_file,
    write_routing,
    write_tokens,
)

WORDS = ("def", " f", "(", "x", ")", ":", "\n", " the", " cat", " 1", "+", " é")


def synthetic_tokens(num_tokens: int = 48, domains: Sequence[str] = ("code", "prose", "arithmetic")) -> ProbeTokens:
    """Excerpts of eight tokens. Each is from another document, and the domains alternate."""
    tokens_T = np.arange(num_tokens, dtype=np.int32) * 5 % len(WORDS)
    excerpts_T = np.arange(num_tokens, dtype=np.int32) // 8
    domain_T = excerpts_T % len(domains)
    pieces = tuple(WORDS[token] for token in tokens_T)
    return ProbeTokens(tuple(domains), tokens_T, excerpts_T * 3, domain_T, excerpts_T, pieces)


def synthetic_routing(
    tokens: ProbeTokens, *, layers: int = 2, num_experts: int = 8, top_k: int = 2, settled: float = 0.0, seed: int = 0
) -> ProbeRouting:
    """A random routing. A share `settled` of the tokens goes to the experts that follow the token's domain."""
    draws = np.random.default_rng(seed)
    logits_LTE = draws.normal(size=(layers, len(tokens.tokens_T), num_experts))
    follows_T = draws.random(len(tokens.tokens_T)) < settled
    for k in range(top_k):
        logits_LTE[:, follows_T, (tokens.domain_T[follows_T] + k) % num_experts] += 8 - k
    probs_LTE = np.exp(logits_LTE)
    probs_LTE /= probs_LTE.sum(axis=2, keepdims=True)
    order_LTE = np.argsort(-probs_LTE, axis=2, kind="stable").astype(np.int32)
    sorted_LTE = np.take_along_axis(probs_LTE, order_LTE, axis=2)
    weights_LTK = sorted_LTE[..., :top_k] / sorted_LTE[..., :top_k].sum(axis=2, keepdims=True)
    margin_LT = (
        sorted_LTE[..., top_k - 1] - sorted_LTE[..., top_k]
        if top_k < num_experts
        else np.full(order_LTE.shape[:2], np.nan)
    )
    return ProbeRouting(
        order_LTE[..., :top_k], weights_LTK.astype(np.float32), margin_LT.astype(np.float32), num_experts
    )


def write_synthetic_probe(
    run_directory: Path, steps: Sequence[int] = (0, 1, 2, 4, 8, 10), *, layers: int = 2, num_experts: int = 8,
    top_k: int = 2, num_tokens: int = 48,
) -> dict[int, ProbeRouting]:  # fmt: skip
    """Write a probe whose tokens settle over the steps, and return its routings before they were written."""
    directory = run_directory / PROBE
    directory.mkdir(parents=True)
    tokens = synthetic_tokens(num_tokens)
    write_tokens(directory / TOKENS_FILE, tokens)
    routings = {
        step: synthetic_routing(
            tokens, layers=layers, num_experts=num_experts, top_k=top_k, settled=number / len(steps), seed=number
        )
        for number, step in enumerate(steps)
    }
    for step, routing in routings.items():
        write_routing(step_file(directory, step), routing, tokens.digest())
    return routings
