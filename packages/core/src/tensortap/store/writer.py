"""`RunDirectorySink`: writes a run directory that survives being killed at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from tensortap.config import DEFAULT_MAX_BYTES
from tensortap.errors import CaptureError, RunExists
from tensortap.records import RunInfo, TensorRecord
from tensortap.store.directory import claim, give_up
from tensortap.store.disk import replace_file
from tensortap.store.documents import encode_document
from tensortap.store.layout import COVERAGE
from tensortap.store.rank_writer import RankWriter, RunFull

DEFAULT_MAX_SHARD_BYTES = 1 << 30
_T = TypeVar("_T")


class RunDirectorySink:
    """Writes records and payloads below `path/rank…/`; a `TensorSink` and a `CoverageSink`.

    `durable` says from when data survives a power loss: the end of each step (`"step"`) or
    `close` (`"close"`); a killed process loses at most the last 64 KiB of lines that have no
    payload. `max_bytes` caps the run on disk, each rank having an equal share;
    `max_shard_bytes` is when a new payload file begins. `overwrite` replaces an existing run of
    another launch.

    Every failure is a `CaptureError` with path and reason, or `RunExists`. After a failure of
    the system, or when the run is full, the sink takes no more records and repeats the reason;
    `close` still finishes what is there, and the run says that it is incomplete.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        durable: Literal["close", "step"] = "close",
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    ) -> None:
        if durable not in ("close", "step"):
            raise CaptureError(f"durable={durable!r}: it is either 'close' or 'step'.")
        self.path = Path(path)
        self._overwrite = overwrite
        self._durable = durable
        self._max_bytes = max_bytes
        self._max_shard_bytes = max_shard_bytes
        self._rank: RankWriter | None = None
        self._failure: str | None = None  # why no more records are taken
        self._incomplete: str | None = None
        self._coverage_failed: OSError | None = None

    def open(self, run: RunInfo) -> None:
        """Create or join the run; raises `RunExists` when another launch wrote it."""
        if self._rank is not None:
            raise CaptureError(f"{self.path} is open already; a sink serves one run.")
        self._rank = self._guarded(lambda: self._start(run))

    def _start(self, run: RunInfo) -> RankWriter:
        directory = claim(self.path, run, overwrite=self._overwrite)
        share = self._max_bytes // max(run.world_size, 1)
        return RankWriter(
            directory,
            run,
            max_bytes=share,
            max_shard=self._max_shard_bytes,
            sync=self._durable == "step",
        )

    def write(self, record: TensorRecord, payload: torch.Tensor | None) -> None:
        """Payload first, then the line that makes it count."""
        self._guarded(lambda: self._opened().write(record, payload))

    def end_step(self, step: int) -> None:
        """Hand everything so far to the system, and to the disk under `durable="step"`."""
        self._guarded(lambda: self._opened().flush(sync=self._durable == "step"))

    def cover(self, report: Mapping[str, Any]) -> None:
        """Write coverage.json, also after a failure; if that fails too, `close` raises it."""
        path = self._opened().directory / COVERAGE
        try:
            replace_file(path, encode_document(report), sync=True)
        except OSError as failure:
            self._coverage_failed = failure
            self.mark_incomplete(f"{path} could not be written: {failure}")

    def mark_incomplete(self, reason: str) -> None:
        """Let the run say that it is not whole, and why; for failures outside the sink."""
        self._incomplete = self._incomplete or reason

    def close(self) -> None:
        """Finish shards and index, after a failure as far as that goes. Twice does nothing.

        A run of one process without any record is removed: there are no empty runs. Raises
        `CaptureError` when something cannot be finished. A forked process that inherited
        the sink leaves the files alone.
        """
        rank, self._rank = self._rank, None
        if rank is None or rank.inherited():
            return
        try:
            rank.close(self._failure or self._incomplete)
            if rank.alone_and_empty:
                give_up(rank.directory)
            elif self._coverage_failed is not None:
                raise self._coverage_failed
        except OSError as failure:
            raise CaptureError(
                f"{rank.directory} could not be finished: {failure}. What was recorded can be "
                f"read; `tensortap recover {self.path}` finishes it."
            ) from failure

    def _opened(self) -> RankWriter:
        if self._rank is None:
            raise CaptureError(f"{self.path} is not open: call open(run) first.")
        return self._rank

    def _guarded(self, act: Callable[[], _T]) -> _T:
        """Run `act`; a failure of the system ends the capture, and later calls repeat it."""
        if self._failure is not None:
            raise CaptureError(self._failure)
        try:
            return act()
        except OSError as failure:
            where = failure.filename or self.path
            self._failure = (
                f"Writing {where} failed: {failure.strerror or failure}. What was recorded "
                "before is kept and can be read."
            )
            raise CaptureError(self._failure) from failure
        except RunFull as failure:
            self._failure = str(failure)
            raise
        except RunExists:
            raise
        except CaptureError as failure:
            self.mark_incomplete(str(failure))
            raise
