"""Coverage: what was expected against what was captured, with a reason for every difference.

A *gap* is something that should be in the run and is not; a *note* explains an absence that is
as it should be. Only gaps make a run incomplete.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from tensortap.integration import Site


class Coverage:
    """Counts per name; filled from hooks and the transfer thread, read at detach."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._captured: Counter[str] = Counter()
        self._gaps: Counter[tuple[str, str]] = Counter()
        self._notes: Counter[tuple[str, str]] = Counter()

    def captured(self, name: str) -> None:
        """One record of `name` was handed to the sink."""
        self._captured[name] += 1

    def gap(self, name: str, reason: str) -> None:
        """A tensor that should have been captured was not."""
        with self._lock:
            self._gaps[name, reason] += 1

    def note(self, name: str, reason: str) -> None:
        """A tensor is rightly absent; said once per name and reason."""
        with self._lock:
            self._notes[name, reason] = 1

    @property
    def total(self) -> int:
        """Records handed to the sink."""
        return self._captured.total()

    def places(self) -> set[tuple[str, str]]:
        """Every (module, phase) of which something was captured."""
        return {(name.split("/")[0], name.split("/")[1]) for name in self._captured}

    def explains(self, name: str) -> bool:
        """Has anybody said already why nothing of this name was captured?"""
        return any(name == said for said, _ in (*self._gaps, *self._notes))

    def report(self, *, steps: int) -> Mapping[str, Any]:
        """As written to `coverage.json`."""
        return coverage_report(
            complete=not self._gaps,
            steps=steps,
            records=self.total,
            captured=self._captured,
            gaps=self._gaps,
            notes=self._notes,
        )


def coverage_report(
    *,
    complete: bool,
    steps: int,
    records: int,
    captured: Counter[str],
    gaps: Counter[tuple[str, str]],
    notes: Counter[tuple[str, str]],
) -> dict[str, Any]:
    """A report as plain JSON; gaps and notes are counted by name and reason."""
    return {
        "complete": complete,
        "steps": steps,
        "records": records,
        "captured": dict(sorted(captured.items())),
        "gaps": _rows(gaps),
        "notes": _rows(notes),
    }


def explain_absences(coverage: Coverage, sites: Iterable[Site], *, explicit: bool) -> None:
    """At detach: every selected site of which nothing was captured gets its reason.

    `explicit`: the user chose the selection, so a leaf that never ran is a gap, not a note.
    """
    places = coverage.places()
    trained = any(phase == "backward" for _, phase in places)
    for site in sites:
        forward, backward = ((site.name, phase) in places for phase in ("forward", "backward"))
        if site.silent is not None:
            coverage.note(site.name, site.silent)
        elif forward or backward:
            if trained and not backward:
                coverage.note(site.name, "no gradient reached it")
        elif coverage.explains(site.name):
            continue
        elif site.kind == "module" and any(True for _ in site.module.children()):
            coverage.note(site.name, "a container without a call of its own")
        elif explicit:
            coverage.gap(site.name, "selected, but never called")
        else:
            coverage.note(site.name, "never called")


def _rows(counts: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "reason": reason, "count": count}
        for (name, reason), count in sorted(counts.items())
    ]
