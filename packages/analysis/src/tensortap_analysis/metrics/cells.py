"""Sums over pairs of values, in numpy: each pair once, or as often as it occurs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensortap.native.totals import Frame, Moments, Totals

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Cells:
    """Pairs of values, and how often each occurs; `None`: once."""

    ref: Floats
    other: Floats
    times: Ints | None = None

    def __len__(self) -> int:
        """How many pairs there are, each as often as it occurs."""
        return len(self.ref) if self.times is None else int(self.times.sum())

    def at(self, places: npt.NDArray[np.bool_]) -> Cells:
        """Some of them."""
        times = None if self.times is None else self.times[places]
        return Cells(self.ref[places], self.other[places], times)

    def sum(self, x: Floats) -> float:
        """The sum of a value of each, as often as it occurs."""
        return float((x if self.times is None else x * self.times).sum())

    def count(self, which: npt.NDArray[np.bool_]) -> int:
        """How many of them are as `which` says, each as often as it occurs."""
        return int(which.sum() if self.times is None else self.times[which].sum())

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Which are finite on both sides."""
        found: npt.NDArray[np.bool_] = np.isfinite(self.ref) & np.isfinite(self.other)
        return found

    def differences(self, frame: Frame) -> tuple[Floats, Floats]:
        """`other - ref` and that over |ref| + 1e-8, both in units of `half`."""
        half = frame.half
        apart = self.other * half - self.ref * half + 0.0  # -0.0 would be a second kind of nothing
        relative = np.abs(apart) / (np.abs(self.ref) * half + _EPSILON * half)
        return apart, np.copysign(relative, apart)


def add_odd(odd: Cells, totals: Totals) -> None:
    """Count pairs that are not finite on both sides."""
    totals.nan_ref = odd.count(np.isnan(odd.ref))
    totals.nan_other = odd.count(np.isnan(odd.other))
    totals.inf_ref, totals.inf_other = odd.count(np.isinf(odd.ref)), odd.count(np.isinf(odd.other))
    alike = np.isnan(odd.ref) & np.isnan(odd.other) | (odd.ref == odd.other)
    totals.mismatches = odd.count(~alike)


def add_finite(cells: Cells, apart: Floats, relative: Floats, frame: Frame, to: Totals) -> None:
    """Sums of pairs that are finite on both sides, of which there is at least one."""
    wide, size = apart * frame.difference, np.abs(apart)
    r, o = cells.ref * frame.ref, cells.other * frame.other
    to.compared = len(cells)
    to.ref = _moments(cells, cells.ref, r, frame.ref_origin)
    to.other = _moments(cells, cells.other, o, frame.other_origin)
    to.difference = _moments(cells, apart, wide, frame.difference_origin)
    centred = (r - r[0]) - cells.sum(r - r[0]) / len(cells)
    to.comoment = cells.sum(centred * (o - o[0]))  # a BLAS product would wake its threads
    to.abs_ref, to.abs_difference = cells.sum(np.abs(r)), cells.sum(np.abs(wide))
    to.largest, to.zero = float(size.max()), cells.count(size == 0)
    to.relative_max, to.relative_sum = float(np.abs(relative).max()), cells.sum(np.abs(relative))


def _moments(cells: Cells, values: Floats, scaled: Floats, origin: float) -> Moments:
    deviation = scaled - scaled[0]
    mean = cells.sum(deviation) / len(cells)
    m2 = cells.sum((deviation - mean) ** 2)
    return Moments(values.min() + 0.0, values.max() + 0.0, (scaled[0] - origin) + mean, m2)


def add_ulps(cells: Cells, ref: Ints, other: Ints, to: Totals) -> None:
    """How far apart floats stand, each given by its place among those of its dtype."""
    # As unsigned numbers a distance of up to 2^64 wraps around to itself.
    up, down = (x.view(np.uint64) - y.view(np.uint64) for x, y in ((ref, other), (other, ref)))
    far = np.where(ref > other, up, down)
    to.ulp_max, to.ulp_sum = int(far.max()), cells.sum(far.astype(np.float64))
