"""The files of one rank while they are written; failures of the system come out as `OSError`."""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import CaptureError
from tensortap.records import RunInfo, TensorRecord
from tensortap.store.codec import check_payload, encode_record, payload_shape
from tensortap.store.disk import lock, replace_file, sync_directory, write_all
from tensortap.store.documents import encode_document, encode_info
from tensortap.store.dtypes import STORED, dtype_name
from tensortap.store.index import HEAD, IndexBuilder
from tensortap.store.layout import INDEX, NAMES, RANK, RECORDS
from tensortap.store.lines import MAX_LINE, encode_line
from tensortap.store.payloads import PayloadWriter, bytes_of

_BUFFER = 64 << 10  # lines without payload wait for each other up to this many bytes


class RunFull(CaptureError):
    """The run has reached `max_bytes`."""


class RankWriter:
    """Payload bytes first, then the record line, then (at the end of a step) the index.

    A record counts once its line is complete; the index is derived from the lines.
    """

    def __init__(
        self, directory: Path, info: RunInfo, *, max_bytes: int, max_shard: int, sync: bool
    ) -> None:
        """Make the files of a new rank directory; `sync` makes them durable from the start."""
        self.directory = directory
        self._info = info
        self._max_bytes = max_bytes
        self._process = os.getpid()
        self._payloads = PayloadWriter(directory, max_shard)
        self._builder = IndexBuilder()
        self._pending = bytearray()
        self._written = 0  # bytes of records.jsonl that are complete lines in the file
        self._lines = 0  # how many lines that is
        self._torn = False  # lines were lost to an error, so the builder knows too many
        with ExitStack() as files:
            self._records = self._create(RECORDS, files)
            lock(self._records, wait=True)  # a reader may be asking whether it is locked
            self._index = self._create(INDEX, files)
            self._names = self._create(NAMES, files)
            write_all(self._index, HEAD)
            self._derived = len(HEAD)
            self._write_state("writing", sync=sync)
            if sync:
                self._sync_directories()
            self._files = files.pop_all()

    def _create(self, name: str, files: ExitStack) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        descriptor = os.open(self.directory / name, flags, 0o666)
        files.callback(os.close, descriptor)
        return descriptor

    @property
    def alone_and_empty(self) -> bool:
        """Is this the only rank, and was nothing recorded?"""
        return self._lines == 0 and not self._pending and self._info.world_size <= 1

    def inherited(self) -> bool:
        """Is this a fork of the process that opened the run? It must not touch the files."""
        return os.getpid() != self._process

    def write(self, record: TensorRecord, payload: torch.Tensor | None) -> None:
        """Store one record; raises `CaptureError` for one that the reader would refuse."""
        if self.inherited():
            raise CaptureError(f"{self.directory} belongs to the process that was forked.")
        try:
            self._check(record, payload)
            data = None if payload is None else bytes_of(payload)
            self._require_room(0 if data is None else len(data))
            if data is not None:
                ref = self._payloads.put(record, payload_shape(record), data)
                record = replace(record, payload=ref)
            self._add(record)
        except (struct.error, ValueError, TypeError) as failure:
            raise CaptureError(
                f"The record of {record.name} cannot be stored: {failure}."
            ) from failure
        if payload is not None or len(self._pending) > _BUFFER:
            self._flush_lines()

    def _check(self, record: TensorRecord, payload: torch.Tensor | None) -> None:
        if record.at.rank != self._info.rank:
            raise ValueError(f"it is of rank {record.at.rank}, the run of {self._info.rank}")
        if (payload is None) != (record.values == "stats") or record.payload is not None:
            raise ValueError(f"values={record.values!r} and payload do not go together")
        check_payload(record)
        if payload is None:
            return
        if dtype_name(payload.dtype) != record.dtype or record.dtype not in STORED:
            raise ValueError(f"dtype {record.dtype}, payload {dtype_name(payload.dtype)}")
        if payload.numel() != math.prod(payload_shape(record)):
            raise ValueError(f"shape {record.shape}, payload {tuple(payload.shape)}")

    def _require_room(self, nbytes: int) -> None:
        used = self._payloads.nbytes + self._written + len(self._pending) + self._derived
        if used + nbytes > self._max_bytes:
            raise RunFull(
                f"{self.directory} has reached its share of max_bytes ({self._max_bytes} bytes; "
                f"{used} are used, {nbytes} more wanted), so capturing stops. Raise max_bytes, or "
                "select fewer tensors or steps."
            )

    def _add(self, record: TensorRecord) -> None:
        line = encode_line(encode_record(record))
        if len(line) > MAX_LINE:
            raise ValueError(f"its line takes {len(line)} bytes")
        self._builder.add(record, self._written + len(self._pending), len(line))
        self._pending += line

    def _flush_lines(self) -> None:
        try:
            write_all(self._records, self._pending)
        except OSError:
            self._drop_half_line()
            raise
        self._written += len(self._pending)
        self._lines = self._builder.lines
        self._pending.clear()

    def _drop_half_line(self) -> None:
        """Keep the lines that made it and cut the torn one: a full disk leaves a whole file."""
        got = max(os.fstat(self._records).st_size - self._written, 0)
        kept = self._pending.rfind(b"\n", 0, got) + 1
        self._lines += self._pending.count(b"\n", 0, kept)
        self._written += kept
        self._torn = True
        self._pending = bytearray()  # the old one is still held by the failed write's traceback
        os.ftruncate(self._records, self._written)

    def flush(self, *, sync: bool) -> None:
        """Lines, then index rows; payloads are synced before the lines that refer to them."""
        if sync:
            self._payloads.sync()
        self._flush_lines()
        if sync:
            os.fsync(self._records)
        if not self._torn:
            # Names before the rows that use their numbers.
            names, rows = self._builder.take_names(), self._builder.take_rows()
            self._derived += len(names) + len(rows)
            write_all(self._names, names)
            write_all(self._index, rows)

    def close(self, failure: str | None) -> None:
        """Finish everything, each part even when another one fails; raises the first failure.

        `failure` is why the capture is incomplete, if it is.
        """
        steps: tuple[Callable[[], None], ...] = (
            self._payloads.close,
            lambda: self.flush(sync=False),
            lambda: os.fsync(self._records),
        )
        failures = [error for error in map(_attempt, steps) if error is not None]
        reason = failure or (str(failures[0]) if failures else None)
        state = "closed" if reason is None else "failed"
        last = (
            lambda: self._write_state(state, reason, sync=True),
            self._sync_directories,
            self._files.close,
        )
        failures += [error for error in map(_attempt, last) if error is not None]
        if failures:
            raise failures[0]

    def _sync_directories(self) -> None:
        sync_directory(self.directory)
        sync_directory(self.directory.parent)

    def _write_state(self, state: str, reason: str | None = None, *, sync: bool) -> None:
        """rank.json: what this rank is, and how its run ended."""
        content: dict[str, Any] = {"state": state, "reason": reason}
        if state != "writing":
            content |= {"records": self._lines, "bytes": self._written}
            content["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        content["info"] = encode_info(self._info)
        replace_file(self.directory / RANK, encode_document(content), sync=sync)


def _attempt(step: Callable[[], None]) -> OSError | None:
    try:
        step()
    except OSError as failure:
        return failure
    return None
