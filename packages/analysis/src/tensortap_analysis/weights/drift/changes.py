"""How one matrix became another: norms, directions, the row that moved most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap.stats import statistics
from tensortap_analysis.weights.measures.units import unit_of

Doubles = npt.NDArray[np.float64]

_VALUES = 1 << 18


@torch.no_grad()
def change(before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    """Metrics of two 2-d CPU matrices of one shape and any dtypes; read in blocks of rows.

    `l2_norm_ratio`: ||after|| / ||before||, which is 1 for two unrelated matrices of one norm.
    `relative_change`: ||after - before|| / ||before||. `cosine`: of the matrices as vectors.
    `row_change_max`: the largest relative change of a row, `row_change_at` that row.
    `max_change`: the largest |difference|. `unchanged`: the share of values that are equal.
    `not_finite_before`, `not_finite_after`: how many are NaN or infinite; most metrics then are
    `None`, as is what would be 0 / 0. Differences are taken in float64.
    """
    stats = statistics(before), statistics(after)
    units = Units.of(*(one.absmax or 0.0 for one in stats))
    rows = np.concatenate([
        _rows(old, new, units)
        for old, new in zip(_blocks(before), _blocks(after), strict=True)
    ]) if before.numel() else np.zeros((0, 6))  # fmt: skip
    old, new, apart = (math.sqrt(rows[:, at].sum()) for at in range(3))
    largest = float(rows[:, 4].max()) if len(rows) else 0.0
    return {
        "l2_before": _known(old / units.before),
        "l2_after": _known(new / units.after),
        "l2_norm_ratio": _ratio(new, old, units.before / units.after),
        "relative_change": _ratio(apart, old, units.before / units.apart),
        "cosine": _cosine(float(rows[:, 3].sum()), old, new),
        "max_change": _known(largest / units.apart),
        "unchanged": float(rows[:, 5].sum()) / before.numel() if before.numel() else None,
        **_row_change(rows, units.before / units.apart),
        "not_finite_before": stats[0].count - stats[0].finite,
        "not_finite_after": stats[1].count - stats[1].finite,
    }


@dataclass(frozen=True, slots=True)
class Units:
    """What the values of either side, and their differences, are multiplied by."""

    before: float
    after: float
    apart: float

    @classmethod
    def of(cls, before: float, after: float) -> Units:
        """From the largest magnitude of either side."""
        return cls(unit_of(before), unit_of(after), unit_of(max(before, after)))


def _blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(matrix, max(1, _VALUES // max(matrix.shape[1], 1)))


def _rows(old: torch.Tensor, new: torch.Tensor, units: Units) -> Doubles:
    """Of each row: squares before, after and of the difference, the product, the largest
    difference, and how many values are equal.
    """
    a, b = old.to(torch.float64), new.to(torch.float64)
    same = (a == b).sum(1).to(torch.float64)
    apart = _times(b, units.apart) - _times(a, units.apart)
    a, b = _times(a, units.before), _times(b, units.after)
    found: Doubles = torch.stack(
        [
            a.square().sum(1), b.square().sum(1), apart.square().sum(1), (a * b).sum(1),
            apart.abs().amax(1), same,
        ],
        dim=1,
    ).numpy()  # fmt: skip
    return found


def _times(values: torch.Tensor, unit: float) -> torch.Tensor:
    return values if unit == 1 else values * unit


def _row_change(rows: Doubles, unit: float) -> dict[str, Any]:
    """Rows that were zeros have no relative change, however far they went; `unit` undoes those of
    both sides.
    """
    there = np.flatnonzero(rows[:, 0] > 0)
    if not len(there) or not np.isfinite(rows[:, :3]).all():
        return {"row_change_max": None, "row_change_at": None}
    changes = np.sqrt(rows[there, 2] / rows[there, 0])
    at = int(changes.argmax())
    return {"row_change_max": float(changes[at]) * unit, "row_change_at": int(there[at])}


def _cosine(dot: float, old: float, new: float) -> float | None:
    """Rounding may leave it a little beyond 1, which no cosine is."""
    found = _ratio(dot, old * new)
    return None if found is None else min(max(found, -1.0), 1.0)


def _ratio(numerator: float, denominator: float, unit: float = 1.0) -> float | None:
    """`unit` undoes those of both sides. Not known for 0 / 0, infinite for the rest over 0."""
    if denominator:
        return _known(numerator / denominator * unit)
    return math.inf if numerator > 0 else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
