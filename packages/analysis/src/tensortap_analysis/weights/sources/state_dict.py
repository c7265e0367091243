"""Files of `torch.save`, read with torch's restricted unpickler and mapped into memory."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tensortap_analysis.weights.sources.harmless import harmless
from tensortap_analysis.weights.sources.mapped import kept, placed, repeats
from tensortap_analysis.weights.sources.source import (
    CheckpointError,
    Entry,
    Listing,
    Skipped,
    regular,
)

_CASELESS = re.IGNORECASE
_WRAPPERS = ("model", "state_dict", "module", "model_state_dict")
"""Keys below which training scripts keep the weights, beside the optimizer and the rest."""


_NEITHER = (
    "is no file of torch.save, or was cut off. Checkpoints are .safetensors files, files of "
    "torch.save, or folders of these."
)


def listing(path: Path) -> Listing:
    """The tensors of a state dict, also below `model`, `state_dict` or `module`, dots between.

    Tensors that share memory are listed once. Raises `CheckpointError` for a file that is broken
    or would need code to be run.
    """
    found = regular(path)
    content, mapped = _loaded(found, path)
    skipped: list[Skipped] = []
    try:
        tensors = list(_distinct(_state(content, skipped, path), skipped))
    except RecursionError:
        raise CheckpointError(f"{path} contains itself, or is nested too deep.") from None
    load = placed(found, [tensor for _, tensor in tensors]) if mapped else kept
    entries = (Entry(name, tuple(one.shape), one.dtype, load(one)) for name, one in tensors)
    notes = () if mapped else (f"{path.name} has torch's old format: it is in memory as a whole",)
    return Listing(tuple(entries), (found,), tuple(skipped), notes=notes)


def _loaded(path: Path, asked: Path) -> tuple[Any, bool]:
    """What is in the file, and whether it is mapped. Runs no code from it."""
    try:
        mapped = _is_archive(path)
        with harmless(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Advice on pickles; what is wrong is said below.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as failure:
        raise CheckpointError(f"{asked} {_reason(failure)}") from None
    return content, mapped


def _is_archive(path: Path) -> bool:
    """Does it begin as a zip file does, and torch's files since 1.6?"""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(failure: Exception) -> str:
    """What torch's pages of advice mean for somebody who wants to look at weights."""
    text = str(failure)
    if found := re.search(r"(?:unsupported global:?|unsupported) GLOBAL (\S+)", text, _CASELESS):
        return (
            f"needs {found[1]} to be rebuilt, which could run code; only tensors are read. "
            "Save the model's state_dict() alone, or as safetensors."
        )
    if "WeightsUnpickler error:" in text:
        said = text.split("WeightsUnpickler error:")[1].strip().splitlines()[0]
        if said.startswith("Unsupported operand"):
            return _NEITHER
        return f"is not read, for only tensors are: {said}"
    if isinstance(failure, (KeyError, IndexError, EOFError, UnicodeDecodeError)):
        return _NEITHER
    first = (text.splitlines() or [""])[0]
    return f"is no whole file of torch.save: {type(failure).__name__} {first}"


def _state(content: Any, skipped: list[Skipped], path: Path) -> Mapping[str, Any]:
    """The dictionary of weights; what lies beside it is skipped, and said."""
    if isinstance(content, torch.Tensor):
        return {path.stem: content}
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
    if wrapper is None or any(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    for key, value in content.items():
        if key != wrapper and any(True for _ in _Walk([]).tensors(value, str(key))):
            skipped.append(Skipped(str(key), f"lies beside {wrapper!r}: no weights of the model"))
    return _state(content[wrapper], skipped, path)


class _Walk:
    """Goes through containers once each: of few that hold each other, paths can be endless.

    A container that holds tensors and is met again is added to `skipped`.
    """

    def __init__(self, skipped: list[Skipped]) -> None:
        self._skipped = skipped
        # By identity: its first name, and whether it holds tensors; None while inside of it.
        self._met: dict[int, tuple[str, bool | None]] = {}

    def tensors(self, value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor in `value` and its name, dots between keys and indices."""
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)):
            if id(value) in self._met:
                self._again(value, name)
                return
            self._met[id(value)] = (name, None)
            holds = False
            for key, below in _items(value):
                for found in self.tensors(below, f"{name}.{key}" if name else str(key)):
                    holds = True
                    yield found
            self._met[id(value)] = (name, holds)

    def _again(self, value: Any, name: str) -> None:
        first, holds = self._met[id(value)]
        if holds is None:
            raise RecursionError
        if holds:
            self._skipped.append(Skipped(name, f"the same as {first}: counted there"))


def _items(container: Any) -> Iterable[tuple[Any, Any]]:
    return container.items() if isinstance(container, Mapping) else enumerate(container)


def _distinct(
    state: Mapping[str, Any], skipped: list[Skipped]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each place in memory once; the other names of it are skipped, and said."""
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in _Walk(skipped).tensors(state, ""):
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else tensor.layout
            skipped.append(Skipped(name, f"a {kind} tensor of torch is not read"))
            continue
        if repeats(tensor):
            stored = tensor.untyped_storage().nbytes() // tensor.itemsize
            skipped.append(Skipped(name, f"repeats {stored:,} stored values; not read"))
            continue
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        same = first.setdefault(place, name) if tensor.numel() else name
        if same != name:
            skipped.append(Skipped(name, f"tied to {same}: the same memory, counted there"))
            continue
        yield name, tensor
