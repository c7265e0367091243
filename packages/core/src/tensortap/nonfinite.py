"""Where NaN and infinity are in a run, and where they begin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tensortap.records import TensorRecord
from tensortap.store import Run, Table
from tensortap.store.execution import in_order
from tensortap.tables import spelled_moment


@dataclass(frozen=True, slots=True)
class Nonfinite:
    """The first record with NaN or infinity, in execution order, and how many have some."""

    first: TensorRecord
    count: int

    def __str__(self) -> str:
        more = self.count - 1
        others = f"; {more:,} more record{'s have' if more > 1 else ' has'} some" if more else ""
        return (
            f"{self.first.name} (step {spelled_moment(self.first)}): {_counts(self.first)}{others}"
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON says it."""
        at, (nan, inf) = self.first.at, _numbers(self.first)
        return {
            "name": str(self.first.name),
            "step": at.step,
            "microbatch": at.microbatch,
            "call": at.call,
            "rank": at.rank,
            "nan": nan,
            "inf": inf,
            "records": self.count,
            "says": str(self),
        }


def nonfinite_table(
    run: Run, select: str = "*", *, step: int | None = None, rank: int | None = None
) -> Table:
    """The rows of records with NaN or infinity, in execution order, also over pipeline stages.

    A mask is infinite by nature and does not count. Raises `SelectionError` and `RunError`.
    """
    found = run.table(select, step=step, rank=rank, nonfinite=True)
    masks = np.array([name.endswith("mask") for name in found.names], dtype=bool)
    if masks.any():
        by_nature = masks[found.rows["name"]] & (found.rows["nan"] == 0)
        found = replace(found, rows=found.rows[~by_nature])
    return in_order(found, {number: run.info_of(number) for number in run.ranks})


def records_of(run: Run, table: Table) -> Iterator[TensorRecord]:
    """The records of a table's rows, without those whose lines are damaged."""
    for row in table.rows:
        record = run.record_at(int(row["rank"]), int(row["line"]))
        if record is not None:
            yield record


def first_nonfinite(run: Run, select: str = "*", *, step: int | None = None) -> Nonfinite | None:
    """Where NaN or infinity begins; `None` where all values are finite, or nothing tells."""
    found = nonfinite_table(run, select, step=step)
    first = next(records_of(run, found), None)
    return None if first is None else Nonfinite(first, len(found))


def _counts(record: TensorRecord) -> str:
    words = zip(_numbers(record), ("NaN", "Inf"), strict=True)
    return ", ".join(f"{count:,} {word}" for count, word in words if count)


def _numbers(record: TensorRecord) -> tuple[int, int]:
    stats = record.stats
    return (0, 0) if stats is None else (stats.nan, stats.posinf + stats.neginf)
