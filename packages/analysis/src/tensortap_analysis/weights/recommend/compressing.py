"""Which matrices a product of two thin ones can replace, how small, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensortap.errors import ConfigError
from tensortap_analysis.weights.result import Facts, ScanResult
from tensortap_analysis.weights.saved import Metrics

ERROR = 0.1
"""The largest error ||W - W_r|| / ||W|| that is suggested by default: 99 % of the energy kept."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """Replacing a matrix by two of rank `rank`: the error that leaves, and the values it saves.

    `errors` are those of other ranks, for choosing otherwise. Of a stack of experts they are the
    worst expert's.
    """

    layer: str
    rank: int
    full_rank: int
    error: float
    values: int
    saved: int
    errors: Mapping[int, float]

    @property
    def share(self) -> float:
        """The share of the layer's values that is saved."""
        return self.saved / self.values

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        errors = {str(rank): error for rank, error in self.errors.items()}
        return {**asdict(self), "share": self.share, "errors": errors}


def compression_plan(result: ScanResult, *, error: float = ERROR) -> list[LowRank]:
    """Layers that a low rank with at most `error` makes smaller, the largest saving first.

    Ranks are powers of two, and those that keep 90 % and 99 % of the energy. Weights alone are
    judged: inputs that never point where the error lies make it smaller in practice. Raises
    `ConfigError` for a scan without the method "spectral".
    """
    if "spectral" not in result.methods:
        raise ConfigError("The scan has no spectra; scan with --methods spectral, or all.")
    if not 0 < error < 1:
        raise ConfigError(f"An error is a share of the norm, between 0 and 1; {error:g} is none.")
    found = _low_ranks(result, error)
    return sorted(found, key=lambda plan: (-plan.saved, plan.layer))


def _low_ranks(result: ScanResult, error: float) -> Iterator[LowRank]:
    for layer, stats in result.items():
        metrics, facts = stats.get("spectral", {}), result.facts[layer]
        errors = _errors(metrics)
        enough = [rank for rank, left in errors.items() if left <= error]
        if not enough:
            continue
        rank = min(enough)
        rows, columns = _sides(facts)
        each = rows * columns - rank * (rows + columns)
        count = facts.numel // (rows * columns)
        if each > 0:
            yield LowRank(
                layer, rank, metrics["full_rank"], errors[rank], facts.numel, each * count, errors
            )


def _errors(metrics: Metrics) -> dict[int, float]:
    """The error of each rank that is known, ascending; energy ranks leave at most theirs.

    Of a stack the energy rank of the expert that needs most is one that leaves no more in any.
    """
    found = {int(rank): left for rank, left in (metrics.get("rank_errors") or {}).items()}
    experts = metrics.get("experts", {})
    for metric, left in (("energy_rank_99", 0.1), ("energy_rank_90", 0.1**0.5)):
        rank = experts.get(metric, {}).get("max", metrics.get(metric))
        if rank:
            found.setdefault(rank, left)
    return dict(sorted(found.items()))


def _sides(facts: Facts) -> tuple[int, int]:
    """The matrix that is measured: of a stack one of them, of a convolution [out, in x kernel]."""
    if facts.kind == "experts":
        return facts.shape[-2], facts.shape[-1]
    rows = facts.shape[0]
    return rows, facts.numel // rows
