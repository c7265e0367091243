"""Reading tensors of a `torch.save` file from mappings of their own.

`torch.load(mmap=True)` maps the whole file once, and what has been looked at stays in memory as
long as any tensor lives. A scan looks at each tensor once, so each is mapped when it is wanted.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tensortap.store.mapping import map_bytes

Loader = Callable[[], torch.Tensor]


def repeats(tensor: torch.Tensor) -> bool:
    """Has it more values than are stored? Writing it out could take any amount of memory."""
    return tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes()


def kept(tensor: torch.Tensor) -> Loader:
    """Serve a tensor from where it is."""

    def load() -> torch.Tensor:
        return tensor.detach()

    return load


def placed(path: Path, tensors: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], Loader]:
    """How to read each of `tensors`, which `torch.load` has mapped from `path`, afresh.

    Serves them from the mapping there is where it cannot be told how they lie.
    """
    start = _start(path, tensors)
    if start is None:
        return kept
    return lambda tensor: _loader(path, start, tensor) if tensor.numel() else kept(tensor)


def _loader(path: Path, start: int, tensor: torch.Tensor) -> Loader:
    storage, dtype = tensor.untyped_storage(), tensor.dtype
    begin = storage.data_ptr() - start
    end = begin + storage.nbytes()
    shape, stride, offset = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()

    def load() -> torch.Tensor:
        values = typed(map_bytes(path, begin, end), dtype)
        return values.as_strided(shape, stride, values.storage_offset() + offset)

    return load


def typed(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as numbers, without a copy where they are aligned."""
    aligned = raw.storage_offset() % dtype.itemsize == 0
    return (raw if aligned else raw.clone()).view(dtype)


def _start(path: Path, tensors: Sequence[torch.Tensor]) -> int | None:
    """The address at which `torch.load` mapped the file; `None` where that is not certain.

    It is the one beginning of a page from which all storages lie where the file has records.
    """
    file: Any = torch._C.PyTorchFileReader(str(path))
    names = file.get_all_records()
    if "byteorder" in names and file.get_record("byteorder").decode() != sys.byteorder:
        return None  # Torch has swapped the bytes in its mapping; in the file they are not.
    offsets = {file.get_record_offset(name) for name in names if name.startswith("data/")}
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    starts = {min(places) - offset for offset in offsets} if places else set()
    fitting = [
        start
        for start in starts
        if start % mmap.PAGESIZE == 0 and all(place - start in offsets for place in places)
    ]
    return fitting[0] if len(fitting) == 1 else None
