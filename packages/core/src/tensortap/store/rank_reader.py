"""Reading one rank of a run: its lines through the index, its payloads through memory maps."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from xxhash import xxh3_128_hexdigest

from tensortap.errors import NotSupported, RunCorrupt, RunError
from tensortap.records import RunInfo, TensorRecord
from tensortap.store.codec import payload_shape
from tensortap.store.disk import is_locked
from tensortap.store.documents import decode_info, read_document
from tensortap.store.dtypes import STORED
from tensortap.store.fields import integer, mapping
from tensortap.store.index import EMPTY_ROWS, Index, IndexBuilder, count_rows, load_index
from tensortap.store.layout import COVERAGE, INDEX, RANK, RECORDS, open_regular
from tensortap.store.lines import MAX_LINE
from tensortap.store.mapping import map_bytes
from tensortap.store.rows import BAD, pack_row, same_row
from tensortap.store.scan import Window, decode_of_rank, lines_of

_SAMPLES = 16


class StaleIndex(RunCorrupt):
    """A row of the index contradicts its line; after `rebuild` the query is asked again."""


class RankReader:
    """One `rank…/` directory, opened for reading; nothing in it is changed."""

    def __init__(self, directory: Path, rank: int, *, live: bool | None = None) -> None:
        """Read what is there now; `live` is whether a process writes it (default: ask its lock)."""
        self.directory = directory
        self.rank = rank
        self._problems: dict[str, None] = {}  # a set that keeps the order
        self._index: Index | None = None
        self._rebuilt = False
        self._lines = Window(self._opened)
        self.size = self._measure()
        self.live = is_locked(directory / RECORDS) if live is None else live
        self._state = self._read_state()
        self.info = self._read_info()

    def _measure(self) -> int:
        """Bytes of records; what is written after this moment is not read."""
        try:
            with self._opened() as descriptor:
                return os.fstat(descriptor).st_size
        except FileNotFoundError:
            self._problem(f"{self.directory / RECORDS} is missing")
        except RunError as failure:
            self._problem(str(failure))
        return 0

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The file of records; opened for each use, since a run may have thousands of ranks."""
        descriptor = open_regular(self.directory / RECORDS)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _read_state(self) -> dict[str, Any]:
        try:
            return read_document(self.directory / RANK)
        except FileNotFoundError:
            self._problem(f"{self.directory / RANK} is missing")
        except RunError as failure:
            self._problem(str(failure))
        return {}

    def _read_info(self) -> RunInfo | None:
        if not self._state:
            return None
        try:
            info = decode_info(mapping(self._state, "info"), self.directory / RANK)
            if info.rank != self.rank:
                raise ValueError(f"says that it is of rank {info.rank}")
            return info
        except (RunCorrupt, ValueError) as failure:
            self._problem(f"{self.directory / RANK}: {failure}")
            return None

    def close(self) -> None:
        """Let go of the mapped index; it is mapped again when it is needed again."""
        if not self._rebuilt:
            self._index = None

    def _problem(self, text: str) -> None:
        self._problems[text] = None

    @property
    def problems(self) -> list[str]:
        """What is wrong with this rank; lines that were not parsed yet may add to it."""
        self._describe_end()
        self._describe_tail()
        return list(self._problems)

    def _describe_end(self) -> None:
        state = self.state
        if self.live:
            self._problem(f"{self.directory}: is still being written")
        elif state == "failed":
            self._problem(f"{self.directory}: capture failed: {self._state.get('reason')}")
        elif state == "writing":
            self._problem(f"{self.directory}: the run was interrupted before it was closed")
        elif state == "recovered":
            self._problem(f"{self.directory}: the run was interrupted, and recovered since")

    def _describe_tail(self) -> None:
        index = self.index
        if index.covered < self.size and not self.live:
            self._problem(
                f"{self.directory / RECORDS}: the last {self.size - index.covered} bytes are "
                "half a line, one record is lost"
            )
        if self.lost_records:
            self._problem(
                f"{self.directory / RECORDS}: {self.lost_records} records at its end are lost"
            )

    @property
    def state(self) -> str:
        """How the writer left this rank: writing, closed, failed or recovered; else unknown."""
        state = self._state.get("state")
        return state if state in ("writing", "closed", "failed", "recovered") else "unknown"

    @property
    def bad_lines(self) -> int:
        """How many lines cannot be read."""
        return int(np.count_nonzero(self.index.rows["flags"] & BAD))

    @property
    def lost_records(self) -> int:
        """How many records are known to have been written and have no line any more."""
        if self.live:
            return 0
        return max(self._expected_records() - len(self.index.rows), 0)

    def _expected_records(self) -> int:
        """How many lines the rank is known to have written."""
        try:
            if "records" in self._state:
                return integer(self._state, "records")
            return count_rows(self.directory / INDEX)
        except (FileNotFoundError, RunError, ValueError):
            return 0

    @property
    def index(self) -> Index:
        """The index; from the file, completed from lines written since, or made from the lines."""
        if self._index is None:
            known = load_index(self.directory, self.size)
            if known is not None and self._holds(known):
                self._index = self._complete(known)
                self._report_bad_lines(self._index)
            else:
                self.rebuild()
        assert self._index is not None
        return self._index

    def rebuild(self) -> None:
        """Forget the stored index, which lied, and make a new one from the lines."""
        self._rebuilt = True
        self._index = self._complete(None)
        self._report_bad_lines(self._index)

    def _holds(self, known: Index) -> bool:
        """Does a stored index belong to these lines? A few rows, spread evenly, are compared.

        It costs little and finds the index of another run, or one that is older than its lines.
        """
        self._index = known
        try:
            for position in np.unique(np.linspace(0, len(known.rows) - 1, _SAMPLES).astype(int)):
                if len(known.rows):
                    self.record(int(position))
        except StaleIndex:
            return False
        finally:
            self._index = None
        return True

    def _complete(self, known: Index | None) -> Index:
        """`known` and what the lines after it say."""
        start = 0 if known is None else known.covered
        if self.size == 0:
            return Index(EMPTY_ROWS, ())
        if known is not None and start == self.size:
            return known
        builder = IndexBuilder(known)
        with self._opened() as descriptor:
            for line in lines_of(descriptor, start, self.size):
                try:
                    builder.add(line.decode(self.rank), line.offset, line.length)
                except (ValueError, struct.error):
                    builder.add_bad(line.offset, line.length)
        return builder.index(known)

    def _report_bad_lines(self, index: Index) -> None:
        for position in np.flatnonzero(index.rows["flags"] & BAD):
            try:
                self.record(int(position))
            except StaleIndex:  # the line is whole, whatever the index says
                self.rebuild()
                return

    def record(self, position: int) -> TensorRecord | None:
        """The record of a row; `None` (and a problem) when its line is damaged.

        Raises `StaleIndex` when the row is not about a line, or contradicts one that is whole.
        """
        row = self.index.rows[position]
        place = (int(row["name"]), int(row["offset"]), int(row["length"]), int(row["line"]))
        try:
            record = decode_of_rank(self._line(row), self.rank)
            packed = pack_row(record, *place)
        except (ValueError, struct.error) as failure:
            self._problem(f"{self.directory / RECORDS}:{row['line']}: {failure}")
            return None
        named = self.index.names[int(row["name"])] if self.index.names else None
        if named != (record.name, record.native) or not same_row(row, packed):
            raise self._stale(row)
        return record

    def _stale(self, row: np.void) -> RunCorrupt:
        where = f"{self.directory / RECORDS}:{row['line']}"
        if self._rebuilt:  # so it is not the index that changed
            return RunCorrupt(f"{where}: the file was changed while it was read.")
        return StaleIndex(f"{where}: {INDEX} contradicts this line.")

    def _line(self, row: np.void) -> bytes:
        if row["length"] > MAX_LINE:
            raise ValueError(f"{row['length']} bytes are no line of a run")
        # With the byte before it: a row is only about a line if newlines are around it.
        before = min(int(row["offset"]), 1)
        size = int(row["length"])
        text = self._lines.read(int(row["offset"]) - before, before + size)
        line = text[before:]
        if text[:before] not in (b"", b"\n") or line.find(b"\n") != size - 1:
            raise self._stale(row)
        return line[:-1]

    def payload(self, record: TensorRecord, *, verify: bool) -> torch.Tensor:
        """The stored tensor, mapped into memory; raises `RunCorrupt` naming file and range."""
        ref = record.payload
        if ref is None:
            raise RunError(f"{record.name} has no payload in {self.directory}.")
        stored = STORED.get(record.dtype)
        try:
            if stored is None:
                raise NotSupported(f"torch {torch.__version__} has no dtype {record.dtype}.")
            raw = map_bytes(self.directory / ref.shard, ref.offset, ref.offset + ref.nbytes)
            if verify and xxh3_128_hexdigest(raw.numpy().data) != ref.digest:
                raise RunCorrupt("the bytes do not match their digest.")
            typed: torch.Tensor = raw.view(stored.torch)
            return typed.view(payload_shape(record))
        except FileNotFoundError:
            raise RunCorrupt(f"{self._where(record)}: the file is missing.") from None
        except (RunError, NotSupported) as failure:
            raise type(failure)(f"{self._where(record)}: {failure}") from failure
        except RuntimeError as failure:
            first = str(failure).splitlines()[0]
            raise RunCorrupt(f"{self._where(record)}: {first}.") from failure

    def _where(self, record: TensorRecord) -> str:
        ref = record.payload
        assert ref is not None
        last = ref.offset + ref.nbytes
        return f"{self.directory / ref.shard}: {record.name}, bytes {ref.offset} to {last}"

    def coverage(self) -> dict[str, Any] | None:
        """The coverage report of this rank, or `None`; raises `RunCorrupt`."""
        try:
            return read_document(self.directory / COVERAGE)
        except FileNotFoundError:
            return None
