"""Charts of a scan: what ranks leave, singular values, what formats leave, layers by metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tensortap_analysis.report.figures import (
    COLOURS,
    SCALE,
    Chart,
    drawn,
    figure,
    hover,
    logarithmic,
    short,
)
from tensortap_analysis.weights.health.issue import Layer, layers_of
from tensortap_analysis.weights.result import ScanResult

_LINES, _POINTS, _COLUMNS, _WORST = 120, 96, 1000, 10
_METRICS = (
    ("condition number", "spectral", "condition_number", True),
    ("spectral norm", "spectral", "s_max", True),
    ("1 / stable rank", "spectral", "stable_rank", False),
    ("1 / rank for 99 %", "spectral", "energy_rank_99", False),
    ("outliers %", "quantization", "extreme_outlier_percentage", True),
    ("max / rms", "quantization", "dynamic_range_rms", True),
    ("kurtosis", "quantization", "kurtosis", True),
    ("int8 error", "quantization", "sqnr_db", False),
    ("int8 error, per channel", "quantization", "sqnr_db_per_channel", False),
    ("zeros", "sparsity", "zero_fraction", True),
    ("dead rows", "sparsity", "dead_rows", True),
    ("spread of row norms", "norms", "row_norm_spread", True),
)
"""Row of the map, method, metric, and whether a larger value is the worse one."""


def charts(result: ScanResult) -> Iterator[Chart]:
    """Those that the scan has metrics for."""
    layers = [layer for layer in layers_of(result) if not layer.vector]
    for made in (_map(layers), _formats(layers), _ranks(layers), _spectra(layers)):
        if made is not None:
            yield made


def _map(layers: list[Layer]) -> Chart | None:
    """Layers by metrics: each metric's layers by their order, the worst brightest."""
    shown = layers[:_COLUMNS]
    rows = {}
    for word, method, metric, larger in _METRICS:
        values = [layer.get(method, metric) for layer in shown]
        if len({value for value in values if value is not None}) > 1:
            rows[word] = values, larger
    if not rows:
        return None
    trace = go.Heatmap(
        z=[_ranked(values, larger) for values, larger in rows.values()],
        x=list(range(len(shown))), y=list(rows), colorscale=SCALE, zmin=0, zmax=1, hoverinfo="text",
        hovertext=[
            hover(f"{layer.name}\n{word}: {short(value)}"
                  for layer, value in zip(shown, values, strict=True))
            for word, (values, _) in rows.items()
        ],
        xgap=1 if len(shown) < 200 else 0, ygap=1, showscale=False,
    )  # fmt: skip
    left = f" The first {_COLUMNS:,} of {len(layers):,} layers." if len(layers) > _COLUMNS else ""
    says = f"Each metric's layers by their order, the worst brightest; the hover has values.{left}"
    drawing = figure(
        [trace], "layer, in the order of the checkpoint", "", height=140 + 22 * len(rows),
        yaxis={"autorange": "reversed", "dtick": 1},
    )  # fmt: skip
    return Chart("layers-metrics", "Layers by metrics", says, drawing)


def _ranked(values: list[Any], larger: bool) -> list[float | None]:
    """Places from 0 (best) to 1 (worst); equal values share the place of the first of them."""
    known = sorted({value for value in values if value is not None}, reverse=not larger)
    place = {value: index / max(len(known) - 1, 1) for index, value in enumerate(known)}
    return [None if value is None else place[value] for value in values]


def _formats(layers: list[Layer]) -> Chart | None:
    """What each format leaves, a box over layers."""
    found: _ByFormat = {}
    for layer in layers:
        by_format = dict(layer.get("quantization", "formats") or {})
        by_format["int8 per channel"] = layer.get("quantization", "sqnr_db_per_channel")
        for name, sqnr in by_format.items():
            if sqnr is not None and math.isfinite(sqnr):
                found.setdefault(name, []).append((layer.name, sqnr))
    if not found:
        return None
    traces = [_box(found), _worst(found)]
    says = (
        "Signal to quantisation noise of the weights: quartiles, smallest and largest over layers; "
        f"points are the {_WORST} layers that a format serves worst, with their names."
    )
    drawing = figure(traces, "", "SQNR in dB", height=400, showlegend=False)
    return Chart("formats", "What each format leaves", says, drawing)


