"""`write_drift_report`: how weights went from checkpoint to checkpoint, as one HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

import tensortap
from tensortap_analysis.report.figures import (
    SCALE,
    Chart,
    drawn,
    figure,
    hover,
    logarithmic,
    short,
    top,
    whole,
)
from tensortap_analysis.report.markup import Html, join, listing, tag
from tensortap_analysis.report.searching import Column, searched
from tensortap_analysis.report.shell import document
from tensortap_analysis.weights.drift.notices import notices
from tensortap_analysis.weights.drift.tracking import Drift
from tensortap_analysis.weights.health import SEVERITIES, Issue
from tensortap_analysis.weights.report.page import target
from tensortap_analysis.weights.report.sections import cards, issue_table, sentence

_LAYERS, _LINES, _ROWS, _LEFT = 300, 120, 20_000, 40
_COLUMNS: tuple[Column, ...] = (
    ("layer", "layer", "The module's path"),
    ("step", "step", "From one checkpoint to the next"),
    ("shape", "shape", "As stored"),
    ("relative_change", "change", "||after - before|| / ||before||"),
    ("l2_norm_ratio", "norm ratio", "||after|| / ||before||"),
    ("cosine", "cosine", "Of both as vectors"),
    ("spectral_norm_ratio", "spectral ratio", "Largest singular value, after over before"),
    ("condition_growth", "condition x", "Condition number, after over before"),
    ("row_change_max", "row most", "The largest relative change of a row"),
    ("unchanged", "unchanged", "Share of values that are equal"),
)


def write_drift_report(
    out: str | os.PathLike[str], steps: Sequence[Drift], issues: Sequence[Sequence[Issue]]
) -> Path:
    """Write one self-contained HTML file about steps and their alerts, those over all steps last.

    An existing file is replaced once the new one is whole. Raises `ConfigError` for a name that
    cannot be written.
    """
    path = target(out)
    layers = list(dict.fromkeys(layer for step in steps for layer in step.layers))
    sections = {
        "summary": ("Summary", _summary(steps, issues, len(layers))),
        "alerts": ("Alerts", _alerts(steps, issues)),
        "charts": ("Charts", join(one.markup() for one in _charts(steps, layers))),
        "layers": ("Layers", _table(steps)),
        "left-out": ("Left out", _left_out(steps)),
    }
    shown = {key: value for key, value in sections.items() if value[1]}
    labels = [steps[0].before, *(step.after for step in steps)]
    title = f"{labels[0]} → {labels[-1]}"
    about = f"Weights of {len(labels):,} checkpoints; tensortap {tensortap.__version__}"
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(document(title, about, shown), encoding="utf-8")
    scratch.replace(path)
    return path


def _summary(steps: Sequence[Drift], issues: Sequence[Sequence[Issue]], layers: int) -> Html:
    counts = {one: sum(i.severity == one for some in issues for i in some) for one in SEVERITIES}
    facts = [
        (f"{len(steps) + 1:,}", "checkpoints", ""),
        (f"{layers:,}", "weights", ""),
        *(
            (f"{count:,}", word, "bad" if word == "critical" and count else "")
            for word, count in counts.items()
        ),
    ]
    said = notices(steps)
    notes = tag("div", tag("h3", "Notes"), listing(said, _LEFT), class_="notice") if said else ""
    return join((cards(facts), notes))


def _alerts(steps: Sequence[Drift], issues: Sequence[Sequence[Issue]]) -> Html:
    headings = [f"{step.before} → {step.after}" for step in steps] + ["Over all steps"]
    parts = [
        join((tag("h3", heading), issue_table(some)))
        for heading, some in zip(headings, issues, strict=True)
        if some
    ]
    return join(parts) if parts else tag("p", "Nothing is odd, by these rules.")


def _charts(steps: Sequence[Drift], layers: Sequence[str]) -> Iterator[Chart]:
    yield from (one for one in (_changes(steps, layers), _norms(steps, layers)) if one is not None)


def _changes(steps: Sequence[Drift], layers: Sequence[str]) -> Chart | None:
    """log10 of the relative change, weights by steps; those that changed most."""
    changes = {
        layer: [step.layers.get(layer, {}).get("relative_change") for step in steps]
        for layer in layers
    }
    most = sorted(changes, key=lambda layer: -max(x or 0.0 for x in changes[layer]))[:_LAYERS]
    rows = {layer: changes[layer] for layer in layers if layer in set(most)}
    if not any(value for row in rows.values() for value in row):
        return None
    trace = go.Heatmap(
        z=[[math.log10(x) if x else None for x in row] for row in rows.values()],
        x=list(range(1, len(steps) + 1)), y=hover(rows), colorscale=SCALE, hoverinfo="text",
        hovertext=[
            hover(f"{layer}\nstep {at}: changed by {short(x)}" for at, x in enumerate(row, start=1))
            for layer, row in rows.items()
        ],
        xgap=1, ygap=1, colorbar={"title": {"text": "log10 change", "side": "right"}},
    )  # fmt: skip
    left = f" The {_LAYERS} that changed most." if len(layers) > _LAYERS else ""
    drawing = figure(
        [trace], "step", "", height=120 + 14 * len(rows), xaxis=whole(range(1, len(steps) + 1)),
        yaxis={"autorange": "reversed", "tickfont": {"size": 10}, "dtick": 1},
    )  # fmt: skip
    says = f"||after - before|| / ||before|| of each weight at each step.{left}"
    return Chart("changes", "Relative change", says, drawing)


def _norms(steps: Sequence[Drift], layers: Sequence[str]) -> Chart | None:
    """Norms over the first, by checkpoint; those that end farthest from where they began."""
    rows = {}
    for layer in layers:
        found = [step.layers.get(layer, {}) for step in steps]
        first = found[0].get("l2_before")
        if first and all(row.get("l2_after") is not None for row in found):
            rows[layer] = [1.0, *(row["l2_after"] / first for row in found)]
    if not rows:
        return None
    far = sorted(rows, key=lambda layer: -_apart(rows[layer][-1]))[:_LINES]
    infinity = top(value for row in rows.values() for value in row)
    traces = [
        go.Scatter(
            x=list(range(len(rows[layer]))), y=drawn(rows[layer], infinity), mode="lines+markers",
            name=hover([layer])[0], line={"width": 1.2}, hoverinfo="text",
            hovertext=hover(f"{layer}\ncheckpoint {at}: {x:.4g}"
                            for at, x in enumerate(rows[layer])),
        )
        for layer in far
    ]  # fmt: skip
    axis = logarithmic(value for layer in far for value in rows[layer])
    drawing = figure(traces, "checkpoint", "norm / norm of the first", yaxis=axis,
                     xaxis=whole(range(len(steps) + 1)), showlegend=False)  # fmt: skip
    left = f" The {_LINES} that went farthest." if len(rows) > _LINES else ""
    return Chart("norms", "Norms", f"Frobenius norms over that of the first.{left}", drawing)


def _apart(ratio: float) -> float:
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def _table(steps: Sequence[Drift]) -> Html:
    rows = [
        _row(layer, number, found)
        for number, step in enumerate(steps, start=1)
        for layer, found in islice(step.layers.items(), _ROWS // len(steps))
    ]
    return join((
        tag("p", "In the order of the checkpoint; a click on a heading sorts.", class_="says"),
        searched(_COLUMNS, rows, ""),
    ))  # fmt: skip


def _row(layer: str, step: int, found: dict[str, Any]) -> dict[str, Any]:
    shape = " x ".join(map(str, found["shape"]))
    return {**found, "layer": layer, "step": step, "shape": shape}


def _left_out(steps: Sequence[Drift]) -> Html:
    lines = dict.fromkeys(sentence(one) for step in steps for one in step.skipped)
    return listing(lines, _LEFT, "more")
