"""How one matrix became another: norms, directions, the row that moved most."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap.stats import statistics

Doubles = npt.NDArray[np.float64]

_VALUES = 1 << 18
_BIG, _UNIT = 2.0**480, 2.0**600


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
    unit = _unit(max(one.absmax or 0.0 for one in stats))
    rows = np.concatenate([
        _rows(old, new, unit)
        for old, new in zip(_blocks(before), _blocks(after), strict=True)
    ]) if before.numel() else np.zeros((0, 6))  # fmt: skip
    old, new, apart, dot = (float(rows[:, at].sum()) for at in range(4))
    return {
        "l2_before": _known(math.sqrt(old) / unit),
        "l2_after": _known(math.sqrt(new) / unit),
        "l2_norm_ratio": _ratio(math.sqrt(new), math.sqrt(old)),
        "relative_change": _ratio(math.sqrt(apart), math.sqrt(old)),
        "cosine": _ratio(dot, math.sqrt(old) * math.sqrt(new)),
        "max_change": _known(float(rows[:, 4].max()) / unit if len(rows) else 0.0),
        "unchanged": float(rows[:, 5].sum()) / before.numel() if before.numel() else None,
        **_row_change(rows),
        "not_finite_before": stats[0].count - stats[0].finite,
        "not_finite_after": stats[1].count - stats[1].finite,
    }


def _blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(matrix, max(1, _VALUES // max(matrix.shape[1], 1)))


def _rows(old: torch.Tensor, new: torch.Tensor, unit: float) -> Doubles:
    """Of each row: squares before, after and of the difference, the product, the largest
    difference, and how many values are equal.
    """
    a, b = old.to(torch.float64) * unit, new.to(torch.float64) * unit
    apart = b - a
    found: Doubles = torch.stack(
        [
            a.square().sum(1), b.square().sum(1), apart.square().sum(1), (a * b).sum(1),
            apart.abs().amax(1), (apart == 0).sum(1).to(torch.float64),
        ],
        dim=1,
    ).numpy()  # fmt: skip
    return found


def _unit(largest: float) -> float:
    """A power of two that keeps squares of the values inside the range of float64."""
    if largest > _BIG:
        return 1 / _UNIT
    return _UNIT if 0 < largest < 1 / _BIG else 1.0


def _row_change(rows: Doubles) -> dict[str, Any]:
    """Rows that were zeros have no relative change, however far they went."""
    there = np.flatnonzero(rows[:, 0] > 0)
    with np.errstate(invalid="ignore"):
        changes = np.sqrt(rows[there, 2] / rows[there, 0])
    if not len(there) or not np.isfinite(changes).all():
        return {"row_change_max": None, "row_change_at": None}
    at = int(changes.argmax())
    return {"row_change_max": float(changes[at]), "row_change_at": int(there[at])}


def _ratio(numerator: float, denominator: float) -> float | None:
    if denominator:
        return _known(numerator / denominator)
    return math.inf if numerator > 0 else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
