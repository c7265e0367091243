"""The ranks of a run read as one: names, steps, parts, and records in execution order."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tensortap.errors import RunError
from tensortap.records import Part, TensorRecord
from tensortap.selection import Selection
from tensortap.store.index import Index
from tensortap.store.layout import require_run
from tensortap.store.query import Query
from tensortap.store.rank_reader import RankReader, StaleIndex
from tensortap.store.rows import BAD, PARTS, Rows

_T = TypeVar("_T")
Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.intp]]
"""Records before their lines are parsed: ranks, and positions in those ranks' indexes."""


@dataclass(frozen=True, slots=True)
class FusedPart:
    """What a part's name stands for: its module, and the fused tensor that it is cut from."""

    module: str
    fused: str


class Ranks:
    """The readers of a run's ranks, asked together; an index that lies is rebuilt and asked again.

    What the parts of fused tensors are called is learnt from one line a fused name, once.
    """

    def __init__(self, path: Path) -> None:
        """Open the rank directories of the run at `path`; raises `RunError` when it is none."""
        directories = require_run(path)
        self.path = path
        self.readers = {rank: RankReader(where, rank) for rank, where in directories.items()}
        self._asking = threading.RLock()
        self._parts: dict[str, FusedPart] = {}
        self._parts_of: list[Index] = []

    def reader(self, rank: int) -> RankReader:
        """The reader of one rank; raises `RunError` when there is none."""
        if rank not in self.readers:
            raise RunError(f"{self.path} has no rank {rank}; it has {list(self.readers)}.")
        return self.readers[rank]

    def chosen(self, rank: int | None) -> dict[int, RankReader]:
        """One rank alone, or all of them."""
        return self.readers if rank is None else {rank: self.reader(rank)}

    def names(self) -> list[str]:
        """Names of the captured tensors, sorted, each once."""
        return sorted(set().union(*map(_names_in, self.readers.values())))

    def steps(self) -> list[int]:
        """Steps of which there are records, sorted."""
        found = [np.unique(_good_rows(reader)["step"]) for reader in self.readers.values()]
        return sorted({int(step) for steps in found for step in steps})

    def parts(self) -> dict[str, FusedPart]:
        """Names that parts of fused tensors have."""
        indexes = [reader.index for reader in self.readers.values()]
        known = len(indexes) == len(self._parts_of) and all(
            one is other for one, other in zip(indexes, self._parts_of, strict=True)
        )
        if not known:
            self._parts = self.fresh(self._read_parts)
            self._parts_of = [reader.index for reader in self.readers.values()]
        return self._parts

    def _read_parts(self) -> dict[str, FusedPart]:
        found: dict[str, FusedPart] = {}
        seen: set[str] = set()
        for reader in self.readers.values():
            for record in _fused_records(reader, seen):
                seen.add(str(record.name))
                for part in parts_of(record):
                    name = f"{part.module}/{record.name.phase}/{record.name.tensor}"
                    found.setdefault(name, FusedPart(part.module, str(record.name)))
        return found

    def selection(self, select: str | Iterable[str]) -> Selection | None:
        """`None` where all is selected; raises `SelectionError` where nothing is."""
        if select == "*":
            return None
        selection = Selection.parse(select)
        names = self.names()
        if not any(map(selection.matches, names)) and not self._fused_by_part(selection):
            raise selection.nothing_in([*names, *self.parts()], str(self.path))
        return selection

    def fresh(self, ask: Callable[[], _T]) -> _T:
        """Ask; when an index turns out to contradict its lines, rebuild all and ask again.

        One thread at a time: another one may be reading a row of the index that is replaced.
        """
        with self._asking:
            try:
                return ask()
            except StaleIndex:
                for reader in self.readers.values():
                    reader.rebuild()
                return ask()

    def walk(self, query: Query, selection: Selection | None = None) -> Iterator[TensorRecord]:
        """The records that match, by step, then number, then rank; lines parsed one by one."""
        served = array("q")  # rank and offset, so that a rebuilt index repeats nothing
        found = self.fresh(lambda: self.find(query, selection))
        while True:
            done = set(zip(served[::2], served[1::2], strict=True))
            for rank, position in zip(*found, strict=True):
                reader = self.readers[int(rank)]
                key = int(rank), int(reader.index.rows[position]["offset"])
                try:
                    record = reader.record(int(position)) if key not in done else None
                except StaleIndex:
                    reader.rebuild()
                    break
                if record is not None:
                    served.extend(key)
                    yield record
            else:
                return
            found = self.find(query, selection)

    def find(self, query: Query, selection: Selection | None = None) -> Found:
        """What matches, by step, then number, then rank: the order of execution."""
        ranks, positions, steps, seqs = [], [], [], []
        selected = None if selection is None else self._selected(selection)
        for rank, reader in self.chosen(query.rank).items():
            index = reader.index
            found = query.positions(index, query.names(index, selected))
            ranks.append(np.full(len(found), rank, dtype=np.int64))
            positions.append(found)
            steps.append(index.rows["step"][found])
            seqs.append(index.rows["seq"][found])
        everywhere = np.concatenate(ranks)
        order = np.lexsort((everywhere, np.concatenate(seqs), np.concatenate(steps)))
        return everywhere[order], np.concatenate(positions)[order]

    def _selected(self, selection: Selection) -> Callable[[str], bool]:
        """Is a captured name selected, by itself or as the fused tensor of a part that is?"""
        fused = self._fused_by_part(selection)
        return lambda name: name in fused or selection.matches(name)

    def _fused_by_part(self, selection: Selection) -> set[str]:
        """Fused tensors of which a part is selected; not those whose own name is excluded."""
        found = {part.fused for name, part in self.parts().items() if selection.matches(name)}
        return {name for name in found if not selection.excludes(name)}


def parts_of(record: TensorRecord) -> tuple[Part, ...]:
    """The parts of a fused tensor; none for any other."""
    return record.placement.parts if record.placement is not None else ()


def _fused_records(reader: RankReader, known: set[str]) -> Iterator[TensorRecord]:
    """The first record of each fused name of a rank that is not known yet."""
    index = reader.index
    fused = np.flatnonzero(index.rows["flags"] & PARTS)
    numbers, firsts = np.unique(index.rows["name"][fused], return_index=True)
    for number, position in zip(numbers, fused[firsts], strict=True):
        if str(index.names[number][0]) not in known:
            record = reader.record(int(position))
            if record is not None:
                yield record


def _names_in(reader: RankReader) -> set[str]:
    """Names that occur in the rows of a rank."""
    used = np.unique(_good_rows(reader)["name"])
    return {str(reader.index.names[number][0]) for number in used}


def _good_rows(reader: RankReader) -> Rows:
    """Index rows of lines that could be read."""
    rows = reader.index.rows
    good: Rows = rows[rows["flags"] & BAD == 0]
    return good
