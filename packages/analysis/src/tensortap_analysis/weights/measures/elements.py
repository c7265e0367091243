"""What is counted of values one by one, once mean and standard deviation are known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tensortap import native
from tensortap_analysis.weights.measures.values import Values

OUTLIER = 3.0
"""Standard deviations from the mean, beyond which a value is an extreme outlier."""


@dataclass(slots=True)
class Elements:
    """Counts, and the sum of fourth powers of standardised values."""

    outliers: float = 0.0
    fourth: float = 0.0
    near_zero: float = 0.0


def by_kernel(matrix: torch.Tensor, mean: float, std: float, near_zero: float) -> Elements | None:
    """Pass over a contiguous matrix, or `None` where nothing compiled can read it.

    Where values are not finite only `near_zero` means anything.
    """
    kernel = native.library()
    if kernel is None or not std or matrix.dtype not in (torch.float32, torch.float64):
        return None
    found = kernel.surveying.elements(matrix, mean, std, OUTLIER * std, near_zero)
    return Elements(fourth=found[0], outliers=found[1], near_zero=found[2])


def elements(values: Iterable[Values], mean: float, std: float, near_zero: float) -> Elements:
    """Pass over finite values; `fourth` stays 0 where there is no spread."""
    found = Elements()
    for some in values:
        found.near_zero += some.total(some.x.abs() <= near_zero)
        if std:
            _add(found, some, mean, std)
    return found


def _add(found: Elements, some: Values, mean: float, std: float) -> None:
    apart = some.x.to(torch.float64) - mean
    found.outliers += some.total(apart.abs() > OUTLIER * std)
    found.fourth += some.squares(apart.div_(std).square_())
