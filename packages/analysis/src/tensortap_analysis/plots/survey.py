"""The statistics of a run at a glance: a row for each tensor and step, from the index alone."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tensortap.store import Run, Table
from tensortap.store.lookup import dp_rank_of
from tensortap.store.rows import STATISTICS
from tensortap_analysis.captured.moments import place_of
from tensortap_analysis.judging.rounding import eps, lowest_of_mask
from tensortap_analysis.plots.style import Floats

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """One row for each name and step; microbatches, calls and ranks are merged into it.

    Copies that several ranks hold count once; so do the terms of a sum, whose sum nobody knows.
    `name` and `step` are positions in `names` and `steps`, `dtypes` belong to the names.
    Statistics are over finite values; a row without any has NaN there.
    """

    names: tuple[str, ...]
    steps: tuple[int, ...]
    dtypes: tuple[str, ...]
    name: Numbers
    step: Numbers
    count: Numbers
    nonfinite: Numbers
    nan: Numbers
    zero: Numbers
    min: Floats
    max: Floats
    absmax: Floats
    mean: Floats
    std: Floats
    l2: Floats

    @property
    def outliers(self) -> Floats:
        """How many standard deviations the farthest value is from the mean; NaN for a constant.

        absmax / std would call a parameter that is 1 almost everywhere the worst of all.
        """
        farthest = np.fmax(self.max - self.mean, self.mean - self.min)
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Floats = np.where(self.std > 0, farthest / self.std, np.nan)
        return found

    @property
    def rms(self) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Floats = self.l2 / np.sqrt(self.count - self.nonfinite)
        return found

    @property
    def floating(self) -> Survey:
        """Without integers, truth values and masks: they have no distribution to look at."""
        kept = self._numbers()
        columns = {
            column.name: getattr(self, column.name)[kept]
            for column in fields(self)
            if column.name not in ("names", "steps", "dtypes")
        }
        return replace(self, **columns)

    def _numbers(self) -> npt.NDArray[np.bool_]:
        """Rows of floating dtypes that are no masks: those hold the lowest number there is."""
        lowest = np.array([lowest_of_mask(dtype) for dtype in self.dtypes])
        named = np.array([name.endswith("mask") for name in self.names], dtype=bool)
        whole = np.array([eps(dtype) == 0 for dtype in self.dtypes], dtype=bool)
        masks = named[self.name] | (np.nan_to_num(self.min) <= lowest[self.name])
        return np.asarray(~(whole[self.name] | masks))

    @property
    def present(self) -> tuple[str, ...]:
        """Names that have a row."""
        return tuple(self.names[at] for at in np.unique(self.name))

    def by_step(self, values: Floats) -> Floats:
        """[name, step]; NaN where there is none."""
        grid = np.full((len(self.names), len(self.steps)), np.nan)
        grid[self.name, self.step] = values
        return grid


def survey(run: Run, select: str | Iterable[str] = "*", step: int | None = None) -> Survey:
    """Merge the statistics of the records; recomputed forwards and evaluations only if all are."""
    table = run.table(select, step=step, recompute=False, eval=False)
    if not len(table):
        table = run.table(select, step=step)
    rows = _once(run, table)
    steps, at = np.unique(rows["step"], return_inverse=True)
    keys, group = np.unique(
        rows["name"].astype(np.int64) * max(len(steps), 1) + at, return_inverse=True
    )
    name, step_at = np.divmod(keys, max(len(steps), 1))
    return Survey(
        names=table.names,
        steps=tuple(int(number) for number in steps),
        dtypes=_dtypes(rows, len(table.names)),
        name=name,
        step=step_at,
        **_merged(rows, group, len(keys)),
    )


def _once(run: Run, table: Table) -> npt.NDArray[np.void]:
    """The rows with statistics, without those of ranks that hold copies of what others hold.

    Placements are read from one record of each name and rank: they do not change in a run.
    """
    rows: npt.NDArray[np.void] = table.rows[table.rows["flags"] & STATISTICS != 0]
    if len(run.ranks) == 1:
        return rows
    replicas = {rank: dp_rank_of(run.info_of(rank)) for rank in run.ranks}
    _, first = np.unique(rows[["name", "rank"]], return_index=True)
    kept: dict[tuple[int, Hashable], int] = {}
    for row in rows[np.sort(first)]:
        name, rank = int(row["name"]), int(row["rank"])
        record = run.record_at(rank, int(row["line"]))
        if record is not None:
            apart = replicas[rank] if record.name.phase in ("forward", "backward") else None
            kept.setdefault((name, (apart, place_of(record))), rank)
    pairs = {(name, rank) for (name, _), rank in kept.items()}
    listed = zip(rows["name"].tolist(), rows["rank"].tolist(), strict=True)
    kept_rows: npt.NDArray[np.void] = rows[[pair in pairs for pair in listed]]
    return kept_rows


def _dtypes(rows: npt.NDArray[np.void], names: int) -> tuple[str, ...]:
    found = np.zeros(names, dtype=rows["dtype"].dtype)
    found[rows["name"]] = rows["dtype"]
    return tuple(found.astype(str).tolist())


def _merged(rows: npt.NDArray[np.void], group: Numbers, groups: int) -> dict[str, Any]:
    """Counts added up, extremes, and moments about the common mean."""

    def summed(values: npt.NDArray[np.float64 | np.int64]) -> Floats:
        totals: Floats = np.bincount(group, weights=values, minlength=groups).astype(np.float64)
        return totals

    counts = {key: summed(rows[key]) for key in ("count", "nan", "posinf", "neginf", "zero")}
    nonfinite = counts["nan"] + counts["posinf"] + counts["neginf"]
    finite = rows["count"] - rows["nan"] - rows["posinf"] - rows["neginf"]

    def length(values: Floats, weights: Floats) -> Floats:
        """Root of the weighted sum of squares, which itself may be beyond what float64 holds."""
        size = _extreme(np.abs(values), group, groups, np.fmax)
        scaled = np.divide(values, size[group], out=np.zeros(len(values)), where=size[group] > 0)
        return size * np.sqrt(summed(weights * np.square(scaled)))

    with np.errstate(divide="ignore", invalid="ignore"):
        whole = counts["count"] - nonfinite
        share = finite / whole[group]
        means = np.nan_to_num(rows["mean"])
        mean = summed(share * means)
        spread = np.hypot(np.nan_to_num(rows["std"]), means - mean[group])
        std = length(spread, share)
        l2 = length(np.nan_to_num(rows["l2"]), np.ones(len(rows)))
    nothing = whole == 0
    mean[nothing] = std[nothing] = l2[nothing] = np.nan
    found = {key: counts[key].astype(np.int64) for key in ("count", "nan", "zero")}
    ends = {
        key: _extreme(rows[key], group, groups, ufunc)
        for key, ufunc in (("min", np.fmin), ("max", np.fmax), ("absmax", np.fmax))
    }
    return found | ends | {
        "nonfinite": nonfinite.astype(np.int64), "mean": mean, "std": std, "l2": l2,
    }  # fmt: skip


def _extreme(values: Floats, group: Numbers, groups: int, ufunc: np.ufunc) -> Floats:
    found = np.full(groups, np.nan)
    ufunc.at(found, group, values)
    return found


def worst(found: Survey, error: Mapping[str, float] | None = None) -> list[tuple[str, int]]:
    """(name, step) of the tensors that have finite values, what to look at first in front.

    First those with NaN or Inf, in the order in which they came about: where it began says more
    than where most of it is. Then by `error` where there is one, else by `outliers`, each at its
    worst step. A tensor that passes under several names (an output that is the next input) is
    named once.
    """
    outliers = np.nan_to_num(found.outliers, nan=0.0)
    strange = found.nonfinite > 0
    at_worst: dict[int, int] = {}
    for row in np.lexsort((found.step, np.where(strange, 0.0, -outliers), ~strange)):
        if found.count[row] > found.nonfinite[row]:
            at_worst.setdefault(int(found.name[row]), int(row))

    def place(row: int) -> tuple[float, ...]:
        if strange[row]:
            return 0, found.step[row], found.name[row]
        name = found.names[int(found.name[row])]
        return 1, -(outliers[row] if error is None else error.get(name, -1.0))

    chosen: dict[tuple[float, ...], tuple[str, int]] = {}
    for row in sorted(at_worst.values(), key=place):
        alike = tuple(float(column[row]) for column in (found.count, found.absmax, found.l2))
        moment = found.names[int(found.name[row])], found.steps[int(found.step[row])]
        chosen.setdefault((*alike, moment[1]), moment)
    return list(chosen.values())


def nothing_finite(found: Survey) -> list[str]:
    """Names that have values, of which none is finite at some step."""
    rows = np.flatnonzero((found.nonfinite == found.count) & (found.count > 0))
    return [found.names[at] for at in np.unique(found.name[rows])]