_ByFormat = dict[str, list[tuple[str, float]]]


def _box(found: _ByFormat) -> go.Box:
    """Five numbers for each format: the page does not hold every layer's."""
    cuts = [
        np.quantile([sqnr for _, sqnr in rows], (0, 0.25, 0.5, 0.75, 1)).tolist()
        for rows in found.values()
    ]
    low, q1, median, q3, high = zip(*cuts, strict=True)
    return go.Box(
        x=list(found), lowerfence=low, q1=q1, median=median, q3=q3, upperfence=high,
        marker={"color": COLOURS[0]}, line={"width": 1}, name="layers",
    )  # fmt: skip


def _worst(found: _ByFormat) -> go.Scatter:
    rows = [
        (name, layer, sqnr)
        for name, every in found.items()
        for layer, sqnr in sorted(every, key=lambda row: row[1])[:_WORST]
    ]
    return go.Scatter(
        x=[name for name, _, _ in rows], y=[sqnr for _, _, sqnr in rows], mode="markers",
        marker={"color": COLOURS[1], "size": 5}, hoverinfo="text", name="worst",
        hovertext=hover(f"{layer}\n{name}: {sqnr:.1f} dB" for name, layer, sqnr in rows),
    )  # fmt: skip


def _ranks(layers: list[Layer]) -> Chart | None:
    """The error that keeping so many directions leaves."""
    rows = {}
    for layer in layers:
        errors = layer.get("spectral", "rank_errors") or {}
        full = layer.get("spectral", "full_rank")
        points = sorted((int(rank), error) for rank, error in errors.items() if error is not None)
        if points and full:
            rows[layer.name] = [(rank / full, error) for rank, error in points]
    if not rows:
        return None
    # The ones that a low rank serves best are those to look at.
    best = sorted(rows, key=lambda name: sum(error for _, error in rows[name]) / len(rows[name]))
    traces = [_line(name, rows[name]) for name in best[:_LINES]]
    axis = logarithmic(x for points in rows.values() for x, _ in points)
    drawing = figure(traces, "rank / full rank", "error ||W - W_r|| / ||W||", xaxis=axis,
                     showlegend=False)  # fmt: skip
    says = "What is lost when a matrix is replaced by one of a lower rank."
    return Chart("ranks", "What a low rank leaves", says + _cut(rows), drawing)


def _spectra(layers: list[Layer]) -> Chart | None:
    """Singular values over the largest; only where the scan has kept them."""
    rows = {}
    for layer in layers:
        values = [s for s in layer.get("spectral", "spectrum") or [] if s]
        if len(values) > 1 and math.isfinite(values[0]):
            places = sorted({round(at * (len(values) - 1) / _POINTS) for at in range(_POINTS + 1)})
            rows[layer.name] = [(at / len(values), values[at] / values[0]) for at in places]
    if not rows:
        return None
    worst = sorted(rows, key=lambda name: rows[name][-1][1])
    traces = [_line(name, rows[name]) for name in worst[:_LINES]]
    axis = logarithmic(y for points in rows.values() for _, y in points)
    drawing = figure(traces, "direction / full rank", "singular value / largest", yaxis=axis,
                     showlegend=False)  # fmt: skip
    says = "Singular values of each matrix, the largest first; zeros are left out."
    return Chart("spectra", "Spectra", says + _cut(rows), drawing)


def _line(name: str, points: list[tuple[float, float]]) -> go.Scatter:
    return go.Scatter(
        x=[x for x, _ in points], y=drawn([y for _, y in points], math.inf), mode="lines",
        name=hover([name])[0], line={"width": 1.2}, hoverinfo="text",
        hovertext=hover(f"{name}\n{x:.3g}: {y:.3g}" for x, y in points),
    )  # fmt: skip


def _cut(rows: dict[str, Any]) -> str:
    return f" {_LINES} of {len(rows):,} layers are drawn." if len(rows) > _LINES else ""
