"""quick_analysis.png: all values of a run in one histogram, and what kinds of tensors it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from tensortap.records import Statistics
from tensortap_analysis.plots.samples import Sample
from tensortap_analysis.plots.style import BLUE, ORANGE, Floats, figure, save, say

_LOW, _HIGH, _PER_DECADE = -45, 39, 10


@dataclass(slots=True)
class Magnitudes:
    """How many values have which magnitude, by sign: bins of a tenth of a decade.

    `unsigned` counts those of which only an exponent is known. A sampled value counts for all
    that it stands for.
    """

    positive: Floats = field(default_factory=lambda: _empty())
    negative: Floats = field(default_factory=lambda: _empty())
    unsigned: Floats = field(default_factory=lambda: _empty())
    zeros: float = 0.0
    strange: float = 0.0
    values: float = 0.0
    tensors: int = 0
    sampled: int = 0

    def add(self, sample: Sample) -> None:
        weight = sample.count / max(sample.values.size, 1)
        finite = sample.finite
        self.positive += _binned(finite[finite > 0]) * weight
        self.negative += _binned(-finite[finite < 0]) * weight
        self.zeros += float((finite == 0).sum()) * weight
        self.strange += (sample.values.size - finite.size) * weight
        self._count(sample.count)
        self.sampled += sample.every > 1

    def add_exponents(self, pieces: Sequence[Statistics]) -> None:
        """A tensor by the octaves of its pieces, each spread evenly on the logarithmic axis."""
        for piece in pieces:
            exponents = piece.exponents or {}
            for exponent, many in exponents.items():
                self.unsigned += _binned(2.0 ** (exponent + (np.arange(8) + 0.5) / 8)) * (many / 8)
            self.zeros += piece.zero
            self.strange += piece.count - piece.zero - sum(exponents.values())
        if pieces:
            self._count(sum(piece.count for piece in pieces))

    def _count(self, values: int) -> None:
        self.values += values
        self.tensors += 1


def _empty() -> Floats:
    return np.zeros((_HIGH - _LOW) * _PER_DECADE)


def _binned(sizes: Floats) -> Floats:
    at = np.floor((np.log10(sizes) - _LOW) * _PER_DECADE).astype(int)
    counts: Floats = np.bincount(
        at.clip(0, (_HIGH - _LOW) * _PER_DECADE - 1), minlength=len(_empty())
    ).astype(np.float64)
    return counts


def draw(
    magnitudes: Magnitudes, shares: Mapping[str, Counter[str]], path: Path, title: str
) -> Path:
    """Four panels; `shares` counts values by format, by layer type and by phase."""
    drawn = figure(9.6, 6.2)
    panels = drawn.subplots(2, 2)
    _histogram(panels[0, 0], magnitudes)
    rest = (panels[0, 1], panels[1, 0], panels[1, 1])
    for axes, (what, counts) in zip(rest, shares.items(), strict=True):
        _shares(axes, what, counts)
    note = (
        f"histogram: {magnitudes.tensors:,} floating-point tensors, each at the last step that has "
        "it, without masks; shares: of all steps"
    )
    if magnitudes.sampled:
        note += f"; {magnitudes.sampled:,} of them sampled evenly, and scaled up"
    return save(drawn, path, title, note)


def _histogram(axes: Axes, found: Magnitudes) -> None:
    edges = 10.0 ** (np.arange(len(found.positive) + 1) / _PER_DECADE + _LOW)
    everything = found.positive + found.negative + found.unsigned
    if not everything.any():
        say(axes, "statistics only, without exponents:\ncapture values or exponents=True")
        return
    used = np.flatnonzero(everything)
    low, high = used[0], used[-1] + 1
    for counts, name, colour in (
        (found.positive, "positive", BLUE),
        (found.negative, "negative", ORANGE),
        (found.unsigned, "from exponents", "#777777"),
    ):
        if counts.any():
            axes.stairs(counts[low:high], edges[low : high + 1], color=colour, label=name)
    axes.set(
        xscale="log",
        yscale="log",
        title=f"{found.values:,.0f} values at one step: {found.zeros / max(found.values, 1):.1%} "
        f"are 0, {found.strange:,.0f} NaN or Inf",
        xlabel="magnitude",
        ylabel="values in a tenth of a decade",
    )
    axes.legend(loc="upper left")


def _shares(axes: Axes, what: str, counts: Counter[str]) -> None:
    ranked: Sequence[tuple[str, int]] = counts.most_common(12)
    total = max(counts.total(), 1)
    slots = max(len(ranked), 4)  # So that two bars are no walls.
    places = slots - 1 - np.arange(len(ranked))
    sizes = np.array([100 * count / total for _, count in ranked])
    axes.barh(places, sizes, color=BLUE, height=0.7)
    for place, size, (_, count) in zip(places, sizes, ranked, strict=True):
        axes.text(
            float(size) + 1,
            float(place),
            f"{size:.1f} %  ({_short(count)})",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(places, [word for word, _ in ranked])
    axes.set(
        xlim=(0, 128),
        ylim=(-0.6, slots - 0.4),
        title=f"Values by {what}",
        xlabel="share of values, %",
    )
    axes.set_xticks(range(0, 101, 20))
    axes.grid(visible=False, axis="y")


def _short(count: int) -> str:
    """`1.2M`: for the end of a bar."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
