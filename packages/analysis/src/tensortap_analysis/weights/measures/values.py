"""Values of a matrix where their place does not matter: each for itself, or with its count."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tensortap_analysis.weights.measures.pieces import working


@dataclass(frozen=True, slots=True)
class Values:
    """Finite values, float32 or float64, and how many each stands for (float64).

    `counts` is `None` where each stands for itself.
    """

    x: torch.Tensor
    counts: torch.Tensor | None = None

    def total(self, numbers: torch.Tensor) -> float:
        """Sum over all values of one number, or one mark, for each."""
        if self.counts is None:
            return float(numbers.sum(dtype=torch.float64))
        return float(torch.dot(numbers.to(torch.float64), self.counts))

    def squares(self, numbers: torch.Tensor) -> float:
        """Sum over all values of the square of one float64 number for each."""
        weighted = numbers if self.counts is None else numbers * self.counts
        return float(torch.dot(numbers, weighted))


def finite(piece: torch.Tensor) -> Values:
    """The finite ones of a piece of a matrix, in working precision."""
    x = piece.reshape(-1).to(working(piece))
    kept = x.isfinite()
    return Values(x if bool(kept.all()) else x[kept])
