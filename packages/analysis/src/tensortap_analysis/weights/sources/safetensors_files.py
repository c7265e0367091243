"""Tensors of safetensors files, mapped one by one: no more memory than is being looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tensortap.errors import TensortapError
from tensortap.store.dtypes import STORED
from tensortap.store.mapping import map_bytes
from tensortap_analysis.weights.sources.mapped import typed
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
        places = _places(found)
    except (SafetensorError, OSError, ValueError, RuntimeError) as failure:
        raise CheckpointError(f"{path} is no whole safetensors file: {_short(failure)}.") from None
    return [
        Entry(
            name, shape, _DTYPES.get(word),
            _loader(found, name, places[name], shape, _DTYPES.get(word)), stored=word,
        )
        for name, (shape, word) in zip(names, facts, strict=True)
    ]  # fmt: skip


def in_layers(name: str) -> list[tuple[int, str]]:
    """Sorting key by which `layers.2` comes before `layers.10`; files do not keep an order."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in _DIGITS.split(name)]


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor begins and ends in a file whose header has been found to be whole.

    Read once: opening the file for each tensor parses the header as often, and mixtures of experts
    have thousands in one.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    start = 8 + length
    return {
        name: (start + facts["data_offsets"][0], start + facts["data_offsets"][1])
        for name, facts in header.items()
        if name != "__metadata__"
    }


def _loader(
    path: Path, name: str, place: tuple[int, int], shape: tuple[int, ...], dtype: torch.dtype | None
) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        if dtype is None:
            raise CheckpointError(f"{path}: {name!r} is of a dtype that torch does not have.")
        if place[0] == place[1]:
            return torch.empty(shape, dtype=dtype)
        # A mapping of its own: its pages leave the process with the tensor.
        try:
            return typed(map_bytes(path, *place), dtype).view(shape)
        except (TensortapError, OSError, ValueError, RuntimeError) as failure:
            raise CheckpointError(f"{path}: {name!r} cannot be read: {_short(failure)}.") from None

    return load


def _short(failure: Exception) -> str:
    lines = str(failure).splitlines() or [type(failure).__name__]
    return lines[0].rstrip(".")
