"""Where the runs part from the reference: by depth, in execution order, and what stands out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import plotly.graph_objects as go

from tensortap.tables import grouped
from tensortap_analysis.captured.words import layer_of
from tensortap_analysis.comparison.result import Comparison, RunComparison
from tensortap_analysis.comparison.tables import LAYERS, telling_layers, telling_moment
from tensortap_analysis.judging.presets import Judgement
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.rendering import cell
from tensortap_analysis.report.figures import (
    COLOURS,
    Chart,
    drawn,
    figure,
    hover,
    logarithmic,
    short,
    top,
    whole,
)
from tensortap_analysis.report.grids import grid
from tensortap_analysis.report.markup import Html, join, listing, table, tag

_POINTS = 2000
_GRIDS = 4
_WORST = 5
_LINES = 12
_WAYS = {"forward": ("solid", "circle"), "backward": ("dash", "diamond")}
_WHO = {"ref": "only in the reference", "run": "only in the run", "both": "not comparable"}


def section(found: Comparison, labels: Sequence[str]) -> Html:
    """Charts over all runs, then what is to be said of each."""
    runs = list(zip(found.runs, labels, strict=True))
    charts = [_by_depth(runs), _in_order(runs), *_grids(runs), *_spectra(runs)]
    words = [_words(run, label) for run, label in runs]
    return join((*(chart.markup() for chart in charts if chart is not None), *words))


Labelled = Sequence[tuple[RunComparison, str]]


def _by_depth(runs: Labelled) -> Chart | None:
    traces = []
    seen = [pair.error for run, _ in runs for pair in run.pairs]
    infinity = top(seen)
    for (run, label), colour in zip(runs, _cycled(), strict=False):
        for way, (dash, symbol) in _WAYS.items():
            worst = _worst_by_layer(run, way)
            if not worst:
                continue
            layers = sorted(worst)
            errors = [worst[layer].error for layer in layers]
            traces.append(go.Scatter(
                x=layers, y=drawn(errors, infinity), name=str(hover([f"{label}, {way}"])[0]),
                mode="lines+markers", line={"color": colour, "dash": dash, "width": 2},
                marker={"symbol": symbol, "size": 7}, hoverinfo="text",
                hovertext=hover(_point(worst[layer], label) for layer in layers),
            ))  # fmt: skip
    if not traces:
        return None
    axis = logarithmic(y for trace in traces for y in trace.y if y is not None)
    depths = whole(at for trace in traces for at in trace.x)
    return Chart(
        "by-depth", "Divergence by depth",
        "The largest relative L2 error of any tensor in each layer, over all steps. Equal tensors "
        "have no place on a logarithmic axis; NaN or infinity on one side only is drawn on top.",
        figure(traces, "layer", "relative L2 error", yaxis=axis, xaxis=depths),
    )  # fmt: skip


def _worst_by_layer(run: RunComparison, way: str) -> dict[int, Pair]:
    """Activations of forward; gradients of both kinds for backward."""
    phases = ("forward",) if way == "forward" else ("backward", "grad")
    worst: dict[int, Pair] = {}
    for pair in run.pairs:
        layer = layer_of(pair.name)
        if layer is None or pair.name.split("/")[1] not in phases:
            continue
        if layer not in worst or pair.error > worst[layer].error:
            worst[layer] = pair
    return worst


def _in_order(runs: Labelled) -> Chart | None:
    traces, cut = [], 0
    infinity = top([10.0, *(one.excess for run, _ in runs for one in run.judgements)])
    for (run, label), colour in zip(runs, _cycled(), strict=False):
        both = _thinned(list(zip(run.pairs, run.judgements, strict=True)))
        cut += len(run.pairs) - len(both)
        excess = drawn([judgement.excess for _, judgement in both], infinity)
        if not any(value is not None for value in excess):
            continue
        local = {id(one.pair) for one in run.local}
        traces.append(go.Scatter(
            x=[pair.order for pair, _ in both], y=excess, name=str(hover([label])[0]),
            mode="markers", hoverinfo="text",
            marker={
                "color": colour, "opacity": 0.75,
                "size": [10 if id(pair) in local else 5 for pair, _ in both],
                "symbol": ["diamond" if id(pair) in local else "circle" for pair, _ in both],
            },
            hovertext=hover(f"{_point(p, label)}\n{j.grade}" for p, j in both),
        ))  # fmt: skip
    if not traces:
        return None
    seen = [1.0, *(y for trace in traces for y in trace.y if y is not None)]
    drawing = figure(
        traces, "place in execution order", "error, in units of its limit", yaxis=logarithmic(seen)
    )
    drawing.add_hline(y=1, line={"color": "#d1495b", "width": 1.5, "dash": "dot"})
    thinned = f" {cut:,} tensors are not drawn: of neighbours the worst is." if cut else ""
    return Chart(
        "in-order", "Every tensor against its limit",
        "In execution order of the reference. Above the dotted line is beyond the limit; a diamond "
        f"marks an error that was added there, not inherited.{thinned}", drawing,
    )  # fmt: skip


def _thinned(both: list[tuple[Pair, Judgement]]) -> list[tuple[Pair, Judgement]]:
    """At most `_POINTS`: the worst of every stretch of execution order."""
    every = -(-len(both) // _POINTS)
    stretches = (both[start : start + every] for start in range(0, len(both), max(every, 1)))
    return [max(some, key=lambda row: (row[1].excess, row[0].error)) for some in stretches]


def _grids(runs: Labelled) -> Iterator[Chart]:
    for number, (run, label) in enumerate(runs[:_GRIDS]):
        made = grid(((pair.name, pair.error) for pair in run.pairs), "relative L2 error")
        if made is None or not any(pair.error > 0 for pair in run.pairs):
            continue
        left = f" Not drawn: {made[1]}." if made[1] else ""
        more = len(runs) - _GRIDS
        if number == _GRIDS - 1 and more > 0:
            left += f" {more} more runs have no grid; the table has their tensors."
        yield Chart(
            f"grid-{number}", f"Layers of {label}",
            "The largest relative L2 error of each tensor in each layer, over all steps. Empty: "
            f"equal, or not there; ∞: NaN or infinity on one side only.{left}", made[0],
        )  # fmt: skip


def _spectra(runs: Labelled) -> Iterator[Chart]:
    """How the differences of the worst tensors are spread over powers of two."""
    for number, (run, label) in enumerate(runs[:_GRIDS]):
        ranked = sorted(
            (pair for pair in run.pairs if pair.by != "statistics" and pair.rmse > 0),
            key=lambda pair: -pair.error,
        )
        named = {pair.name: pair for pair in reversed(ranked)}
        worst = sorted(named.values(), key=lambda pair: -pair.error)[:_WORST]
        if not worst:
            continue
        traces = [_spectrum(p, c) for p, c in zip(worst, _cycled(), strict=False)]
        yield Chart(
            f"spectrum-{number}", f"How large the differences are: {label}",
            "Shares of the values of the worst tensors by the size of their difference; each bar "
            "is one power of two.", figure(
                traces, "log2 |difference|", "share of values", yaxis={"tickformat": ".0%"}
            ),
        )  # fmt: skip


def _spectrum(pair: Pair, colour: str) -> go.Scatter:
    octaves = pair.metrics.error_histogram.absolute
    counts: dict[int, int] = {}
    for side in (octaves.negative, octaves.positive):
        for exponent, count in side.items():
            counts[exponent] = counts.get(exponent, 0) + count
    whole = sum(counts.values()) + octaves.zero
    sizes = list(range(min(counts), max(counts) + 1))
    shares = [counts.get(size, 0) / whole for size in sizes]
    return go.Scatter(
        x=sizes, y=shares, name=hover([pair.name])[0], line={"color": colour, "shape": "hvh"},
        hoverinfo="text",
        hovertext=hover(
            f"{pair.name}\n2^{e} to 2^{e + 1}: {s:.2%}; equal: {octaves.zero / whole:.2%}"
            for e, s in zip(sizes, shares, strict=True)
        ),
    )  # fmt: skip


def _words(run: RunComparison, label: str) -> Html:
    """What stands out in one run, and what was not compared."""
    parts: list[str] = [tag("h3", label), *_depth(run)]
    for title, lines in (
        ("Notes", list(run.notes)),
        ("Errors added there (local)", [str(found) for found in run.local]),
        ("Inherited or added there, not told", [str(found) for found in run.unknown]),
        ("Abnormal", list(run.abnormal)),
        ("Jumps between layers", [str(change) for change in run.jumps]),
        *((_WHO[who], list(grouped(_rows(run, who)))) for who in _WHO),
    ):
        if lines:
            parts += [tag("h4", f"{title} ({len(lines):,})"), listing(lines, _LINES)]
    if len(parts) == 1:
        parts.append(tag("p", "Nothing stands out, and everything was compared.", class_="quiet"))
    return tag("div", *parts, class_="words")


def _depth(run: RunComparison) -> Iterator[Html]:
    """The error that goes into each layer and comes out, and what is added inside."""
    if not run.divergences or len(run.depth) < 2:
        return
    yield tag("h4", f"Error by depth, {telling_moment(run)}")
    yield tag("p", "Relative L2 errors of the forward pass; ~ is an estimate.", class_="says")
    rows = ({key: cell(row[key]) for key in LAYERS} for row in telling_layers(run))
    yield table(LAYERS, rows, {"layer", "by"})


def _rows(run: RunComparison, who: str) -> Iterator[tuple[str, str, int]]:
    return ((one.name, one.reason, one.count) for one in run.unpaired if one.where == who)


def _point(pair: Pair, label: str) -> str:
    least = "at least " if pair.by == "statistics" else ""
    error = "NaN or infinity on one side" if math.isinf(pair.error) else short(pair.error)
    return f"{pair.name}\n{label}, {pair.at.when}\nrelative L2 error {least}{error}"


def _cycled() -> Iterator[str]:
    while True:
        yield from COLOURS
