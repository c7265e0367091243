"""distributions/: histogram, box plot and normal quantile-quantile plot of one tensor."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import numpy as np
from matplotlib.axes import Axes

from tensortap_analysis.plots.samples import Sample
from tensortap_analysis.plots.style import (
    BLUE,
    ORANGE,
    RED,
    Floats,
    count_scale,
    figure,
    save,
    say,
    scale,
)

LIMIT = 1 << 16
"""Values of a tensor that are shown."""
_QUANTILES = 400


def draw(sample: Sample, path: Path, title: str) -> Path:
    """One picture of three panels."""
    drawn = figure(9.6, 3.1)
    axes = drawn.subplots(1, 3, width_ratios=(1.5, 0.6, 1))
    values = sample.finite
    for panel, part in zip((histogram, _box, _normal), axes, strict=True):
        if values.size:
            panel(part, values)
        else:
            say(part, "no finite value")
    strange = sample.values.size - values.size
    note = f"{sample.note}; {strange:,} of them NaN or Inf, not drawn" if strange else sample.note
    return save(drawn, path, title, note)


def histogram(axes: Axes, values: Floats, bins: int = 100) -> None:
    """Counts in `bins` bins; mean and standard deviation are the orange line and band."""
    edges = scale(axes, values, "x")
    axes.hist(values, bins=bins if edges is None else edges, color=BLUE)
    count_scale(axes)
    mean, std = float(values.mean()), float(values.std())
    axes.axvline(mean, color=ORANGE)
    axes.axvspan(mean - std, mean + std, color=ORANGE, alpha=0.15, lw=0)
    axes.set(title=f"mean {mean:.4g} ± std {std:.4g}", xlabel="value", ylabel="values in bin")


def _box(axes: Axes, values: Floats) -> None:
    """Whiskers at 1.5 interquartile ranges (Tukey); of what lies outside at most 2,000 points."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    reach = 1.5 * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    outside = np.sort(values[(values < low - reach) | (values > high + reach)])
    shown = outside[:: max(1, len(outside) // 2000)]
    box = {
        "med": middle, "q1": low, "q3": high, "whislo": inside.min(), "whishi": inside.max(),
        "fliers": shown,
    }  # fmt: skip
    scale(axes, values, "y")
    axes.bxp(
        [box],
        widths=0.5,
        patch_artist=True,
        boxprops={"facecolor": "#9ecae1"},
        medianprops={"color": RED},
        flierprops={"marker": ".", "markersize": 2, "markerfacecolor": BLUE, "alpha": 0.5,
                    "markeredgewidth": 0},
    )  # fmt: skip
    axes.set_xticks([])
    beyond = f"{len(outside) / values.size:.2%} beyond"
    axes.set(title="box and whiskers", xlabel=f"{beyond} 1.5 quartile ranges", ylabel="value")


def _normal(axes: Axes, values: Floats) -> None:
    """Quantiles against those of a normal distribution of the same mean and deviation."""
    std = float(values.std())
    if not std:
        say(axes, f"constant {values[0]:.4g}")
        return
    count = min(_QUANTILES, values.size)
    shares = (np.arange(count) + 0.5) / count
    # The extremes say most about tails, and even shares would leave them out.
    ends = [0.5 / values.size, 1 - 0.5 / values.size]
    shares = np.unique(np.concatenate([shares, np.geomspace(ends[0], 0.5, 60), ends,
                                       1 - np.geomspace(ends[0], 0.5, 60)]))  # fmt: skip
    normal = NormalDist()
    expected = np.array([normal.inv_cdf(float(share)) for share in shares])
    axes.plot(expected, (np.quantile(values, shares) - values.mean()) / std, ".", ms=3, color=BLUE)
    axes.plot(expected, expected, "-", lw=0.8, color=RED, label="normal")
    axes.set(title="Normal Q-Q", xlabel="normal quantile", ylabel="(value - mean) / std")
    axes.legend(loc="upper left")
