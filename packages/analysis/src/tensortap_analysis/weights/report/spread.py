"""How the values of a few layers are spread, and where formats have values to round them to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
import torch

from tensortap import formats
from tensortap_analysis.report.figures import COLOURS, Chart, figure, hover
from tensortap_analysis.weights.result import ScanResult
from tensortap_analysis.weights.weight import Weight

Floats = npt.NDArray[np.float64]

GRIDS = ("int4", "mxfp4", "nvfp4")
"""Formats with few values, whose grid can be drawn."""
_LAYERS, _BINS, _VALUES = 6, 161, 1 << 20


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of a layer's finite values by bins, and the values of formats at a usual scale.

    `grids` are the values that a block of median size can be rounded to. `share` is the share of
    the values that was looked at, whole rows of them.
    """

    layer: str
    edges: Floats
    counts: Floats
    grids: dict[str, Floats]
    share: float


def worst_layers(result: ScanResult) -> list[str]:
    """The layers that int8 serves worst, the worst first."""
    known = {
        layer: stats["quantization"]["sqnr_db_per_channel"]
        for layer, stats in result.items()
        if stats.get("quantization", {}).get("sqnr_db_per_channel") is not None
    }
    return sorted(known, key=lambda layer: known[layer])[:_LAYERS]


def histograms(weights: Sequence[Weight], layers: Sequence[str]) -> list[Histogram]:
    """Of these layers, in this order; of a stack of experts its first matrix."""
    by_layer = {weight.layer: weight for weight in weights}
    found = (_histogram(by_layer[layer]) for layer in layers if layer in by_layer)
    return [one for one in found if one is not None]


def _histogram(weight: Weight) -> Histogram | None:
    [matrix] = islice(weight.matrices(), 1)
    rows = max(1, _VALUES // max(matrix.shape[1], 1))
    step = -(-len(matrix) // rows)
    some = matrix[::step].to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    values = some[some.isfinite()].double().numpy()
    if not values.size or not values.any():
        return None
    largest = float(np.abs(values).max())
    counts, edges = np.histogram(values, bins=_BINS, range=(-largest, largest))
    grids = {name: _grid(some, name) for name in GRIDS}
    return Histogram(weight.layer, edges, counts.astype(float), grids, len(some) / len(matrix))


def _grid(matrix: torch.Tensor, name: str) -> Floats:
    """The values that the format has in a block whose largest magnitude is the median one."""
    codec = formats.get(name)
    width = codec.block or matrix.shape[1]
    whole = matrix.nan_to_num(0.0, 0.0, 0.0)
    pad = -whole.shape[1] % width
    blocks = torch.nn.functional.pad(whole, (0, pad)).view(-1, width)
    sizes = blocks.abs().amax(1)
    sizes = sizes[sizes > 0]
    typical = float(sizes.median())
    # Evenly spaced values of that block, rounded: all that it can hold, for a ramp is dense.
    ramp = torch.linspace(-typical, typical, 2048 * width).view(width, 2048).T.contiguous()
    ramp[:, 0] = typical
    return np.asarray(np.unique(codec.fake_quantize(ramp).double().numpy()))


def charts(found: Sequence[Histogram]) -> Iterator[Chart]:
    """One for each layer: counts on a logarithmic axis, and below it the grids."""
    for number, one in enumerate(found):
        part = "" if one.share == 1 else f" {one.share:.0%} of its rows were looked at."
        yield Chart(
            f"histogram-{number}", f"Values of {one.layer}",
            "How many values lie where; below, the values that formats have in a block of usual "
            f"size.{part}", _drawn(one),
        )  # fmt: skip


def _drawn(one: Histogram) -> go.Figure:
    middle = (one.edges[1:] + one.edges[:-1]) / 2
    line = go.Scatter(
        x=middle.tolist(), y=[count or 0.7 for count in one.counts.tolist()], name="values",
        mode="lines", line={"color": COLOURS[0], "shape": "hvh", "width": 1.5}, hoverinfo="text",
        hovertext=hover(f"{x:.4g}: {count:,.0f} values"
                        for x, count in zip(middle.tolist(), one.counts.tolist(), strict=True)),
    )  # fmt: skip
    marks = [
        go.Scatter(
            x=values.tolist(), y=[0.35 / 2.2**place] * len(values), name=name, mode="markers",
            marker={"symbol": "line-ns-open", "size": 11, "color": COLOURS[1 + place],
                    "line": {"width": 2}},
            hoverinfo="text", hovertext=hover(f"{name}: {value:.4g}" for value in values.tolist()),
        )
        for place, (name, values) in enumerate(one.grids.items())
    ]  # fmt: skip
    top = np.log10(one.counts.max()) + 0.2
    axis = {"type": "log", "range": [-1.3, float(top)], "dtick": 1, "exponentformat": "power"}
    return figure([line, *marks], "value", "count", height=300, yaxis=axis)
