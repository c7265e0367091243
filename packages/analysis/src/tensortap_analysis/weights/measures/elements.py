"""What is counted of values one by one, once mean and standard deviation are known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tensortap_analysis.weights.measures.values import Values

OUTLIER = 3.0
"""Standard deviations from the mean, beyond which a value is an extreme outlier."""


@dataclass(slots=True)
class Elements:
    """Counts, and the sum of fourth powers of standardised values."""

    outliers: float = 0.0
    fourth: float = 0.0
    near_zero: float = 0.0


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
