"""The spectrum of a matrix and what it says: conditioning, ranks, norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap_analysis.weights.measures.facts import Facts, nothing, overflown
from tensortap_analysis.weights.measures.gram import Spectrum, spectrum
from tensortap_analysis.weights.measures.resolution import resolution
from tensortap_analysis.weights.options import Options

Doubles = npt.NDArray[np.float64]
_METRICS = (
    "s_max", "s_min", "spectral_norm", "condition_number", "condition_number_at_least",
    "condition_number_alive", "resolution", "stable_rank", "total_rank", "rank_tolerance",
    "effective_rank", "energy_rank_90", "energy_rank_99", "rank_errors",
)  # fmt: skip


def spectral(facts: Facts, options: Options) -> dict[str, Any]:
    """Metrics of the singular values; all of them are in `spectrum` with `full_spectrum`.

    `resolution` is how far the stored dtype's rounding moves singular values. A condition number
    s_max / s_min is resolved where s_min is larger than that; it is at least
    `condition_number_at_least` either way; `condition_number_alive` leaves out vectors of zeros,
    which make any matrix singular. `total_rank` counts singular values above
    `rank_tolerance`, which is the resolution, and of matrices that were computed in 32 or 16 bits
    at least numpy's default tolerance for float32. `stable_rank`: ||W||_F^2 / s_max^2.
    `effective_rank`: exp(entropy) of the singular values over their sum (Roy and Vetterli, The
    effective rank, EUSIPCO 2007). `energy_rank_90`: the fewest singular values whose squares hold
    90 % of their sum. `rank_errors`: the error ||W - W_r||_F / ||W||_F of the best approximation
    of rank r (Eckart and Young), for powers of two. `spectral_norm` is s_max.
    """
    full = {"full_rank": min(facts.matrix.shape)}
    if facts.unusable is not None:
        return nothing(_METRICS, facts.unusable) | full
    if facts.all_zero is not None:
        return _of_zeros(facts.all_zero) | full | _listed(np.zeros(full["full_rank"]), options)
    found = spectrum(facts.matrix, facts.unit)
    reach = resolution(facts, found)
    tolerance = max(reach, _of_arithmetic(facts, found))
    with np.errstate(over="ignore"):
        values = found.values / facts.unit
    return (
        _conditioning(found, reach, facts)
        | _ranks(found.values, tolerance)
        | {"rank_tolerance": tolerance / facts.unit}
        | full
        | _listed(values, options)
    )


def _conditioning(found: Spectrum, reach: float, facts: Facts) -> dict[str, Any]:
    largest, smallest = float(found.values[0]), float(found.values[-1])
    alive = float(found.values[len(found.values) - found.dead - 1])
    unresolved = {}
    if alive < reach:
        unresolved["condition_number_alive"] = _resolves(largest, reach, facts)
    # A vector of zeros was not rounded to them: what it makes singular is known to be.
    if smallest < reach and not found.dead:
        dtype = str(facts.dtype).removeprefix("torch.")
        unresolved |= {
            "condition_number": _resolves(largest, reach, facts),
            "s_min": f"stored in {dtype}, whose rounding alone moves singular values by "
            f"{reach / facts.unit:.3g}",
        }
    ends = {
        "s_max": largest / facts.unit,
        "s_min": smallest / facts.unit,
        "spectral_norm": largest / facts.unit,
    }
    return {
        **ends,
        "condition_number": largest / smallest if smallest else math.inf,
        "condition_number_at_least": _at_least(found, reach),
        "condition_number_alive": largest / alive if alive else math.inf,
        "resolution": reach / facts.unit,
        "unresolved": overflown(ends) | unresolved,
    }


def _resolves(largest: float, reach: float, facts: Facts) -> str:
    dtype = str(facts.dtype).removeprefix("torch.")
    return f"stored in {dtype}, which resolves condition numbers up to {largest / reach:.3g}"


def _at_least(found: Spectrum, reach: float) -> float:
    """The condition number where rounding made the matrix as ill-conditioned as it can."""
    if found.dead:
        return math.inf
    largest = math.sqrt(max(found.values[0] ** 2 - found.error, 0.0)) - reach
    return max(largest / (math.sqrt(found.values[-1] ** 2 + found.error) + reach), 1.0)


def _of_arithmetic(facts: Facts, found: Spectrum) -> float:
    """What products of thin matrices leave where there is nothing: they are summed in float32."""
    eps = torch.finfo(torch.float64 if facts.dtype is torch.float64 else torch.float32).eps
    return max(facts.matrix.shape) * eps * float(found.values[0])


def _ranks(values: Doubles, tolerance: float) -> dict[str, Any]:
    shares = values / values.sum()
    present = shares[shares > 0]
    squares = np.square(values / values[0])
    energy = np.cumsum(squares) / squares.sum()
    # From the smallest up: the tail of a low rank is not lost in the sum of all.
    left = np.sqrt(np.cumsum(squares[::-1])[::-1] / squares.sum())
    ranks = [1 << power for power in range(len(values).bit_length()) if 1 << power < len(values)]
    return {
        "stable_rank": float(squares.sum()),
        "total_rank": int((values > tolerance).sum()),
        "effective_rank": math.exp(-float((present * np.log(present)).sum())),
        "energy_rank_90": int(np.searchsorted(energy, 0.90)) + 1,
        "energy_rank_99": int(np.searchsorted(energy, 0.99)) + 1,
        "rank_errors": {str(rank): float(left[rank]) for rank in ranks},
    }


def _of_zeros(reason: str) -> dict[str, Any]:
    """There is no direction: no norm, no rank, and no ratio of norms."""
    lengths = dict.fromkeys(
        ("s_max", "s_min", "spectral_norm", "resolution", "rank_tolerance"), 0.0
    )
    counts = dict.fromkeys(("total_rank", "energy_rank_90", "energy_rank_99"), 0)
    ratios = (
        "condition_number", "condition_number_at_least", "condition_number_alive",
        "stable_rank", "effective_rank", "rank_errors",
    )  # fmt: skip
    return lengths | counts | nothing(ratios, reason)


def _listed(values: Doubles, options: Options) -> dict[str, Any]:
    return {"spectrum": values.tolist()} if options.full_spectrum else {}
