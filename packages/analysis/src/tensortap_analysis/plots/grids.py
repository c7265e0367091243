"""A statistic of many tensors as a grid: a row for each family, a column for each layer or step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize

from tensortap_analysis.plots.style import (
    Floats,
    colour_ticks,
    labelled,
    say,
    signed_norm,
)

ROWS = 48
"""More families than this do not fit on a picture."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """`values[row, column]`; NaN where there is no such tensor."""

    rows: tuple[str, ...]
    columns: tuple[int, ...]
    values: Floats


def by_depth(names: Sequence[str], layers: Mapping[str, tuple[str, int]], values: Floats) -> Grid:
    """`values` of each name (the largest of several) by the (family, layer) that `layers` gives."""
    placed = [(*layers[name], value) for name, value in zip(names, values, strict=True)
              if name in layers]  # fmt: skip
    families = tuple(dict.fromkeys(family for family, _, _ in placed))
    columns = tuple(sorted({layer for _, layer, _ in placed}))
    row = {family: at for at, family in enumerate(families)}
    column = {layer: at for at, layer in enumerate(columns)}
    grid = np.full((len(families), len(columns)), np.nan)
    for family, layer, value in placed:
        here = row[family], column[layer]
        grid[here] = np.fmax(grid[here], value)
    return Grid(families, columns, grid)


def paint(axes: Axes, grid: Grid, title: str, xlabel: str, *, signed: bool = False) -> None:
    """Colours by size, logarithmic where they span decades; infinite cells black, none white."""
    finite = grid.values[np.isfinite(grid.values)]
    if not finite.size:
        say(axes, f"{title}: nothing finite")
        return
    norm = signed_norm(finite) if signed else _norm(finite)
    shown = np.where(np.isfinite(grid.values), grid.values, np.nan)
    if isinstance(norm, LogNorm):
        shown = np.where(shown > 0, shown, finite[finite > 0].min())
        shown = np.where(np.isfinite(grid.values), shown, np.nan)
    drawn = axes.imshow(
        shown, aspect="auto", cmap="RdBu_r" if signed else "viridis", norm=norm,
        interpolation="nearest",
    )  # fmt: skip
    for y, x in np.argwhere(np.isinf(grid.values)):
        axes.plot(x, y, "s", color="black", ms=4)
    axes.grid(visible=False)
    axes.set(title=title, xlabel=xlabel)
    every = max(1, -(-len(grid.columns) // 12))
    axes.set_xticks(range(0, len(grid.columns), every), [str(c) for c in grid.columns[::every]])
    axes.set_yticks(range(len(grid.rows)), labelled(grid.rows, 44))
    axes.tick_params(axis="y", labelsize=6.5)
    figure = axes.get_figure()
    assert figure is not None
    ticks = colour_ticks(norm)
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, aspect=40, ticks=ticks)
    if ticks is not None:
        bar.minorticks_off()


def _norm(finite: Floats) -> Normalize:
    above = finite[finite > 0]
    if above.size and above.max() > 20 * above.min():
        return LogNorm(float(above.min()), float(above.max()))
    return Normalize(float(finite.min()), float(finite.max()))
