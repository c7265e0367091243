"""`Table`: coordinates and statistics of many records at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tensortap.store.index import Index
from tensortap.store.rows import ROW

_INTERNAL = ("name", "offset", "length", "check")
_COLUMNS = np.dtype(
    [("name", "<u4"), ("rank", "<u4")]
    + [(field, ROW[field]) for field in ROW.names or () if field not in _INTERNAL]
)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Rows in execution order; `names[row["name"]]` is a row's name.

    Columns: name, rank, flags (bits as in `tensortap.store.rows`), step, microbatch, call,
    dtype, count, nan, posinf, neginf, zero, min, max, absmax, mean, std, rms, l1, l2, seq and
    line (for `Run.record_at`). A statistic that does not exist is NaN; records without statistics
    lack the bit `STATISTICS`.
    """

    rows: npt.NDArray[np.void]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, field: str) -> npt.NDArray[Any]:
        """One column; for `name` the names themselves, for `dtype` words."""
        if field == "name":
            return np.asarray(np.array(self.names, dtype=object)[self.rows["name"]])
        values = np.asarray(self.rows[field])
        return values.astype(str) if field == "dtype" else values


def make_table(
    indexes: Mapping[int, Index],
    ranks: npt.NDArray[np.int64],
    positions: npt.NDArray[np.intp],
) -> Table:
    """The table of these rows; `ranks` and `positions` name them one by one, in order."""
    numbers: dict[str, int] = {}
    rows = np.empty(len(positions), dtype=_COLUMNS)
    for rank, index in indexes.items():
        mine = np.flatnonzero(ranks == rank)
        if len(mine):
            _fill(rows, mine, index, positions[mine], numbers)
            rows["rank"][mine] = rank
    return Table(rows, tuple(numbers))


def _fill(
    rows: npt.NDArray[np.void],
    mine: npt.NDArray[np.intp],
    index: Index,
    positions: npt.NDArray[np.intp],
    numbers: dict[str, int],
) -> None:
    """Copy the rows of one rank, whose name ids become numbers of the whole table."""
    source = index.rows[positions]
    for field in _COLUMNS.names or ():
        if field not in ("name", "rank"):
            rows[field][mine] = source[field]
    globally = np.zeros(len(index.names), dtype=np.uint32)
    for number in np.unique(source["name"]):
        name = str(index.names[number][0])
        globally[number] = numbers.setdefault(name, len(numbers))
    rows["name"][mine] = globally[source["name"]]
