"""`write_drift_report`: how weights went from checkpoint to checkpoint, as one HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

import tensortap
from tensortap.store.disk import replace_file
from tensortap_analysis.report.figures import (
    SCALE,
    Chart,
    drawn,
    figure,
    hover,
    logarithmic,
    short,
    top,
)
from tensortap_analysis.report.markup import Html, join, listing, tag
from tensortap_analysis.report.searching import Column, searched
from tensortap_analysis.report.shell import document
from tensortap_analysis.weights.drift.alerts import together
from tensortap_analysis.weights.drift.notices import notices
from tensortap_analysis.weights.drift.tracking import Drift
from tensortap_analysis.weights.drift.trend import (
    checkpoint_names,
    layers_of,
    most_changed,
    norms,
)
from tensortap_analysis.weights.health import SEVERITIES, Issue
from tensortap_analysis.weights.report.page import target
from tensortap_analysis.weights.report.sections import cards, issue_table, sentence

_LAYERS, _LINES, _ROWS, _LEFT, _NAMES = 300, 120, 20_000, 40, 12
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
    layers = layers_of(steps)
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
    replace_file(path, document(title, about, shown).encode(), sync=False)
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
        join((tag("h3", heading), issue_table([_named(*one) for one in together(some)])))
        for heading, some in zip(headings, issues, strict=True)
        if some
    ]
    return join(parts) if parts else tag("p", "Nothing is odd, by these rules.")


def _named(issue: Issue, others: int) -> Issue:
    return replace(issue, layer=f"{issue.layer} and {others:,} more") if others else issue


def _charts(steps: Sequence[Drift], layers: Sequence[str]) -> Iterator[Chart]:
    yield from (one for one in (_changes(steps, layers), _norms(steps, layers)) if one is not None)


def _changes(steps: Sequence[Drift], layers: Sequence[str]) -> Chart | None:
    """log10 of the relative change, weights by steps; those that changed most."""
    changes = {
        layer: [step.layers.get(layer, {}).get("relative_change") for step in steps]
        for layer in layers
    }
    most = set(most_changed(steps, layers)[:_LAYERS])
    rows = {layer: changes[layer] for layer in layers if layer in most}
    if not any(value for row in rows.values() for value in row):
        return None
    names = checkpoint_names(steps)[1:]
    trace = go.Heatmap(
        z=[[math.log10(x) if x and x < math.inf else None for x in row] for row in rows.values()],
        x=list(range(1, len(steps) + 1)), y=hover(rows), colorscale=SCALE, hoverinfo="text",
        hovertext=[
            hover(f"{layer}\n{name}: {_went(x)}" for name, x in zip(names, row, strict=True))
            for layer, row in rows.items()
        ],
        xgap=1, ygap=1, colorbar={"title": {"text": "log10 change", "side": "right"}},
    )  # fmt: skip
    left = f" The {_LAYERS} that changed most." if len(layers) > _LAYERS else ""
    drawing = figure(
        [trace], "to checkpoint", "", height=120 + 14 * len(rows), xaxis=_ticks(names, 1),
        yaxis={"autorange": "reversed", "tickfont": {"size": 10}, "dtick": 1},
    )  # fmt: skip
    says = f"||after - before|| / ||before|| of each weight at each step.{left}"
    return Chart("changes", "Relative change", says, drawing)


def _norms(steps: Sequence[Drift], layers: Sequence[str]) -> Chart | None:
    """Norms over the first, by checkpoint; those that went farthest."""
    lines = {layer: norms(steps, layer) for layer in layers}
    rows = {layer: line for layer, line in lines.items() if line}
    if not rows:
        return None
    far = sorted(rows, key=lambda layer: -max(_apart(ratio) for _, ratio in rows[layer]))[:_LINES]
    infinity = top(value for row in rows.values() for _, value in row)
    names = checkpoint_names(steps)
    traces = [
        go.Scatter(
            x=[at for at, _ in rows[layer]], y=drawn([x for _, x in rows[layer]], infinity),
            mode="lines+markers", name=hover([layer])[0], line={"width": 1.2}, hoverinfo="text",
            hovertext=hover(f"{layer}\n{names[at]}: {x:.4g}" for at, x in rows[layer]),
        )
        for layer in far
    ]  # fmt: skip
    axis = logarithmic(x for layer in far for _, x in rows[layer])
    drawing = figure(traces, "checkpoint", "norm / norm of the first", yaxis=axis,
                     xaxis=_ticks(names, 0), showlegend=False)  # fmt: skip
    left = f" The {_LINES} that went farthest." if len(rows) > _LINES else ""
    says = f"Frobenius norms over that of the first checkpoint where it is not 0.{left}"
    return Chart("norms", "Norms", says, drawing)


def _ticks(names: Sequence[str], first: int) -> dict[str, Any]:
    """An axis of checkpoints, of which not more are named than there is room for."""
    few = range(0, len(names), max(1, len(names) // _NAMES))
    return {"tickvals": [first + at for at in few], "ticktext": hover(names[at] for at in few)}


def _went(change: float | None) -> str:
    return "from 0" if change == math.inf else f"changed by {short(change)}"


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
