"""A folder of the layout: rank 0's files at the top, those of other ranks in `rank00001/`, ….

Beside the tensors of each rank lie `run.json` (its `RunInfo`) and `coverage.json`, which a script
that looks for `*.pt` does not see.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import CaptureError, RunExists
from tensortap.records import RunInfo, TensorRecord
from tensortap.store.disk import create_file, replace_file
from tensortap.store.documents import encode_document, encode_info
from tensortap_megatron.layout.files import write_file
from tensortap_megatron.layout.words import old_name

RUN = "run.json"
COVERAGE = "coverage.json"
_RANK = re.compile(r"rank(\d{5,9})")


def rank_folder(root: Path, rank: int) -> Path:
    """Where the files of a rank lie."""
    return root if rank == 0 else root / f"rank{rank:05d}"


def rank_folders(root: Path) -> dict[int, Path]:
    """Rank to folder, in rank order; rank 0 is `root` itself."""
    found = {0: root}
    for entry in os.scandir(root):
        match = _RANK.fullmatch(entry.name)
        if match and int(match.group(1)) and entry.is_dir():
            found[int(match.group(1))] = root / entry.name
    return dict(sorted(found.items()))


class RankFolder:
    """The folder of one rank while it is written; each file is there whole or not at all.

    The fork's processes all wrote into one folder, each with a counter of its own, and could
    overwrite each other. Here a rank owns its folder, so that no two files can have one name and
    the names stay the fork's: the counter of every rank begins with 1.
    """

    def __init__(self, root: Path, info: RunInfo) -> None:
        """Make the folder, or take an empty one; raises `RunExists` when a run is in it."""
        self.path = rank_folder(root, info.rank)
        self.files = 0
        self.nbytes = 0
        self._info = info
        self.path.mkdir(parents=True, exist_ok=True)
        if any(self.path.glob("*.pt")):
            raise self._exists()
        try:
            create_file(self.path / RUN, encode_document(encode_info(info)))
        except FileExistsError:
            raise self._exists() from None

    @property
    def alone(self) -> bool:
        """Is there no other rank, to which this one would be missing?"""
        return self._info.world_size <= 1

    def _exists(self) -> RunExists:
        return RunExists(
            f"{self.path} holds the tensor files of another run. Choose another folder, or remove "
            "it."
        )

    def write(self, record: TensorRecord, payload: torch.Tensor, timestamp: str) -> None:
        """Write one file; raises `CaptureError`."""
        old = old_name(record, self._info.format, timestamp, self.files + 1)
        try:
            write_file(self.path / old.file_name, old, record, payload)
        except ValueError as failure:
            raise CaptureError(f"{record.name} cannot be written: {failure}.") from failure
        self.files += 1
        self.nbytes += payload.nbytes

    def cover(self, report: Mapping[str, Any]) -> None:
        """Write coverage.json; raises `CaptureError`."""
        path = self.path / COVERAGE
        try:
            replace_file(path, encode_document(report), sync=False)
        except OSError as failure:
            raise CaptureError(f"{path} could not be written: {failure}.") from failure

    def give_up(self) -> None:
        """Remove what was made, where no tensor was written."""
        (self.path / RUN).unlink(missing_ok=True)
        (self.path / COVERAGE).unlink(missing_ok=True)
        with suppress(OSError):  # files of somebody else, or of other ranks
            self.path.rmdir()
