"""Which tensors of a run are drawn, and at which moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensortap.selection import Selection
from tensortap.store import Run
from tensortap_analysis.captured.moments import DETAIL, Captured, moments_of, selected_parts
from tensortap_analysis.plots.survey import Survey

At = list[tuple[str, int]]
"""Names, and the step at which each is drawn."""


def at_moments(run: Run, moments: Sequence[tuple[str, int]]) -> dict[str, Captured]:
    """Of each (name, step) the moment to draw: with values if there are any, the first of those.

    A name may be that of a part of a fused tensor.
    """
    sources = run.part_sources()
    for name in run.names():
        sources.pop(name, None)
    by_step: dict[int, dict[str, list[str]]] = {}
    for name, step in moments:
        by_step.setdefault(step, {}).setdefault(sources.get(name, name), []).append(name)
    found: dict[str, Captured] = {}
    for step, asked in by_step.items():
        for tensor in moments_of(run, asked, step).values():
            for name in asked[tensor.moment.name]:
                known = found.get(name)
                if known is None or _rank(tensor) > _rank(known):
                    found[name] = tensor.as_part(name)
    return {name: found[name] for name, _ in moments if name in found}


def _rank(tensor: Captured) -> tuple[int, bool]:
    at = tensor.moment
    return DETAIL.index(tensor.values), not (at.recompute or at.eval)


def latest(found: Survey) -> At:
    """Every name at the last step that has it."""
    last: dict[int, int] = {}
    for name, step in zip(found.name.tolist(), found.step.tolist(), strict=True):
        last[name] = max(step, last.get(name, 0))
    return [(found.names[name], found.steps[step]) for name, step in last.items()]


def selected(run: Run, found: Survey, select: str | Iterable[str]) -> At:
    """What is selected, at its last step: a fused tensor, or parts of it where it is not itself.

    Raises `SelectionError` when it is nothing.
    """
    selection = Selection.parse(select)
    parts = selected_parts(run, selection)
    chosen = [
        (wanted, step)
        for name, step in latest(found)
        for wanted in ([name] if selection.matches(name) else parts.get(name, []))
    ]
    if not chosen:
        raise selection.nothing_in([*run.names(), *run.part_names()], str(run.path))
    return chosen
