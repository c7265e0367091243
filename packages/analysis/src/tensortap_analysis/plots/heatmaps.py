"""heatmaps/: one tensor as an image, with the largest magnitude of each column above it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from tensortap_analysis.plots.samples import Sheet
from tensortap_analysis.plots.style import (
    BLUE,
    Floats,
    colour_ticks,
    decades,
    figure,
    save,
    say,
    signed_norm,
)


def draw(sheet: Sheet, path: Path, title: str, axes_words: tuple[str, str]) -> Path:
    """One picture; `axes_words` name the rows and the columns."""
    drawn = figure(7.2, 4.6)
    top, body = drawn.subplots(2, 1, sharex=True, height_ratios=(1, 4))
    if not np.isfinite(sheet.values).any():
        for part in (top, body):
            say(part, "no finite value")
        return save(drawn, path, title, sheet.note)
    _columns(top, sheet)
    image(body, sheet.values, extent=(0, sheet.shape[1], sheet.shape[0], 0))
    body.set(ylabel=axes_words[0], xlabel=axes_words[1])
    if sheet.shape[0] == 1:
        body.set_yticks([])
    strange = int((~np.isfinite(sheet.values)).sum())
    note = f"{sheet.note}; green: NaN or Inf ({strange:,} cells)" if strange else sheet.note
    return save(drawn, path, title, note)


def image(axes: Axes, values: Floats, **how: Any) -> None:
    """Red above 0, blue below; colours are logarithmic where the values span decades."""
    norm = signed_norm(values[np.isfinite(values)])
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad="#00cc44")
    shown = np.where(np.isfinite(values), values, np.nan)
    drawn = axes.imshow(
        shown, aspect="auto", cmap=colours, norm=norm, interpolation="nearest", **how
    )
    axes.grid(visible=False)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(drawn, ax=axes, pad=0.01, label="value", ticks=colour_ticks(norm))


def _columns(axes: Axes, sheet: Sheet) -> None:
    sizes = np.where(np.isfinite(sheet.values), np.abs(sheet.values), 0).max(axis=0)
    edges = np.minimum(np.arange(len(sizes) + 1) * sheet.pooled, sheet.shape[1])
    axes.stairs(sizes, edges, fill=True, color=BLUE)
    if decades(sizes):
        axes.set_yscale("log")
    axes.set_ylabel("absmax of\ncolumn")
