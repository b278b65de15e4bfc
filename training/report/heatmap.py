"""The expert load as a heatmap of layers and experts on stdout, and the experts that each domain uses most.

The relative load of an expert is `n_e / n_mean`, its assignments divided by the mean over the experts of its layer. It
is 1 at perfect balance, 0 for an expert without a token, and at most E / k.
Shape suffixes: L MoE layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence

from rich.text import Text

from training.report.terminal import console, on_terminal, show, show_line, show_table, wrapped

Load = Sequence[Sequence[float]]
"""Counts, shares or relative loads: L rows of E numbers."""

PLAIN_EXPERTS = 16
"""The number of experts on one plain line."""
MAX_PLAIN_EXPERTS = 64
"""With more experts than this, a column of the plain lines stands for several neighbouring experts."""

_UNDER, _BALANCED, _OVER = (33, 102, 172), (247, 247, 247), (178, 24, 43)
"""Blue, white and red, which people with any common colour blindness can distinguish."""


def relative_load(load_LE: Load) -> list[list[float]]:
    """Return the counts or shares of each layer divided by their mean. A layer without assignments gives zeros."""
    means = [sum(load_E) / len(load_E) for load_E in load_LE]
    return [[value / mean if mean else 0.0 for value in load_E] for load_E, mean in zip(load_LE, means, strict=True)]


def routed(domains: Mapping[str, Load]) -> dict[str, Load]:
    """Return the domains with at least one assignment. The load of the others is unknown rather than 0."""
    return {name: load_LE for name, load_LE in domains.items() if any(map(sum, load_LE))}


def scale_limit(load_LE: Load) -> float:
    """Return the relative load at the end of the colour scale: 2, 4 or 8, depending on the highest load.

    Colours range from 1 / limit to limit on a logarithmic scale, so that half and twice the balanced load are equally
    strong.
    """
    highest = max((value for load_E in load_LE for value in load_E), default=1.0)
    return next((limit for limit in (2.0, 4.0) if highest <= limit), 8.0)


def show_load(load_LE: Load, domains: Mapping[str, Load]) -> None:
    """Print the heatmap of the load over all domains, and a table with one row per domain.

    Args:
        load_LE: counts or shares over all domains.
        domains: counts or shares of each domain alone. A domain without assignments gets no row.
    """
    relative_LE = relative_load(load_LE)
    if not relative_LE:
        return
    show_line()
    show_line("Expert load on held-out text, 1.00 = perfect balance (rows: MoE layers, columns: experts)", style="bold")
    for line in load_lines(relative_LE):
        show(line)
    if routed(domains):
        _show_domains(load_LE, routed(domains))


def _show_domains(load_LE: Load, domains: Mapping[str, Load], top: int = 4) -> None:
    """Print the experts that each domain uses most.

    The table names single experts, because expert 3 of one layer has nothing to do with expert 3 of another. A mean
    over layers would therefore hide what a domain prefers.
    """
    all_LE = relative_load(load_LE)
    rows = []
    for name, domain_LE in domains.items():
        relative_LE = relative_load(domain_LE)
        # Half the L1 distance between the shares of this domain and those of all domains, averaged over layers.
        elsewhere = sum(
            sum(abs(a - b) for a, b in zip(domain_E, all_E, strict=True)) / (2 * len(all_E))
            for domain_E, all_E in zip(relative_LE, all_LE, strict=True)
        ) / len(all_LE)
        ranked = sorted(
            ((value, layer, expert) for layer, row_E in enumerate(relative_LE) for expert, value in enumerate(row_E)),
            key=lambda item: (-item[0], item[1], item[2]),
        )
        used = "  ".join(f"{layer}/{expert} {value:.2f}" for value, layer, expert in ranked[:top])
        rows.append([name, f"{elsewhere:.1%}", used])
    show_table(
        "Load by domain (routed elsewhere: the share of assignments that would have to move to match all domains)",
        ["domain", "routed elsewhere", "most used, as layer/expert load"],
        rows,
        left=["most used, as layer/expert load"],
    )


def _grouped(relative_LE: Load, columns: int) -> tuple[list[list[float]], int]:
    """Group neighbouring experts so that at most `columns` groups remain.

    Returns:
        For each layer, the load of each group that is furthest from balance; and the number of experts per group.
    """
    size = math.ceil(len(relative_LE[0]) / columns)
    grouped = [
        [max(row_E[i : i + size], key=_distance) for i in range(0, len(row_E), size)] if size > 1 else list(row_E)
        for row_E in relative_LE
    ]
    return grouped, size


def _distance(value: float) -> float:
    """Return how far a relative load is from balance: the absolute value of its logarithm."""
    return abs(math.log(max(value, 1e-3)))


def load_lines(relative_LE: Load, most: int | None = None) -> list[Text]:
    """Return the lines of a heatmap: coloured cells for a terminal, and numbers elsewhere.

    Args:
        relative_LE: relative loads.
        most: the number of layers that are shown, those that are furthest from balance. None: all.
    """
    by_distance = sorted(range(len(relative_LE)), key=lambda layer: -max(map(_distance, relative_LE[layer])))
    layers = sorted(by_distance[:most])
    lines = (_drawn if on_terminal() else _plain)(layers, [relative_LE[layer] for layer in layers])
    if len(layers) < len(relative_LE):
        lines.append(Text(f"{len(relative_LE) - len(layers)} more layers are closer to balance"))
    return lines


def _plain(layers: Sequence[int], relative_LE: Load) -> list[Text]:
    grouped_LE, size = _grouped(relative_LE, MAX_PLAIN_EXPERTS)
    lines = []
    if size > 1:
        lines.append(f"each column shows, of {size} neighbouring experts, the load that is furthest from 1")
    for start in range(0, len(grouped_LE[0]), PLAIN_EXPERTS):
        stop = min(start + PLAIN_EXPERTS, len(grouped_LE[0]))
        lines.append("expert    " + "".join(f"{column * size:>6}" for column in range(start, stop)))
        for layer, row_E in zip(layers, grouped_LE, strict=True):
            lines.append(f"layer_{layer:02d}  " + "".join(f"{value:>6.2f}" for value in row_E[start:stop]))
    return [Text(line) for line in lines]


def _drawn(layers: Sequence[int], relative_LE: Load) -> list[Text]:
    """Return coloured cells: numbers if all experts fit side by side, else one character per group of experts."""
    target = console()
    columns = target.width - 10
    limit, numbers = scale_limit(relative_LE), len(relative_LE[0]) * 6 <= columns
    grouped_LE, size = (relative_LE, 1) if numbers else _grouped(relative_LE, max(columns, 8))
    shades = "·░▒▓█" if (target.encoding or "").startswith("utf") else ".-+*#"
    lines = []
    if numbers:
        lines.append(Text(" " * 10 + "".join(f"{expert:^6}" for expert in range(len(relative_LE[0]))), style="dim"))
    for layer, row_E in zip(layers, grouped_LE, strict=True):
        line = Text(f"layer_{layer:02d}  ")
        for value in row_E:
            red, green, blue = _colour(value, limit)
            if numbers:
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 120 else "white"
                line.append(f"{value:^6.2f}", style=f"{ink} on rgb({red},{green},{blue})")
            else:
                level = sum(value >= edge for edge in (1 / 8, 0.5, 0.8, 1.25))
                line.append(shades[level], style=f"rgb({red},{green},{blue})")
        lines.append(line)
    if not numbers:
        each = "a cell is one expert" if size == 1 else f"a cell is the least balanced of {size} experts"
        text = f"{each}: {shades[0]} < 0.12 {shades[1]} < 0.5 {shades[2]} < 0.8 {shades[3]} < 1.25 {shades[4]} more"
        lines.append(Text(wrapped(text)))
    return lines


def _colour(value: float, limit: float) -> tuple[int, int, int]:
    """Return the red, green and blue of a relative load on the colour scale that ends at `limit`."""
    position = max(-1.0, min(1.0, math.log(max(value, 1e-9)) / math.log(limit)))
    end = _OVER if position > 0 else _UNDER
    red, green, blue = (round(b + (e - b) * abs(position)) for b, e in zip(_BALANCED, end, strict=True))
    return red, green, blue
