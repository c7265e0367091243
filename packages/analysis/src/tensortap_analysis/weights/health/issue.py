"""`Issue`: one thing that is wrong with one layer; and `Layer`, what rules look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tensortap.errors import ConfigError, nearest
from tensortap_analysis.weights.result import Facts, ScanResult
from tensortap_analysis.weights.roles import role_of
from tensortap_analysis.weights.saved import Metrics

Severity = Literal["critical", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""The worst first."""
Limits = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Issue:
    """`cause` says what was found and what it does, `remedy` what to do about it.

    `value` is what was measured, `limit` what it was held against, `excess` how far beyond it is
    (1 at the limit, larger is worse).
    """

    layer: str
    rule: str
    severity: Severity
    cause: str
    remedy: str
    value: float | None = None
    limit: float | None = None
    excess: float = 1.0

    def __str__(self) -> str:
        return f"{self.layer}: {self.cause} {self.remedy}"


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight of a scan, as rules look at it."""

    name: str
    facts: Facts
    stats: Mapping[str, Metrics]
    vector: bool = False

    def get(self, method: str, metric: str) -> Any:
        """A metric; `None` where it was not measured or cannot be known."""
        return self.stats.get(method, {}).get(metric)

    def unresolved(self, method: str, metric: str) -> str | None:
        """Why a metric is beyond what the stored dtype can tell."""
        found: str | None = self.stats.get(method, {}).get("unresolved", {}).get(metric)
        return found

    @property
    def zero(self) -> bool:
        """Is every value 0? Other rules then have nothing to add."""
        return bool(self.get("norms", "max") == 0) and not self.get("norms", "nan")

    @property
    def count(self) -> int:
        """How many matrices it is a stack of."""
        return self.facts.shape[0] if self.facts.kind == "experts" else 1

    @property
    def inputs(self) -> int:
        """How many values make one output: the columns of the matrix that is measured."""
        shape = self.facts.shape[1:] if self.facts.kind == "experts" else self.facts.shape
        return shape[0] if self.facts.stored == "in out" else math.prod(shape[1:])

    @property
    def outputs(self) -> int:
        """How many values it makes: the rows of the matrix that is measured."""
        return self.facts.numel // max(self.count * self.inputs, 1)

    @property
    def role(self) -> str:
        """What layers have in common."""
        return role_of(self.name)


Rule = Callable[[Sequence[Layer], Limits], Iterable[Issue]]
"""Finds the issues of one kind in all layers of a scan."""


def limits_with(preset: str, limits: Limits, thresholds: Limits) -> Limits:
    """The limits of a preset with some replaced; raises `ConfigError` for what is none."""
    for key, value in thresholds.items():
        if key not in limits:
            known = nearest(key, limits)
            raise ConfigError(f"The preset {preset} has no threshold {key!r}; closest: {known}.")
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"A threshold is a number above 0, and {key}={value} is none.")
    return {**limits, **thresholds}


def layers_of(result: ScanResult) -> list[Layer]:
    """Matrices and vectors, in the order of the checkpoint."""
    both = [(name, stats, False) for name, stats in result.layers.items()]
    both += [(name, stats, True) for name, stats in result.vectors.items()]
    place = {name: index for index, name in enumerate(result.facts)}
    both.sort(key=lambda row: place[row[0]])
    return [Layer(name, result.facts[name], stats, vector) for name, stats, vector in both]


def peers_of(result: ScanResult) -> list[Layer]:
    """What a scan of a selection measured beside it, to hold it against."""
    return [
        Layer(name, peer.facts, peer.stats, peer.facts.kind in ("vector", "table"))
        for name, peer in result.peers.items()
    ]


def over(value: float, limit: float) -> float:
    """How far a value that should be small is beyond its limit."""
    return value / limit if limit else math.inf
