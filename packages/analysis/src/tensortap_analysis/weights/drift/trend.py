"""Weights over checkpoints, as pictures show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tensortap_analysis.weights.drift.tracking import Comparison, Drift

_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_SINGULAR = 2.0**53
Line = list[tuple[int, float]]
"""Checkpoints by their number, and a value."""


def checkpoint_names(steps: Sequence[Drift]) -> list[str]:
    """The ends of their paths that tell them apart, without what says the kind of a file."""
    paths = [_bare(Path(one)) for one in (steps[0].before, *(step.after for step in steps))]
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def _bare(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in _FILES else path


def layers_of(steps: Sequence[Drift]) -> list[str]:
    """Every weight that is compared in any step."""
    return list(dict.fromkeys(layer for step in steps for layer in step.layers))


def most_changed(steps: Sequence[Drift], layers: Sequence[str]) -> list[str]:
    """The layers that became no numbers first, then those that changed most in any one step.

    From zero is infinitely far, however little it is: such a step does not count.
    """

    def farthest(layer: str) -> float:
        rows = rows_of(steps, layer)
        if any(row.get("not_finite_after") for _, row in rows):
            return math.inf
        found = [row.get("relative_change") for _, row in rows]
        return max((x for x in found if x is not None and x < math.inf), default=0.0)

    return sorted(layers, key=lambda layer: -farthest(layer))


def norms(steps: Sequence[Drift], layer: str) -> Line:
    """Norms over the first that is not 0."""
    points = both_sides(steps, layer, "l2_before", "l2_after")
    first = next((value for _, value in points if value), None)
    return [] if first is None else [(at, value / first) for at, value in points]


def changes(steps: Sequence[Drift], layer: str) -> Line:
    """The relative change of each step, at the checkpoint it leads to."""
    found = [(at + 1, row.get("relative_change")) for at, row in rows_of(steps, layer)]
    return [(at, value) for at, value in found if value is not None]


def conditions(steps: Sequence[Drift], layer: str) -> Line:
    """Condition numbers; those beyond what float64 can tell are drawn where that ends."""
    found = both_sides(steps, layer, "condition_before", "condition_after")
    return [(at, min(value, _SINGULAR)) for at, value in found]


def rows_of(steps: Sequence[Drift], layer: str) -> list[tuple[int, Comparison]]:
    """By the number of the step; nothing in a row where it was not compared."""
    return [(at, step.layers.get(layer, {})) for at, step in enumerate(steps)]


def both_sides(steps: Sequence[Drift], layer: str, before: str, after: str) -> Line:
    """A metric of each checkpoint, of which most end one step and begin the next."""
    found: dict[int, float | None] = {}
    for at, row in rows_of(steps, layer):
        found.setdefault(at, row.get(before))
        found[at + 1] = row.get(after)
    return [(at, value) for at, value in found.items() if value is not None]
