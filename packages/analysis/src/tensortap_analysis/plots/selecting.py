"""Which tensors of a run are drawn, and at which moment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tensortap.store import Run
from tensortap_analysis.captured import Captured, captured
from tensortap_analysis.plots.survey import Survey

_AT_ONCE = 500
"""Names in one selection."""


def at_moments(run: Run, moments: Sequence[tuple[str, int]]) -> dict[str, Captured]:
    """Of each (name, step) the moment to draw: with values if there are any, the first of those."""
    by_step: dict[int, list[str]] = {}
    for name, step in moments:
        by_step.setdefault(step, []).append(name)
    found: dict[str, Captured] = {}
    for step, names in by_step.items():
        for start in range(0, len(names), _AT_ONCE):
            exact = [f"re:{re.escape(name)}" for name in names[start : start + _AT_ONCE]]
            for tensor in captured(run, _joined(exact), step=step):
                known = found.get(tensor.name)
                if known is None or _rank(tensor) > _rank(known):
                    found[tensor.name] = tensor
    return {name: found[name] for name, _ in moments if name in found}


def _joined(exact: Iterable[str]) -> list[str]:
    """One pattern: matching every name against hundreds is slow."""
    return ["re:" + "|".join(f"(?:{pattern.removeprefix('re:')})" for pattern in exact)]


def _rank(tensor: Captured) -> tuple[bool, bool, bool]:
    at = tensor.at
    return tensor.whole, tensor.records[0].values == "sample", not (at.recompute or at.eval)


def latest(found: Survey) -> list[tuple[str, int]]:
    """Every name at the last step that has it."""
    last: dict[int, int] = {}
    for name, step in zip(found.name.tolist(), found.step.tolist(), strict=True):
        last[name] = max(step, last.get(name, 0))
    return [(found.names[name], found.steps[step]) for name, step in last.items()]
