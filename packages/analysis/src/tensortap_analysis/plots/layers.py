"""layers/: the three panels of one layer: histogram, first values, and its first features."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tensortap_analysis.plots.distributions import histogram
from tensortap_analysis.plots.heatmaps import image
from tensortap_analysis.plots.samples import Sample, Sheet
from tensortap_analysis.plots.style import BLUE, figure, save, say, scale

FIRST, FEATURES = 1000, 100
"""How many leading values of a layer are shown, and how many features of each token."""


def draw(sample: Sample, first: Sample, sheet: Sheet, path: Path, title: str) -> Path:
    """One picture; `first` holds the leading values, `sheet` the first features of every token."""
    drawn = figure(10.5, 3.2)
    left, middle, right = drawn.subplots(1, 3, width_ratios=(1, 1.2, 1.1))
    if not sample.finite.size:
        for part in (left, middle, right):
            say(part, "no finite value")
        return save(drawn, path, title, sample.note)
    histogram(left, sample.finite)
    shown = first.values[:FIRST]
    middle.plot(np.where(np.isfinite(shown), shown, np.nan), lw=0.6, color=BLUE)
    scale(middle, first.finite, "y")
    middle.set(title=f"First {len(shown):,} values", xlabel="position in memory", ylabel="value")
    features = sheet.values[:, :FEATURES]
    image(right, features, extent=(0, features.shape[1], sheet.shape[0], 0))
    right.set(title=f"First {features.shape[1]} features", xlabel="feature", ylabel="token")
    return save(drawn, path, title, f"histogram: {sample.note}; image: {sheet.note}")
