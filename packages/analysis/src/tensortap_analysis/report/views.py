"""What the report shows of one run, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from tensortap.errors import RunError, SelectionError
from tensortap.nonfinite import first_nonfinite
from tensortap.records import RunInfo
from tensortap.store import Run
from tensortap_analysis.plots.survey import Survey, survey


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One run: who it is, its statistics (`None` where nothing selected is in it), its state.

    `began` says which selected tensor is the first with NaN or infinity, if there is one.
    """

    label: str
    path: str
    info: RunInfo
    ranks: tuple[int, ...]
    steps: tuple[int, ...]
    survey: Survey | None
    coverage: Mapping[str, Any]
    problems: tuple[str, ...]
    began: str | None = None

    @property
    def state(self) -> str:
        """`complete` is only what says so itself."""
        if self.problems:
            return "incomplete"
        return "complete" if self.coverage else "coverage not known"


def view(run: Run, path: str, label: str, select: str, step: int | None) -> View:
    """Read one run; only its index, no payload."""
    try:
        seen, first = survey(run, select, step), first_nonfinite(run, select, step=step)
    except SelectionError:
        seen, first = None, None
    began = None if first is None else str(first)
    return View(
        label, path, run.info, tuple(run.ranks), tuple(run.steps),
        seen, _coverage(run), tuple(run.problems), began,
    )  # fmt: skip


def _coverage(run: Run) -> Mapping[str, Any]:
    try:
        return run.coverage()
    except RunError:
        return {}  # the run's problems say so, in words


def labels(paths: Sequence[str]) -> list[str]:
    """The last words of each path, as many as tell it from the others."""
    parts = [PurePath(path).parts or (path,) for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        short = ["/".join(words[-depth:]) for words in parts]
        if len(set(short)) == len(set(paths)):
            return short
    return list(paths)
