"""Tensors of safetensors files, mapped one by one: no more memory than is being looked at."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tensortap.store.dtypes import STORED
from tensortap_analysis.weights.sources.source import CheckpointError, Entry, regular

_DIGITS = re.compile(r"(\d{1,18})")
_DTYPES = {kind.word: kind.torch for kind in STORED.values() if not kind.trailing}
_DTYPES["U8"] = torch.uint8


def entries(path: Path) -> list[Entry]:
    """The tensors of one file, layer by layer (2 before 10); reads its header only.

    Raises `CheckpointError` for a header that is too long, no JSON, or whose tensors overlap,
    leave gaps or lie beyond the end of the file.
    """
    found = regular(path)
    try:
        with safe_open(found, framework="pt") as file:
            names = sorted(file.keys(), key=in_layers)
            slices = [file.get_slice(name) for name in names]
            facts = [(tuple(one.get_shape()), str(one.get_dtype())) for one in slices]
    except (SafetensorError, OSError, ValueError, RuntimeError) as failure:
        raise CheckpointError(f"{path} is no whole safetensors file: {_short(failure)}.") from None
    return [
        Entry(name, shape, _DTYPES.get(word), _loader(found, name), stored=word)
        for name, (shape, word) in zip(names, facts, strict=True)
    ]


def in_layers(name: str) -> list[tuple[int, str]]:
    """Sorting key by which `layers.2` comes before `layers.10`; files do not keep an order."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in _DIGITS.split(name)]


def _loader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        # A mapping of its own: its pages leave the process with the tensor.
        try:
            with safe_open(path, framework="pt") as file:
                values: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as failure:
            raise CheckpointError(f"{path}: {name!r} cannot be read: {_short(failure)}.") from None
        aligned = values.data_ptr() % values.dtype.itemsize == 0
        return values if aligned else values.clone()

    return load


def _short(failure: Exception) -> str:
    lines = str(failure).splitlines() or [type(failure).__name__]
    return lines[0].rstrip(".")
