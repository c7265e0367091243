"""Where in a matrix something is, in words: the first few rows, columns or values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensortap_analysis.weights.health.issue import Layer

ONE_VALUE = "Damaged on its way, or one step that went too far? Compare with another copy."
_NAMED = 4
"""So many places are named in a sentence; the saved scan lists more."""


def where(layer: Layer, method: str, metric: str, count: int) -> str:
    """`" (3, 17, 20, 21 and 60 more)"` of `count`; of a stack each with its matrix.

    Empty for a scan that has not kept the places.
    """
    places = layer.get(method, f"{metric}_at") or []
    named = [_place(layer, metric, place) for place in places[:_NAMED]]
    if not named:
        return ""
    more = f" and {count - len(named):,} more" if count > len(named) else ""
    return f" ({', '.join(named)}{more})"


def _place(layer: Layer, metric: str, place: Any) -> str:
    numbers: Sequence[int] = place if isinstance(place, list) else [place]
    stack = layer.facts.kind == "experts"
    of = f" of expert {numbers[0]:,}" if stack else ""
    inside = numbers[1:] if stack else numbers
    if metric == "duplicated_rows":
        return f"{inside[0]:,} as {inside[1]:,}{of}"
    return f"{inside[0]:,}{of}"


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest magnitude: where, how large, and `times` the root mean square of the others."""

    place: str
    size: float
    times: float

    def __str__(self) -> str:
        return (
            f"{self.place} is {self.size:.3g} in magnitude, {self.times:.3g} times the root mean "
            "square of the others"
        )


def largest(layer: Layer) -> Largest | None:
    """Of a layer's values; `None` where no place or no norm is known."""
    places, l2 = layer.get("norms", "largest_at"), layer.get("norms", "l2")
    if not places or not l2 or math.isinf(l2):
        return None
    *indices, size = places[0]
    of = f" of expert {indices.pop(0):,}" if layer.facts.kind == "experts" else ""
    if layer.facts.kind == "vector":
        indices = indices[1:]
    if layer.facts.stored == "in out":
        indices.reverse()  # As a user finds it in the tensor that is stored.
    # In units of the norm: squares of what float64 can hold may be none.
    share = max(0.0, 1 - (size / l2) ** 2) / max(layer.facts.numel - 1, 1)
    times = size / l2 / math.sqrt(share) if share else math.inf
    return Largest(f"Value [{', '.join(f'{one:,}' for one in indices)}]{of}", float(size), times)
