"""How large the numbers of each run are: by depth, by step, and tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from tensortap_analysis.captured.words import layer_of
from tensortap_analysis.report.figures import (
    COLOURS,
    Chart,
    drawn,
    figure,
    hover,
    logarithmic,
    whole,
)
from tensortap_analysis.report.grids import grid
from tensortap_analysis.report.markup import Html, join
from tensortap_analysis.report.views import View

_PHASES = {"forward": "solid", "backward": "dash", "grad": "dot", "param": "dashdot"}
_RUNS = 6
_MOST = 2000


@dataclass(frozen=True, slots=True)
class _Pooled:
    """RMS over many tensors and the largest magnitude among them, by layer or by step."""

    at: list[int]
    rms: list[float]
    absmax: list[float]


def section(views: Sequence[View]) -> Html:
    """Charts of all runs together; a grid for the first alone, to which others are compared."""
    shown = [one for one in views if one.survey is not None and len(one.survey.name)][:_RUNS]
    charts = [_lines(shown, "layer"), _lines(shown, "step"), *_grid(shown)]
    return join(chart.markup() for chart in charts if chart is not None)


def _lines(views: Sequence[View], by: str) -> Chart | None:
    traces = [
        trace for number, one in enumerate(views) for trace in _traces(one, number, by, views)
    ]
    if not traces or (
        by == "step" and all(len(one.survey.steps) < 2 for one in views if one.survey)
    ):
        return None
    axis = logarithmic(y for trace in traces for y in trace.y if y is not None)
    depths = whole(at for trace in traces for at in trace.x)
    whose = f" The first {_RUNS} runs." if len(views) == _RUNS else ""
    says = {
        "layer": "Root mean square of all values of a layer, over all steps, without indices and "
        f"masks.{whose}",
        "step": f"Root mean square of all values of a step; the last {_MOST:,} steps.{whose}",
    }
    titles = {"layer": "Magnitude by depth", "step": "Magnitude by step"}
    return Chart(
        f"magnitude-{by}", titles[by], says[by],
        figure(traces, by, "RMS", yaxis=axis, xaxis=depths),
    )  # fmt: skip


def _traces(view: View, number: int, by: str, views: Sequence[View]) -> Iterator[go.Scatter]:
    assert view.survey is not None
    for place, (phase, dash) in enumerate(_PHASES.items()):
        pooled = _pooled(view, phase, by)
        if not pooled.at:
            continue
        colour = COLOURS[(number if len(views) > 1 else place) % len(COLOURS)]
        whose = f"{view.label}, {phase}" if len(views) > 1 else phase
        rows = zip(pooled.at, pooled.rms, pooled.absmax, strict=True)
        yield go.Scatter(
            x=pooled.at, y=drawn(pooled.rms, math.inf), name=hover([whose])[0],
            mode="lines+markers",
            line={"color": colour, "dash": dash if len(views) > 1 else "solid", "width": 2},
            marker={"size": 6}, hoverinfo="text",
            hovertext=hover(
                f"{whose}, {by} {at}\nRMS {rms:.4g}, largest magnitude {top:.4g}"
                for at, rms, top in rows
            ),
        )  # fmt: skip


def _pooled(view: View, phase: str, by: str) -> _Pooled:
    assert view.survey is not None
    found = view.survey.floating
    layers = [layer_of(name) for name in found.names]
    wanted = np.array([name.split("/")[1] == phase for name in found.names], dtype=bool)
    depth = np.array([-1 if layer is None else layer for layer in layers], dtype=np.int64)
    finite = found.count - found.nonfinite
    keep = wanted[found.name] & (finite > 0)
    keys = depth[found.name] if by == "layer" else np.array(found.steps, dtype=np.int64)[found.step]
    if by == "layer":
        keep &= keys >= 0
    at, group = np.unique(keys[keep], return_inverse=True)
    squares = np.bincount(group, weights=np.square(found.l2[keep]), minlength=len(at))
    values = np.bincount(group, weights=finite[keep], minlength=len(at))
    tops = np.zeros(len(at))
    np.maximum.at(tops, group, found.absmax[keep])
    rms = np.sqrt(squares / values)
    shown = slice(-_MOST, None)
    return _Pooled(at[shown].tolist(), rms[shown].tolist(), tops[shown].tolist())


def _grid(views: Sequence[View]) -> Iterator[Chart]:
    for view in views[:1]:
        assert view.survey is not None
        found = view.survey.floating
        names = (found.names[number] for number in found.name.tolist())
        made = grid(zip(names, found.rms.tolist(), strict=True), "RMS")
        if made is not None:
            left = f" Not drawn: {made[1]}." if made[1] else ""
            yield Chart(
                "magnitude-grid", f"Layers of {view.label}",
                f"The largest RMS of each tensor in each layer, over all steps.{left}", made[0],
            )  # fmt: skip
