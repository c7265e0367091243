"""Coverage reports of all ranks as one, in the words of `tensortap.coverage`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensortap.coverage import coverage_report
from tensortap.errors import RunCorrupt
from tensortap.store.fields import array, flag, integer, mapping, text, whole

Counts = Counter[tuple[str, str]]


def merge_coverage(reports: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Sums of counts, steps of the longest rank; complete when every rank is. Empty: nothing.

    Raises `RunCorrupt` naming the file that does not have the form of a report.
    """
    if not reports:
        return {}
    captured: Counter[str] = Counter()
    gaps, notes = Counts(), Counts()
    complete, steps, records = True, 0, 0
    for path, report in reports.items():
        try:
            complete &= flag(report, "complete")
            steps = max(steps, integer(report, "steps", 0))
            records += integer(report, "records", 0)
            captured.update(_captured(report))
            gaps.update(_rows(report, "gaps"))
            notes.update(_rows(report, "notes"))
        except ValueError as failure:
            raise RunCorrupt(f"{path}: {failure}.") from failure
    return coverage_report(
        complete=complete,
        steps=steps,
        records=records,
        captured=captured,
        gaps=gaps,
        notes=notes,
    )


def _captured(report: Mapping[str, Any]) -> dict[str, int]:
    return {name: whole(count, name) for name, count in mapping(report, "captured").items()}


def _rows(report: Mapping[str, Any], key: str) -> dict[tuple[str, str], int]:
    rows = array(report, key)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key} must list objects")
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        what = text(row, "name"), text(row, "reason")
        found[what] = found.get(what, 0) + integer(row, "count", 1)
    return found
