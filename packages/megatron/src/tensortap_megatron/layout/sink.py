"""`MegatronPtSink`: the old fork's files, written while the model runs."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tensortap.config import DEFAULT_MAX_BYTES
from tensortap.errors import CaptureError, CaptureWarning
from tensortap.records import RunInfo, TensorRecord, Values
from tensortap_megatron.layout.folder import RankFolder

BARE = "statistics only, and this layout holds tensors: capture with values='full'"
"""Why a record has no file."""


class MegatronPtSink:
    """Writes each tensor as one `.pt` file of the layout `megatron-pt` (see `layout.words`).

        attach(model, MegatronPtSink("tensor_logs"))      # full values by default

    A record without values has no file: it is a gap in the coverage, said once as a
    `CaptureWarning` at the end of the first step and again at the close. A run of nothing else is
    a `CaptureError` and leaves no folder. `max_bytes` caps the tensors on disk, each rank having
    an equal share. Killed at any moment, only whole files are there.
    """

    default_values: Values = "full"

    def __init__(
        self, folder: str | os.PathLike[str], *, max_bytes: int = DEFAULT_MAX_BYTES
    ) -> None:
        self.path = Path(folder)
        self._max_bytes = max_bytes
        self._folder: RankFolder | None = None
        self._share = max_bytes
        self._bare: Counter[str] = Counter()
        self._lost: Counter[tuple[str, str]] = Counter()
        self._warned = False
        self._covered = False

    def open(self, run: RunInfo) -> None:
        """Take the folder of this rank; raises `RunExists` when another run is in it."""
        if self._folder is not None:
            raise CaptureError(f"{self.path} is open already; a sink serves one run.")
        try:
            self._folder = RankFolder(self.path, run)
        except OSError as failure:
            raise CaptureError(f"{self.path} cannot be made: {failure}.") from failure
        self._share = self._max_bytes // max(run.world_size, 1)

    def write(self, record: TensorRecord, payload: torch.Tensor | None) -> None:
        """Write one file, named by the moment of writing; without a payload, count the record."""
        folder = self._opened()
        if payload is None:
            self._bare[str(record.name)] += 1
            return
        try:
            self._require_room(folder, payload.nbytes)
            folder.write(record, payload, time.strftime("%Y%m%d_%H%M%S"))
        except CaptureError as failure:
            self._lost[str(record.name), str(failure)] += 1
            raise

    def _require_room(self, folder: RankFolder, nbytes: int) -> None:
        if folder.nbytes + nbytes > self._share:
            raise CaptureError(
                f"{folder.path} has reached its share of max_bytes ({self._share} bytes), so "
                "capturing stops. Raise max_bytes, or select fewer tensors or steps."
            )

    def _opened(self) -> RankFolder:
        if self._folder is None:
            raise CaptureError(f"{self.path} is not open.")
        return self._folder

    def end_step(self, step: int) -> None:
        """Every file is in place as soon as it is written; say now what will be missing."""
        if self._bare and not self._warned:
            self._warned = True
            warnings.warn(self._missing(), CaptureWarning, stacklevel=2)

    def _missing(self) -> str:
        names = ", ".join(list(self._bare)[:3])
        return f"{self.path}: {self._bare.total()} records have no file ({names}, …): {BARE}."

    def cover(self, report: Mapping[str, Any]) -> None:
        """Write coverage.json, in which records without a file are gaps."""
        self._covered = True
        self._opened().cover(self._with_gaps(report))

    def _with_gaps(self, report: Mapping[str, Any]) -> dict[str, Any]:
        lost = [
            {"name": name, "reason": reason, "count": count}
            for (name, reason), count in self._lost.items()
        ]
        gaps = [*report.get("gaps", ()), *lost, *bare_gaps(self._bare)]
        whole = bool(report.get("complete", True)) and not gaps
        return {**report, "complete": whole, "gaps": gaps}

    def close(self) -> None:
        """Say what has no file; raises `CaptureError` when nothing has. Twice does nothing."""
        folder, self._folder = self._folder, None
        if folder is None:
            return
        if not folder.files and (self._bare or folder.alone):
            folder.give_up()
        elif not self._covered:  # Without a report the run would count as killed.
            folder.cover(self._with_gaps({"notes": []}))
        if self._bare and not folder.files:
            raise CaptureError(f"nothing was written: {self._missing()}")
        if self._bare:
            warnings.warn(self._missing(), CaptureWarning, stacklevel=2)


def bare_gaps(bare: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of a coverage report for records that have no file."""
    return [{"name": name, "reason": BARE, "count": bare[name]} for name in sorted(bare)]
