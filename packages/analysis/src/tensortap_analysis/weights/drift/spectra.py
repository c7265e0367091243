"""What drift asks of a spectrum, and how two of them compare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tensortap_analysis.weights.measures import measure
from tensortap_analysis.weights.options import Options

_OPTIONS = Options(formats=())


@dataclass(frozen=True, slots=True)
class Spectra:
    """Of one matrix; `None` where it has none. `unresolved`: why the condition is not known."""

    s_max: float | None
    condition: float | None
    effective_rank: float | None
    unresolved: str | None


def spectra(matrix: torch.Tensor, dtype: torch.dtype) -> Spectra:
    """Measured as by a scan."""
    found = measure(matrix, dtype, ("spectral",), _OPTIONS)["spectral"]
    return Spectra(
        found["s_max"], found["condition_number"], found["effective_rank"],
        found["unresolved"].get("condition_number"),
    )  # fmt: skip


def growth(before: Spectra, after: Spectra) -> dict[str, Any]:
    """`spectral_norm_ratio`, `condition_growth`, `effective_rank_ratio`, and both sides of each.

    `unresolved` says why the growth of a condition number is not known: the dtype of either side
    cannot resolve it.
    """
    reason = before.unresolved or after.unresolved
    return {
        "spectral_norm_before": before.s_max,
        "spectral_norm_after": after.s_max,
        "spectral_norm_ratio": _ratio(after.s_max, before.s_max),
        "condition_before": before.condition,
        "condition_after": after.condition,
        "condition_growth": _ratio(after.condition, before.condition),
        "effective_rank_ratio": _ratio(after.effective_rank, before.effective_rank),
        "unresolved": {} if reason is None else {"condition_growth": reason},
    }


def _ratio(after: float | None, before: float | None) -> float | None:
    """Infinite from a finite number to an infinite one; not known where both are."""
    if before is None or after is None or math.isinf(before):
        return None
    if not before:
        return math.inf if after else None
    return after / before
