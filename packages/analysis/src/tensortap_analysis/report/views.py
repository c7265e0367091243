"""What the report shows of one run, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt

from tensortap.errors import RunError, SelectionError
from tensortap.records import RunInfo
from tensortap.store import Run
from tensortap_analysis.plots.survey import Survey, survey
from tensortap_analysis.rounding import eps, largest


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One run: who it is, its statistics (`None` where nothing selected is in it), its state."""

    label: str
    path: str
    info: RunInfo
    ranks: tuple[int, ...]
    steps: tuple[int, ...]
    survey: Survey | None
    dtypes: Mapping[str, str]
    coverage: Mapping[str, Any]
    problems: tuple[str, ...]

    @property
    def activations(self) -> npt.NDArray[np.bool_]:
        """Rows of the survey without indices, and without masks that hold the largest number."""
        if self.survey is None:
            return np.zeros(0, dtype=bool)
        tops = {name: _top(self.dtypes.get(name, "")) for name in self.survey.names}
        limits = np.array([tops[name] for name in self.survey.names])
        return np.asarray(np.nan_to_num(self.survey.absmax) < limits[self.survey.name])


def view(run: Run, path: str, label: str, select: str, step: int | None) -> View:
    """Read one run; only its index, no payload."""
    try:
        seen = survey(run, select, step)
        table = run.table(select, step=step)
    except SelectionError:
        seen, dtypes = None, {}
    else:
        numbers, first = np.unique(table.rows["name"], return_index=True)
        words = table.column("dtype")
        dtypes = {table.names[n]: str(words[at]) for n, at in zip(numbers, first, strict=True)}
    return View(
        label, path, run.info, tuple(run.ranks), tuple(run.steps),
        seen, dtypes, _coverage(run), tuple(run.problems),
    )  # fmt: skip


def _top(dtype: str) -> float:
    """The magnitude that a value of no mask reaches; none does of what is not floating."""
    return largest(dtype) if eps(dtype) else -1.0


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
