"""`Run`: reading a run directory, lazily and without trusting it."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from tensortap.errors import ConfigError, NotSupported, RunCorrupt, RunError, nearest
from tensortap.names import PHASES, TensorName
from tensortap.records import RunInfo, TensorRecord
from tensortap.selection import Selection
from tensortap.store.condition import run_problems
from tensortap.store.documents import decode_info, read_document
from tensortap.store.layout import COVERAGE, RUN, rank_directories
from tensortap.store.logical import LogicalTensor
from tensortap.store.lookup import Lookup
from tensortap.store.query import Query
from tensortap.store.rank_reader import RankReader, StaleIndex
from tensortap.store.reports import merge_coverage
from tensortap.store.rows import BAD, Rows
from tensortap.store.tables import Table, make_table

_T = TypeVar("_T")
Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.intp]]
"""Records before their lines are parsed: ranks, and positions in those ranks' indexes."""


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run directory for reading, also one that was interrupted or is still being written.

    Raises `RunError` when there is no run, `RunCorrupt` when nothing of it can be trusted. Check
    `Run.problems` for what is missing.
    """
    return Run(path)


class Run:
    """One run, all its ranks; made by `open_run`, closed by `close` or at the end of `with`.

    Nothing in the directory is changed, and no file is kept open.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        directories = require_run(self.path)
        self._readers = {rank: RankReader(where, rank) for rank, where in directories.items()}
        self._damage: list[str] = []
        self.info = self._read_info()

    def _read_info(self) -> RunInfo:
        """run.json, or when it is damaged what the first rank knows; raises `RunCorrupt`."""
        try:
            return decode_info(read_document(self.path / RUN), self.path / RUN)
        except (FileNotFoundError, RunError) as failure:
            known = [reader.info for reader in self._readers.values() if reader.info is not None]
            if not known:
                self.close()
                raise RunCorrupt(f"{failure}; and no rank.json says more.") from failure
            self._damage.append(str(failure))
            return known[0]

    @property
    def ranks(self) -> list[int]:
        """Ranks that have a directory, sorted."""
        return list(self._readers)

    def info_of(self, rank: int) -> RunInfo:
        """What the process of this rank said about itself; `info` where that is lost."""
        return self._reader(rank).info or self.info

    def _reader(self, rank: int) -> RankReader:
        if rank not in self._readers:
            raise RunError(f"{self.path} has no rank {rank}; it has {self.ranks}.")
        return self._readers[rank]

    @property
    def problems(self) -> list[str]:
        """What is wrong with the run, as sentences; lines parsed later may add to it."""
        infos = {rank: reader.info for rank, reader in self._readers.items()}
        found = [*self._damage, *run_problems(self.path, self.info, infos)]
        for reader in self._readers.values():
            found += reader.problems
        return found + self._gaps()

    @property
    def complete(self) -> bool:
        """Was everything that should be here written, closed and found whole so far?"""
        return not self.problems

    def names(self) -> list[str]:
        """Names of the captured tensors, sorted, each once."""
        return sorted(set().union(*map(_names_in, self._readers.values())))

    @property
    def steps(self) -> list[int]:
        """Steps of which there are records, sorted."""
        found = [np.unique(_good_rows(reader)["step"]) for reader in self._readers.values()]
        return sorted({int(step) for steps in found for step in steps})

    def part_names(self) -> list[str]:
        """Names that are served from fused tensors as if they had been captured, sorted."""
        return sorted(self.part_sources())

    def part_sources(self) -> dict[str, str]:
        """Name of each part -> name of the fused tensor that it is cut from."""
        return self._fresh(lambda: Lookup(self._readers).part_sources())

    def records(
        self,
        select: str | Iterable[str] = "*",
        *,
        step: int | None = None,
        microbatch: int | None = None,
        call: int | None = None,
        rank: int | None = None,
        phase: str | None = None,
        recompute: bool | None = None,
        eval: bool | None = None,
    ) -> Iterator[TensorRecord]:
        """Records in execution order (by step, then number, then rank); lines parsed one by one.

        `None` does not restrict. Records whose line is damaged are left out and listed in
        `problems`. Raises `SelectionError` when no name of the run is selected.
        """
        query = Query(step, microbatch, call, _phase(phase), recompute, eval)
        selection = self._selection(select)
        readers = self._chosen(rank)
        return self._iterate(lambda: _in_order(readers, query, selection))

    def _iterate(self, find: Callable[[], Found]) -> Iterator[TensorRecord]:
        served = array("q")  # rank and offset, so that a rebuilt index repeats nothing
        found = self._fresh(find)
        while True:
            done = set(zip(served[::2], served[1::2], strict=True))
            for rank, position in zip(*found, strict=True):
                reader = self._readers[int(rank)]
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
            found = find()

    def _fresh(self, ask: Callable[[], _T]) -> _T:
        """Ask; when an index turns out to contradict its lines, rebuild all and ask again."""
        try:
            return ask()
        except StaleIndex:
            for reader in self._readers.values():
                reader.rebuild()
            return ask()

    def table(
        self,
        select: str | Iterable[str] = "*",
        *,
        step: int | None = None,
        rank: int | None = None,
        phase: str | None = None,
        recompute: bool | None = None,
        eval: bool | None = None,
    ) -> Table:
        """Coordinates and statistics of many records at once, in execution order, as an array.

        Read from the index, whose rows carry checksums; no line is parsed.
        """
        query = Query(step, None, None, _phase(phase), recompute, eval)
        ranks, positions = _in_order(self._chosen(rank), query, self._selection(select))
        indexes = {number: reader.index for number, reader in self._readers.items()}
        return make_table(indexes, ranks, positions)

    def piece(self, record: TensorRecord, *, verify: bool = True) -> torch.Tensor:
        """What one rank captured: its tensor as stored (a sample has one axis).

        The tensor is a private memory map of the shard: nothing is read before it is used, and
        writing to it changes neither the file nor what is read next. `verify` checks the digest
        first, which reads every byte; `RunCorrupt` names the file and the byte range.
        """
        return self._payload(record, verify)

    def sample(self, record: TensorRecord, *, verify: bool = True) -> torch.Tensor:
        """Every `record.stride`-th element, in logical order; for `values="sample"`."""
        if record.values != "sample":
            raise RunError(f"{record.name} was captured with values={record.values!r}, no sample.")
        return self._payload(record, verify)

    def _payload(self, record: TensorRecord, verify: bool) -> torch.Tensor:
        if record.payload is None:
            raise RunError(
                f"{record.name} has statistics only; capture it with values='full' to read it."
            )
        return self._reader(record.at.rank).payload(record, verify=verify)

    def tensor(
        self,
        name: str | TensorName,
        *,
        step: int | None = None,
        microbatch: int | None = None,
        call: int | None = None,
        recompute: bool = False,
        eval: bool = False,
        rank: int | None = None,
        dp_rank: int | None = None,
        padded: bool = True,
        verify: bool = True,
    ) -> torch.Tensor:
        """The logical tensor, put together from the pieces of all ranks.

        `rank` asks for that rank's piece alone, `dp_rank` chooses among data-parallel ranks
        (they saw different data), `padded=False` cuts padding off. A name that is only part of
        a fused tensor is cut from it. Raises `RunError` saying what to choose from when there
        are several, what is missing, or who disagrees.
        """
        where = self.logical(
            name,
            step=step,
            microbatch=microbatch,
            call=call,
            recompute=recompute,
            eval=eval,
            rank=rank,
            dp_rank=dp_rank,
            padded=padded,
            verify=verify,
        )
        with self._naming(name):
            return where.tensor()

    def logical(
        self,
        name: str | TensorName,
        *,
        step: int | None = None,
        microbatch: int | None = None,
        call: int | None = None,
        recompute: bool = False,
        eval: bool = False,
        rank: int | None = None,
        dp_rank: int | None = None,
        padded: bool = True,
        verify: bool = True,
    ) -> LogicalTensor:
        """The same tensor as `tensor`, put together where it is read, box by box."""
        query = Query(step, microbatch, call, None, recompute, eval)
        readers = self._chosen(rank)

        def serve() -> LogicalTensor:
            lookup = Lookup(readers)
            found = lookup.find(str(name), query)
            if not found.records:
                raise self._not_found(str(name), lookup)
            pieces = [
                (record, self.piece(record, verify=verify), self.info_of(record.at.rank))
                for record in found.choose(dp_rank, self._place_of, alone=rank is not None)
            ]
            return found.logical(
                pieces, alone=rank is not None, one_replica=dp_rank is not None, padded=padded
            )

        with self._naming(name):
            return self._fresh(serve)

    @contextmanager
    def _naming(self, name: str | TensorName) -> Iterator[None]:
        """Errors inside say which tensor of which run they are about."""
        try:
            yield
        except RunCorrupt:
            raise
        except RunError as failure:
            raise RunError(f"{name} in {self.path}: {failure}") from failure

    def _place_of(self, rank: int) -> RunInfo:
        """The rank's own info: another rank's would place its piece wrongly."""
        info = self._reader(rank).info
        if info is None and len(self._readers) > 1:
            raise RunError(
                f"rank.json of rank {rank} is damaged, so its place among the ranks is not known; "
                f"ask for its piece with rank={rank}"
            )
        return info or self.info

    def _not_found(self, name: str, lookup: Lookup) -> RunError:
        elsewhere = lookup.coordinates(name)
        if elsewhere:
            return RunError(f"not at these coordinates; it is at {elsewhere}")
        known = [*self.names(), *lookup.part_sources()]
        return RunError(f"not captured. Closest names: {nearest(name, known)}")

    def coverage(self) -> dict[str, Any]:
        """The coverage reports of all ranks as one (see `tensortap.coverage`); `{}` without any.

        Raises `RunCorrupt` when one is damaged.
        """
        readers = self._readers.values()
        reports = {reader.directory / COVERAGE: reader.coverage() for reader in readers}
        return merge_coverage({path: report for path, report in reports.items() if report})

    def _gaps(self) -> list[str]:
        """The gaps of the coverage report as one problem, if there are any."""
        try:
            gaps = self.coverage().get("gaps")
        except RunError as failure:
            return [str(failure)]
        if not gaps:
            return []
        first = f"{gaps[0]['name']}: {gaps[0]['reason']}"
        return [f"{self.path}: {len(gaps)} gaps in the coverage, the first: {first}"]

    def verify(self) -> list[str]:
        """Parse every line and hash every payload; returns all problems, nothing when whole."""
        damaged = []
        for record in self._iterate(lambda: _in_order(self._readers, Query(), None)):
            try:
                if record.payload is not None:
                    self._payload(record, verify=True)
            except (RunError, NotSupported) as failure:
                damaged.append(str(failure))
        return self.problems + damaged

    def _chosen(self, rank: int | None) -> dict[int, RankReader]:
        return self._readers if rank is None else {rank: self._reader(rank)}

    def _selection(self, select: str | Iterable[str]) -> Selection | None:
        if select == "*":
            return None
        selection = Selection.parse(select)
        names = self.names()
        if not any(map(selection.matches, names)):
            raise selection.nothing_in(names, str(self.path))
        return selection

    def close(self) -> None:
        """Let go of what is mapped; tensors that were read stay valid."""
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, ranks={self.ranks})"


