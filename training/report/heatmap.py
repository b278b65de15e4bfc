"""Expert load as a layer x expert heatmap in the terminal, and what each text domain prefers.

Load everywhere here is `n_e / n_mean`: 1 at perfect balance, 0 for an expert that got no token, at most E / k.
Suffixes: L MoE layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence

from rich.text import Text

from training.report.terminal import console, on_terminal, show, show_line, show_table

Load = Sequence[Sequence[float]]
"""Counts or shares of assignments, L rows of E."""

PLAIN_EXPERTS = 16
"""Experts on one plain line."""
MAX_PLAIN_EXPERTS = 64
"""With more experts than this, plain lines show groups of them."""

_UNDER, _BALANCED, _OVER = (33, 102, 172), (247, 247, 247), (178, 24, 43)
"""Blue, white, red: distinguishable with every common colour blindness."""


def relative_load(load_LE: Load) -> list[list[float]]:
    """Each layer's counts or shares divided by their mean; all 0 in a layer that routed nothing."""
    means = [sum(load_E) / len(load_E) for load_E in load_LE]
    return [[value / mean if mean else 0.0 for value in load_E] for load_E, mean in zip(load_LE, means, strict=True)]


def routed(domains: Mapping[str, Load]) -> dict[str, Load]:
    """The domains that sent any token to an expert: the load of the others is not 0, it is unknown."""
    return {name: load_LE for name, load_LE in domains.items() if any(map(sum, load_LE))}


def scale_limit(load_LE: Load) -> float:
    """2, 4 or 8: colours span 1/limit to limit on a log scale, half and twice the balanced load equally strong."""
    highest = max((value for load_E in load_LE for value in load_E), default=1.0)
    return next((limit for limit in (2.0, 4.0) if highest <= limit), 8.0)


def show_load(load_LE: Load, domains: Mapping[str, Load]) -> None:
    """Print the heatmap of everything and a row per domain.

    Args:
        load_LE: counts or shares over everything, per layer and expert.
        domains: the same for each domain alone; one without a token gets no row.
    """
    relative_LE = relative_load(load_LE)
    if not relative_LE:
        return
    show_line()
    show_line("Expert load, 1.00 = perfect balance (rows: layers, columns: experts)", style="bold")
    if on_terminal():
        _draw(relative_LE)
    else:
        _print_plain(relative_LE)
    if routed(domains):
        _show_domains(load_LE, routed(domains))


def _show_domains(load_LE: Load, domains: Mapping[str, Load], top: int = 4) -> None:
    """Experts are numbered anew in each layer, so a mean over layers would hide what a domain prefers: name them."""
    whole_LE = relative_load(load_LE)
    rows = []
    for name, domain_LE in domains.items():
        relative_LE = relative_load(domain_LE)
        # Half the L1 distance of two shares, averaged over layers.
        moved = sum(
            sum(abs(a - b) for a, b in zip(mine_E, all_E, strict=True)) / (2 * len(all_E))
            for mine_E, all_E in zip(relative_LE, whole_LE, strict=True)
        ) / len(whole_LE)
        ranked = sorted(
            ((value, layer, expert) for layer, row_E in enumerate(relative_LE) for expert, value in enumerate(row_E)),
            key=lambda item: (-item[0], item[1], item[2]),
        )
        used = "  ".join(f"{layer}/{expert} {value:.2f}" for value, layer, expert in ranked[:top])
        rows.append([name, f"{moved:.1%}", used])
    show_table(
        "Load by domain (routed elsewhere: share of assignments that differ from all domains together)",
        ["domain", "routed elsewhere", "most used, as layer/expert load"],
        rows,
        left=["most used, as layer/expert load"],
    )


def _grouped(relative_LE: Load, columns: int) -> tuple[list[list[float]], int]:
    """Merge neighbouring experts into at most `columns` groups; a group shows its load furthest from balance."""
    size = math.ceil(len(relative_LE[0]) / columns)
    grouped = [
        [max(row_E[i : i + size], key=_distance) for i in range(0, len(row_E), size)] if size > 1 else list(row_E)
        for row_E in relative_LE
    ]
    return grouped, size


def _distance(value: float) -> float:
    return abs(math.log(max(value, 1e-3)))


def _print_plain(relative_LE: Load) -> None:
    grouped_LE, size = _grouped(relative_LE, MAX_PLAIN_EXPERTS)
    if size > 1:
        show_line(f"each column: the one of {size} neighbouring experts whose load is furthest from 1")
    for start in range(0, len(grouped_LE[0]), PLAIN_EXPERTS):
        stop = min(start + PLAIN_EXPERTS, len(grouped_LE[0]))
        show_line("expert    " + "".join(f"{column * size:>6}" for column in range(start, stop)))
        for layer, row_E in enumerate(grouped_LE):
            show_line(f"layer_{layer:02d}  " + "".join(f"{value:>6.2f}" for value in row_E[start:stop]))


def _draw(relative_LE: Load) -> None:
    """Coloured cells: with the number where all experts fit side by side, else one shade each."""
    target = console()
    room = target.width - 10
    limit, numbers = scale_limit(relative_LE), len(relative_LE[0]) * 6 <= room
    grouped_LE, size = (relative_LE, 1) if numbers else _grouped(relative_LE, max(room, 8))
    shades = "·░▒▓█" if (target.encoding or "").startswith("utf") else ".-+*#"
    if numbers:
        show(Text(" " * 10 + "".join(f"{expert:^6}" for expert in range(len(relative_LE[0]))), style="dim"))
    for layer, row_E in enumerate(grouped_LE):
        line = Text(f"layer_{layer:02d}  ")
        for value in row_E:
            if numbers:
                red, green, blue = colour = _colour(value, limit)
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 120 else "white"
                line.append(f"{value:^6.2f}", style=f"{ink} on rgb({colour[0]},{colour[1]},{colour[2]})")
            else:
                level = sum(value >= edge for edge in (1 / 8, 0.5, 0.8, 1.25))
                red, green, blue = _colour(value, limit)
                line.append(shades[level], style=f"rgb({red},{green},{blue})")
        show(line)
    if not numbers:
        each = "a cell is one expert" if size == 1 else f"a cell is the least balanced of {size} experts"
        show_line(f"{each}: {shades[0]} < 0.12 {shades[1]} < 0.5 {shades[2]} < 0.8 {shades[3]} < 1.25 {shades[4]} more")


def _colour(value: float, limit: float) -> tuple[int, int, int]:
    position = max(-1.0, min(1.0, math.log(max(value, 1e-9)) / math.log(limit)))
    end = _OVER if position > 0 else _UNDER
    red, green, blue = (round(b + (e - b) * abs(position)) for b, e in zip(_BALANCED, end, strict=True))
    return red, green, blue
