"""Mapping files into memory without keeping them open: a run may have thousands of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import torch

from tensortap.errors import RunCorrupt, RunError
from tensortap.store.layout import open_regular


def map_bytes(path: Path, start: int, end: int | None = None) -> torch.Tensor:
    """Bytes `start` to `end` of a file as a uint8 tensor; nothing is read before it is used.

    The mapping is private: writing to the tensor changes neither the file nor other mappings.
    Raises `FileNotFoundError`, `RunCorrupt` when the file is too short or no regular file, and
    `RunError` when it cannot be mapped.
    """
    descriptor = open_regular(path)  # refuses links and what is no file
    size = os.fstat(descriptor).st_size
    os.close(descriptor)
    end = size if end is None else end
    if not 0 <= start <= end <= size:
        raise RunCorrupt(f"{path}: bytes {start} to {end} are wanted, the file has only {size}.")
    whole = torch.empty(0, dtype=torch.uint8)
    if start == end:
        return whole
    try:
        storage = cast(
            torch.UntypedStorage,
            torch.UntypedStorage.from_file(str(path), shared=False, nbytes=end),
        )
    except RuntimeError as failure:
        raise RunError(f"{path}: {str(failure).splitlines()[0]}.") from failure
    return whole.set_(storage, start, (end - start,))  # type: ignore[call-overload,no-any-return]