def require_run(path: Path) -> dict[int, Path]:
    """The rank directories of a run; raises `RunError` when `path` is none."""
    try:
        directories = rank_directories(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"There is no run at {path}.") from None
    except OSError as failure:
        raise RunError(f"{path} cannot be read: {failure.strerror}.") from failure
    if not directories:
        raise RunError(
            f"{path} is not a run: no rank has a directory in it. If another tool, or "
            "`tensortap export`, wrote it, `tensortap import` makes a run of it."
        )
    return directories


def _in_order(
    readers: Mapping[int, RankReader], query: Query, selection: Selection | None
) -> Found:
    """What matches, by step, then number, then rank: the order of execution."""
    ranks, positions, steps, seqs = [], [], [], []
    for rank, reader in readers.items():
        index = reader.index
        found = query.positions(index, query.names(index, selection))
        ranks.append(np.full(len(found), rank, dtype=np.int64))
        positions.append(found)
        steps.append(index.rows["step"][found])
        seqs.append(index.rows["seq"][found])
    if not ranks:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.intp)
    everywhere = np.concatenate(ranks)
    order = np.lexsort((everywhere, np.concatenate(seqs), np.concatenate(steps)))
    return everywhere[order], np.concatenate(positions)[order]


def _names_in(reader: RankReader) -> set[str]:
    """Names that occur in the rows of a rank."""
    used = np.unique(_good_rows(reader)["name"])
    return {str(reader.index.names[number][0]) for number in used}


def _good_rows(reader: RankReader) -> Rows:
    """Index rows of lines that could be read."""
    rows = reader.index.rows
    good: Rows = rows[rows["flags"] & BAD == 0]
    return good


def _phase(phase: str | None) -> str | None:
    if phase is not None and phase not in PHASES:
        raise ConfigError(f"phase={phase!r} is not a phase; phases are {', '.join(PHASES)}.")
    return phase
