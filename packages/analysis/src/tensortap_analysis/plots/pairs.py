"""The same values of two runs, side by side, for pictures of what they differ by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tensortap_analysis.captured.moments import Captured
from tensortap_analysis.pairs.alignment import align
from tensortap_analysis.pairs.reasons import NotComparable
from tensortap_analysis.plots.samples import numbers, ordinal, wide
from tensortap_analysis.plots.style import Floats

_BOX = 1 << 20


@dataclass(frozen=True, slots=True)
class Pair:
    """Every `every`-th of `count` values of two tensors, in the reference's order of axes."""

    ref: Floats
    run: Floats
    count: int
    every: int
    names: tuple[str, str]

    @property
    def both(self) -> tuple[Floats, Floats]:
        """Where both are finite."""
        good = np.isfinite(self.ref) & np.isfinite(self.run)
        return self.ref[good], self.run[good]

    @property
    def relative_l2(self) -> float:
        """Norm of the difference over that of the reference; infinite where only one is finite."""
        if (np.isfinite(self.ref) != np.isfinite(self.run)).any():
            return math.inf
        ref, run = self.both
        size = float(np.linalg.norm(ref))
        apart = float(np.linalg.norm(run - ref))
        return apart / size if size else (math.inf if apart else 0.0)

    @property
    def note(self) -> str:
        if self.every == 1:
            return f"all {self.count:,} values"
        return f"{self.ref.size:,} of {self.count:,} values: every {ordinal(self.every)}"


def pair(ref: Captured, run: Captured, limit: int) -> Pair:
    """At most about `limit` values; raises `NotComparable` where the two do not line up."""
    one, two = ref.open(), run.open()
    aligned = align(one.shape, one.dims, two.shape, two.dims)
    if isinstance(aligned, str):
        raise NotComparable(aligned, "shape")
    count = math.prod(one.shape)
    every = max(1, -(-count // limit))
    found: list[tuple[Floats, Floats]] = []
    at = 0
    for box in aligned.boxes(_BOX) if count else ():
        mine = aligned.ref.read(lambda where: numbers(one.read(where)), box).reshape(-1)
        theirs = aligned.other.read(lambda where: numbers(two.read(where)), box).reshape(-1)
        picked = slice(-at % every, None, every)
        found.append((wide(mine[picked]), wide(theirs[picked])))
        at += mine.numel()
    left, right = (np.concatenate([part[at] for part in found] or [np.empty(0)]) for at in (0, 1))
    return Pair(left, right, count, every, (ref.run.path.name, run.run.path.name))
