"""Families by layers: the same tensor of every layer as one row of a heat map."""

from __future__ import annotations

import math
from collections.abc import Iterable

import plotly.graph_objects as go

from tensortap_analysis.captured.words import family_of, layer_of
from tensortap_analysis.report.figures import SCALE, figure, hover, short

FAMILIES = 40
"""Most rows of a grid."""
_LAYERS = 400


def grid(values: Iterable[tuple[str, float]], quantity: str) -> tuple[go.Figure, str] | None:
    """log10 of the largest value of each family and layer, and what was left out, in words.

    `None` where nothing is in a layer. Rows are in execution order; of too many families those of
    the largest values are kept, of too many layers the first.
    """
    cells: dict[str, dict[int, float]] = {}
    for name, value in values:
        layer = layer_of(name)
        if layer is not None and not math.isnan(value):
            row = cells.setdefault(family_of(name), {})
            row[layer] = max(value, row.get(layer, 0.0))
    layers = sorted({layer for row in cells.values() for layer in row})
    if not layers:
        return None
    worst = sorted(cells, key=lambda family: -max(cells[family].values()))[:FAMILIES]
    families = [family for family in cells if family in set(worst)]
    left = [
        f"{len(cells) - len(families):,} more families with smaller values"
        * (len(cells) > FAMILIES),
        f"layers from {layers[_LAYERS]} on" if len(layers) > _LAYERS else "",
    ]
    drawn = _heatmap({family: cells[family] for family in families}, layers[:_LAYERS], quantity)
    return drawn, " and ".join(filter(None, left))


def _heatmap(cells: dict[str, dict[int, float]], layers: list[int], quantity: str) -> go.Figure:
    found = [[row.get(layer) for layer in layers] for row in cells.values()]
    hovers = [
        hover(f"{family}\nlayer {layer}: {quantity} {short(value)}" if value is not None else ""
              for layer, value in zip(layers, row, strict=True))
        for family, row in zip(cells, found, strict=True)
    ]  # fmt: skip
    top = max((math.log10(x) for row in found for x in row if x and x < math.inf), default=0.0)
    logs = [[_log(value, top) for value in row] for row in found]
    trace = go.Heatmap(
        z=logs, x=layers, y=hover(cells), hovertext=hovers, hoverinfo="text",
        text=[["∞" if value == math.inf else "" for value in row] for row in found],
        texttemplate="%{text}", colorscale=SCALE,
        xgap=1, ygap=1, colorbar={"title": {"text": f"log10 {quantity}", "side": "right"}},
    )  # fmt: skip
    height = 120 + 16 * len(cells)
    return figure(
        [trace], "layer", "", height=height,
        xaxis={"dtick": max(1, len(layers) // 24)},
        yaxis={"autorange": "reversed", "tickfont": {"size": 11}, "dtick": 1},
    )  # fmt: skip


def _log(value: float | None, top: float) -> float | None:
    """Nothing for 0; infinity in the colour of the largest."""
    return None if not value else min(math.log10(value), top)
