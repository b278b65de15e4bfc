"""Colours and fonts of the figures, as two templates of plotly: one for light pages and one for dark ones.

A heatmap takes its colours from the template, so that the middle of its scale is the colour of the page.
"""

from typing import Any

COLOURS = ("#1B87C9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#999999", "#F0E442")
"""Okabe and Ito's palette, which people with any common colour blindness can distinguish. Its blue is lighter here, so
that it is visible on dark pages."""
BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY, _ = COLOURS

DIVERGING_LIGHT = ["#053061", "#2166ac", "#67a9cf", "#f7f7f7", "#ef8a62", "#b2182b", "#67001f"]
DIVERGING_DARK = ["#9ecae9", "#4a98c9", "#2a5f86", "#23272e", "#8c4a37", "#dd6b4d", "#fcb69b"]
SEQUENTIAL_LIGHT = ["#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b"]
SEQUENTIAL_DARK = ["#1d2127", "#1f4068", "#2a77b0", "#63b3e4", "#d3ecfb"]


def _scale(colours: list[str]) -> list[list[Any]]:
    return [[index / (len(colours) - 1), colour] for index, colour in enumerate(colours)]


def _template(ink: str, grid: str, card: str, diverging: list[str], sequential: list[str]) -> dict[str, Any]:
    axis = {
        "gridcolor": grid,
        "linecolor": grid,
        "zerolinecolor": grid,
        "ticks": "outside",
        "tickcolor": grid,
        "ticklen": 3,
        "automargin": True,
        "title": {"standoff": 6, "font": {"size": 11}},
        "spikecolor": ink,
        "spikethickness": 1,
        "spikedash": "dot",
    }
    scales = {"diverging": _scale(diverging), "sequential": _scale(sequential), "sequentialminus": _scale(sequential)}
    layout = {
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 11, "color": ink},
        "title": {"font": {"size": 13}, "x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"l": 10, "t": 8}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(COLOURS),
        "colorscale": scales,
        "hoverlabel": {"bgcolor": card, "bordercolor": grid, "font": {"color": ink, "size": 11}},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "font": {"size": 10}},
        "xaxis": axis,
        "yaxis": axis,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": grid, "activecolor": ink},
        "coloraxis": {"colorbar": {"outlinewidth": 0}},
    }
    return {"layout": layout, "data": {"heatmap": [{"colorbar": {"outlinewidth": 0, "thickness": 10, "ticks": ""}}]}}


THEMES = {
    "light": _template("#24292f", "#d9dee3", "#ffffff", DIVERGING_LIGHT, SEQUENTIAL_LIGHT),
    "dark": _template("#d7dce2", "#3a414b", "#1b1f24", DIVERGING_DARK, SEQUENTIAL_DARK),
}
"""Name -> template. The names are those that `page.css` uses."""
