"""`Run`: reading a run directory, lazily and without trusting it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tensortap.errors import NotSupported, RunCorrupt, RunError
from tensortap.names import TensorName
from tensortap.records import RunInfo, TensorRecord
from tensortap.selection import Selection
from tensortap.store.condition import run_problems
from tensortap.store.documents import decode_info, read_document
from tensortap.store.layout import COVERAGE, RUN
from tensortap.store.logical import LogicalTensor
from tensortap.store.lookup import Found, Lookup
from tensortap.store.query import ANY, Query, Which
from tensortap.store.rank_reader import RankReader
from tensortap.store.ranks import Ranks
from tensortap.store.reports import merge_coverage
from tensortap.store.tables import Table, make_table


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
        self._ranks = Ranks(self.path)
        self._damage: list[str] = []
        self.info = self._read_info()

    def _read_info(self) -> RunInfo:
        """run.json, or when it is damaged what the first rank knows; raises `RunCorrupt`."""
        try:
            return decode_info(read_document(self.path / RUN), self.path / RUN)
        except (FileNotFoundError, RunError) as failure:
            known = [reader.info for reader in self._readers if reader.info is not None]
            if not known:
                self.close()
                raise RunCorrupt(f"{failure}; and no rank.json says more.") from failure
            self._damage.append(str(failure))
            return known[0]

    @property
    def _readers(self) -> Iterable[RankReader]:
        return self._ranks.readers.values()

    @property
    def ranks(self) -> list[int]:
        """Ranks that have a directory, sorted."""
        return list(self._ranks.readers)

    def info_of(self, rank: int) -> RunInfo:
        """What the process of this rank said about itself; `info` where that is lost."""
        return self._ranks.reader(rank).info or self.info

    @property
    def live(self) -> bool:
        """Was a process writing to it when it was opened?"""
        return any(reader.live for reader in self._readers)

    @property
    def problems(self) -> list[str]:
        """What is wrong with the run, as sentences; lines parsed later may add to it."""
        infos = {rank: reader.info for rank, reader in self._ranks.readers.items()}
        found = [*self._damage, *run_problems(self.path, self.info, infos)]
        for reader in self._readers:
            found += reader.problems
        return found + self._gaps()

    @property
    def complete(self) -> bool:
        """Was everything that should be here written, closed and found whole so far?"""
        return not self.problems

    def names(self) -> list[str]:
        """Names of the captured tensors, sorted, each once."""
        return self._ranks.names()

    @property
    def steps(self) -> list[int]:
        """Steps of which there are records, sorted."""
        return self._ranks.steps()

    def part_names(self) -> list[str]:
        """Names that are served from fused tensors as if they had been captured, sorted."""
        return sorted(self._ranks.parts())

    def part_sources(self) -> dict[str, str]:
        """Name of each part -> name of the fused tensor that it is cut from."""
        return {name: part.fused for name, part in self._ranks.parts().items()}

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

        `None` does not restrict. The name of a part selects the records of the fused tensor that
        it is cut from, as it does in `attach`, unless a `!` pattern excludes that one's own name.
        Records whose line is damaged are left out and listed in `problems`. Raises
        `SelectionError` when no name of the run is selected.
        """
        query = Query(
            step=step,
            microbatch=microbatch,
            call=call,
            rank=rank,
            phase=phase,
            recompute=recompute,
            eval=eval,
        )
        selection = self._ranks.selection(select)
        self._ranks.chosen(rank)  # A rank that is not there is said now, not at the first record.
        return self._ranks.walk(query, selection)

    def unmatched(self, select: str | Iterable[str]) -> list[str]:
        """Patterns of a selection that match no name of the run, nor that of a part."""
        return Selection.parse(select).dead([*self.names(), *self.part_names()], ())

    def table(
        self,
        select: str | Iterable[str] = "*",
        *,
        step: int | None = None,
        rank: int | None = None,
        phase: str | None = None,
        recompute: bool | None = None,
        eval: bool | None = None,
        nonfinite: bool = False,
    ) -> Table:
        """Coordinates and statistics of many records at once, in execution order, as an array.

        Read from the index, whose rows carry checksums; no line is parsed. Selects as `records`;
        `nonfinite` only those with NaN or infinity.
        """
        query = Query(
            step=step, rank=rank, phase=phase, recompute=recompute, eval=eval, nonfinite=nonfinite
        )
        ranks, positions = self._ranks.find(query, self._ranks.selection(select))
        indexes = {number: reader.index for number, reader in self._ranks.readers.items()}
        return make_table(indexes, ranks, positions)

    def record_at(self, rank: int, line: int) -> TensorRecord | None:
        """The record of a row of `table`; `None` when its line is damaged (see `problems`)."""
        return self._ranks.fresh(lambda: self._ranks.reader(rank).record(line - 1))

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
        return self._ranks.reader(record.at.rank).payload(record, verify=verify)

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
        which = Which(
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
        where = self.logical(name, which)
        with self._naming(name):
            return where.tensor()

    def logical(self, name: str | TensorName, which: Which = ANY) -> LogicalTensor:
        """The same tensor as `tensor`, put together where it is read, box by box."""
        lookup = Lookup(self._ranks)

        def serve() -> LogicalTensor:
            found = lookup.find(str(name), which.query)
            if not found.records:
                raise lookup.not_found(str(name), which.query)
            return self._assembled(found, which)

        with self._naming(name):
            return self._ranks.fresh(serve)

    def logical_of(
        self, records: Iterable[TensorRecord], which: Which = ANY, *, part: str | None = None
    ) -> LogicalTensor:
        """The logical tensor that these records hold the pieces of, or the part of that name."""
        pieces = tuple(records)
        module = None if part is None else self._ranks.parts()[part].module
        with self._naming(part or str(pieces[0].name)):
            return self._assembled(Found(pieces, module), which)

    def _assembled(self, found: Found, which: Which) -> LogicalTensor:
        pieces = [
            (record, self.piece(record, verify=which.verify), self.info_of(record.at.rank))
            for record in found.choose(which, self._place_of)
        ]
        return found.logical(pieces, which)

    @contextmanager
    def _naming(self, name: str | TensorName) -> Iterator[None]:
        """Errors inside say which tensor of which run they are about."""
        try:
            yield
        except RunCorrupt:
            raise
        except RunError as failure:
            raise type(failure)(f"{name} in {self.path}: {failure}") from failure

    def _place_of(self, rank: int) -> RunInfo:
        """The rank's own info: another rank's would place its piece wrongly."""
        info = self._ranks.reader(rank).info
        if info is None and len(self._ranks.readers) > 1:
            raise RunError(
                f"rank.json of rank {rank} is damaged, so its place among the ranks is not known; "
                f"ask for its piece with rank={rank}"
            )
        return info or self.info

    def coverage(self) -> dict[str, Any]:
        """The coverage reports of all ranks as one (see `tensortap.coverage`); `{}` without any.

        Raises `RunCorrupt` when one is damaged.
        """
        reports = {reader.directory / COVERAGE: reader.coverage() for reader in self._readers}
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
        for record in self._ranks.walk(Query()):
            try:
                if record.payload is not None:
                    self._payload(record, verify=True)
            except (RunError, NotSupported) as failure:
                damaged.append(str(failure))
        return self.problems + damaged

    def close(self) -> None:
        """Let go of what is mapped; tensors that were read stay valid."""
        for reader in self._readers:
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
