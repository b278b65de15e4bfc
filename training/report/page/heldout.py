"""What the probe of a run says: the text of its held-out tokens, and where each token was routed at the probed steps.

Statistics are those of `training.report.probe`, over all tokens. The text and the routing of single tokens are in the
page as far as they have room.

Shapes: L MoE layers, T tokens, K top-k, E experts, G domains, W words, P probed steps.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from common.errors import RunError
from common.text import shorten
from training.report.page.curves import Figure, figure_layout, layer_colour, level_line, rounded
from training.report.page.gather import RunData
from training.report.page.theme import BLUE
from training.report.plots import thinned
from training.report.probe import (
    Probe,
    ProbeRouting,
    churn,
    coactivation,
    read_probe,
    saturation,
    specialisation,
)

MAX_ROUTING_BYTES = 2_000_000
"""The most bytes of the routing of single tokens. Steps are left out first, and then tokens."""
MIN_STEPS = 6
"""Steps that are kept as long as tokens can be left out instead."""
MAX_STATISTICS = 1_000_000
"""The most numbers of each statistic. Steps are left out, and the statistic if two have no room."""
MAX_WORDS, MIN_COUNT = 40, 3
"""The most token ids of the vocabulary's figure, and how often each occurs in the probe at least."""
DRAWN = {
    "by_domain": ("specialisation by domain", ("domains", "expert-domains")),
    "by_word": ("specialisation by token id", ("words", "expert-words")),
    "pairs": ("co-activation", ("pairs", "expert-partners")),
}
"""Statistic -> what it is, and the figures that show it."""
MAX_PIECE = 20
"""The most characters of a token in a figure."""


@dataclass(frozen=True)
class HeldOut:
    """The probe of a run, read completely."""

    probe: Probe
    steps: list[int]
    routings: list[ProbeRouting]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of layers and of experts."""
        return len(self.routings[0].experts_LTK), self.routings[0].num_experts


def read_heldout(data: RunData, shape: tuple[int, int], notes: list[str]) -> HeldOut | None:
    """Read the probe of a run.

    Args:
        shape: number of layers and of experts of the run's loads. Steps with other ones are left out.
        notes: receives a sentence about everything that is left out.

    Returns:
        None if no step can be read.
    """
    try:
        probe = read_probe(data.directory)
    except (OSError, RunError) as error:
        notes.append(f"The probe is left out: {error}.")
        return None
    if probe is None:
        notes.append("There is no probe (telemetry.probe_tokens): no text of tokens, domains, co-activation or churn.")
        return None
    lines: list[str] = []
    read = list(probe.routings(lines))
    notes += [f"A step of the probe is {line}." for line in lines]
    fitting = [(step, routing) for step, routing in read if (len(routing.experts_LTK), routing.num_experts) == shape]
    if len(fitting) < len(read):
        others = len(read) - len(fitting)
        notes.append(f"Probed steps whose layers or experts differ from those of the loads are left out: {others}.")
    top_k = {routing.experts_LTK.shape[2] for _, routing in fitting}
    if len(top_k) > 1:
        notes.append("The probe is left out: its steps differ in the number of experts per token.")
    if len(top_k) != 1:
        return None
    return HeldOut(probe, [step for step, _ in fitting], [routing for _, routing in fitting])


def heldout_numbers(heldout: HeldOut) -> dict[str, Any]:
    """Return what the script needs. Arrays are packed (`packed`); those of statistics have their own steps.

    `text` has the tokens that are shown: for each its number among `words`, and `excerpts` with their domains.
    """
    probe, routings = heldout.probe, heldout.routings
    domains, ids = len(probe.domains), frequent_ids(probe)
    word_T = word_numbers(probe, ids)

    def statistic(values: Sequence[np.ndarray] | None, steps: list[int]) -> dict[str, Any] | None:
        return None if not values else {"steps": steps, **packed(np.stack(values))}

    def of_some_steps(function: Any, size: int) -> dict[str, Any] | None:
        chosen = thinned(len(routings), max(2, MAX_STATISTICS // max(size, 1))) if size * 2 <= MAX_STATISTICS else []
        return statistic([function(routings[index]) for index in chosen], [heldout.steps[index] for index in chosen])

    layers, experts = heldout.shape
    return {
        "domains": list(probe.domains),
        "words": [shown_piece(probe.pieces[int(np.argmax(probe.tokens_T == token))]) for token in ids],
        "by_domain": of_some_steps(lambda r: specialisation(r, probe.domain_T, domains), layers * experts * domains),
        "by_word": of_some_steps(
            lambda r: specialisation(r, word_T, len(ids) + 1)[..., :-1], layers * experts * max(len(ids), 1)
        )
        if ids
        else None,
        "pairs": of_some_steps(coactivation, layers * experts * experts),
        "text": _text(heldout),
    }


def heldout_parts(heldout: HeldOut, notes: list[str]) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Return the figures and the numbers, without the figures of a statistic that has no values or no room.

    Args:
        notes: receives a sentence about each of them.
    """
    figures, numbers = heldout_figures(heldout), heldout_numbers(heldout)
    for statistic, (what, names) in DRAWN.items():
        if numbers[statistic] is None:
            figures = {name: figure for name, figure in figures.items() if name not in names}
            notes.append(f"The page has no {what}: there are too few tokens, or too many layers and experts.")
    return figures, numbers


def frequent_ids(probe: Probe) -> list[int]:
    """Return the token ids that are most frequent in the probe, at most `MAX_WORDS` of at least `MIN_COUNT` each."""
    ids, counts = np.unique(probe.tokens_T, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_WORDS]
    return [int(ids[index]) for index in order if counts[index] >= MIN_COUNT]


def word_numbers(probe: Probe, ids: Sequence[int]) -> np.ndarray:
    """Return the index into `ids` of each token, and the length of `ids` for other tokens."""
    word_T = np.full(len(probe.tokens_T), len(ids))
    for number, token in enumerate(ids):
        word_T[probe.tokens_T == token] = number
    return word_T


def shown_piece(piece: str) -> str:
    """Return the text of a token with visible white space.

    >>> shown_piece(" the"), shown_piece("        ")
    ('␣the', '␣*8')
    """
    visible = piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    repeats = re.sub(r"(␣|⏎|⇥)\1{3,}", lambda found: f"{found[1]}*{len(found[0])}", visible)
    return shorten(repeats, MAX_PIECE) or "∅"


def _text(heldout: HeldOut) -> dict[str, Any]:
    """Return the tokens that have room, with their routing at the steps that have room."""
    probe, routings = heldout.probe, heldout.routings
    layers, tokens, top_k = routings[0].experts_LTK.shape
    bytes_per_token = layers * (top_k * (2 if heldout.shape[1] > 255 else 1) + top_k + 2)
    most_steps = max(2, min(len(routings), MAX_ROUTING_BYTES // (bytes_per_token * tokens)))
    if most_steps < min(MIN_STEPS, len(routings)):
        most_steps = min(MIN_STEPS, len(routings))
    room = max(1, MAX_ROUTING_BYTES // (bytes_per_token * most_steps))
    starts = np.flatnonzero(np.diff(probe.excerpts_T, prepend=-1))
    sizes = np.diff(starts, append=tokens)
    kept = thinned(len(starts), max(1, int(len(starts) * min(1.0, room / tokens))))
    chosen = np.concatenate([np.arange(starts[index], starts[index] + sizes[index]) for index in kept])
    steps = thinned(len(routings), most_steps)
    return {
        "steps": [heldout.steps[index] for index in steps],
        "pieces": [probe.pieces[t] for t in chosen],
        "excerpts": [
            {"domain": probe.domains[probe.domain_T[starts[index]]], "size": int(sizes[index])} for index in kept
        ],
        "experts": packed(np.stack([routings[index].experts_LTK[:, chosen] for index in steps]), whole=True),
        "weights": packed(np.stack([routings[index].weights_LTK[:, chosen] for index in steps]), levels=250),
        "margins": packed(np.stack([routings[index].margin_LT[:, chosen] for index in steps])),
        "of": tokens,
    }


def packed(values: np.ndarray, levels: int = 65534, *, whole: bool = False) -> dict[str, Any]:
    """Return an array of numbers >= 0 in base64: unsigned integers of 8 or 16 bits, little-endian.

    A number is its integer times `scale`. The integer `missing` stands for NaN.

    Args:
        levels: the largest integer.
        whole: the numbers are integers, and stay exact.
    """
    finite = np.isfinite(values)
    top = float(values.max(where=finite, initial=0)) or 1.0
    levels, scale = (int(top), 1.0) if whole else (levels, top / levels)
    codes = np.rint(np.where(finite, values, 0) / scale).clip(0, levels)
    codes[~finite] = levels + 1
    bits = 8 if levels < 255 else 16
    data = codes.astype("u1" if bits == 8 else "<u2").tobytes()
    return {
        "shape": list(values.shape),
        "scale": scale,
        "missing": levels + 1,
        "bits": bits,
        "data": base64.b64encode(data).decode(),
    }


# ------------------------------------------------------------------------------------------------------------- figures


def heldout_figures(heldout: HeldOut) -> dict[str, Figure]:
    """Return identifier -> figure. `page.js` fills in all but those over the steps."""
    layers, experts = heldout.shape
    many, every = max(250, min(110 + 20 * experts, 620)), max(1, experts // 24)
    words = len(frequent_ids(heldout.probe))
    figures = {
        "expert-domains": _bars("Domains (1 = a uniform router)", level=1),
        "expert-partners": _bars("Co-activated experts", x="expert", tickformat=".0%"),
        "expert-words": _bars("Token ids (1 = a uniform router)", level=1),
        "path": _path(layers, experts),
        "moved-layers": _bars("Tokens whose experts changed, by layer", x="MoE layer", tickformat=".0%"),
        "moved": _map(
            "Assignments that moved", x="to expert", y="from expert", value="assignments", height=many, every=every
        ),
        "domains": _map(
            "Domains", x="expert", y="", value="specialisation", height=max(200, 110 + 26 * len(heldout.probe.domains))
        ),
        "pairs": _map(
            "Co-activation", x="and expert", y="of the tokens of expert", value="share", height=many, every=every
        ),
        **_over_time(heldout),
    }
    if words:
        figures["words"] = _map(
            "Token ids", x="expert", y="", value="specialisation", height=max(250, 110 + 16 * words)
        )
    return figures


def _bars(title: str, x: str = "", level: float | None = None, tickformat: str | None = None) -> Figure:
    layout = figure_layout(title, x=x, tickformat=tickformat)
    layout["xaxis"] |= {"type": "category"}
    layout["yaxis"] |= {"rangemode": "tozero"}
    if level is not None:
        layout["shapes"] = [level_line(level)]
    trace = {"type": "bar", "marker": {"color": BLUE}, "hovertemplate": "%{x}: %{y:.3g}<extra></extra>"}
    return {"data": [trace], "layout": layout}


def _map(title: str, *, x: str, y: str, value: str, height: int, every: int = 1) -> Figure:
    layout = figure_layout(title, x=x, y=y, height=height)
    layout["yaxis"] |= {
        "autorange": "reversed",
        "showgrid": False,
        "zeroline": False,
        "type": "category",
        "dtick": every,
    }
    layout["xaxis"] |= {"showgrid": False, "zeroline": False, "type": "category"}
    hover = f"{x} %{{x}}, {y} %{{y}}<br>{value} %{{customdata:.3g}}<extra></extra>"
    trace = {"type": "heatmap", "autocolorscale": True, "xgap": 1, "ygap": 1, "hovertemplate": hover}
    return {"data": [trace], "layout": layout}


def _path(layers: int, experts: int) -> Figure:
    """A token's experts in each layer, with their weights as sizes; beside it the margins."""
    layout = figure_layout("Path of the token", x="expert", y="MoE layer", height=max(260, min(110 + 24 * layers, 900)))
    layout["xaxis"] |= {"domain": [0, 0.72], "range": [-0.5, experts - 0.5], "zeroline": False, "tickformat": "d"}
    layout["yaxis"] |= {
        "range": [layers - 0.5, -0.5],
        "zeroline": False,
        "tickformat": "d",
        "dtick": max(1, layers // 12),
    }
    layout["xaxis2"] = {"domain": [0.78, 1], "title": {"text": "margin to the next"}, "rangemode": "tozero"}
    chosen = {
        "type": "scatter",
        "mode": "lines+markers",
        "line": {"width": 1},
        "hovertemplate": "layer %{y}, expert %{x}<br>weight %{customdata:.3f}<extra></extra>",
        "showlegend": False,
    }
    others = chosen | {"mode": "markers"}
    margin = {
        "type": "bar",
        "orientation": "h",
        "xaxis": "x2",
        "marker": {"color": "#999999"},
        "hovertemplate": "layer %{y}<br>margin %{x:.4f}<extra></extra>",
        "showlegend": False,
    }
    return {"data": [chosen, others, margin], "layout": layout}


def _over_time(heldout: HeldOut) -> dict[str, Figure]:
    """Churn between successive probed steps, and the saturation of each."""
    steps, routings = heldout.steps, heldout.routings
    if len(steps) < 2:
        return {}
    moved = np.stack([churn(a, b) for a, b in pairwise(routings)])
    same = np.stack([saturation(routing, routings[-1]) for routing in routings])
    return {
        "churn": _layers("Churn since the probe before", steps[1:], moved),
        "saturation": _layers("Saturation: experts kept until the end", steps, same),
    }


def _layers(title: str, steps: list[int], values_PL: np.ndarray) -> Figure:
    layers = values_PL.shape[1]

    def line(name: str, values: np.ndarray, width: float, colour: str, **more: Any) -> dict[str, Any]:
        return {
            "type": "scatter",
            "name": name,
            "x": steps,
            "y": [rounded(float(value)) for value in values],
            "mode": "lines+markers",
            "marker": {"size": 4},
            "line": {"width": width, "color": colour},
            "showlegend": False,
            **more,
        }

    quiet = {"hoverinfo": "skip"} if layers > 8 else {}
    traces = [
        line(f"layer {layer}", values_PL[:, layer], 1, layer_colour(layer, layers), opacity=0.75, **quiet)
        for layer in range(layers)
    ]
    layout = figure_layout(title, x="optimizer step", tickformat=".0%", hovermode="x unified")
    layout["yaxis"] |= {"rangemode": "tozero"}
    return {"data": [*traces, line("all layers", values_PL.mean(axis=1), 2, BLUE)], "layout": layout}
