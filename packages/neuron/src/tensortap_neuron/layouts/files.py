"""Reading files that nobody vouches for: tensors and plain data, never code."""

from __future__ import annotations

import os
import stat
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import RunError
from tensortap.store.dtypes import STORED, dtype_name
from tensortap.store.layout import read_small
from tensortap.store.lines import parse_object

MOST_JSON = 64 << 20
"""Bytes of a document; that of a real capture has a few megabytes."""
MOST_PICKLE = 64 << 20
"""Bytes of the part of a .pt file that is not tensors."""


class Inert:
    """Stands for an object of a class that is not imported: keeps its state, does nothing."""

    def __init__(self, *arguments: object, **named: object) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_tensor(path: Path) -> torch.Tensor:
    """The tensor in a file, mapped where the file allows it; raises `RunError` naming the file."""
    found = _loaded(path, objects=False)
    if not isinstance(found, torch.Tensor):
        raise _broken(path, f"it holds a {type(found).__name__}, not a tensor")
    if found.layout != torch.strided or found.is_quantized or found.device.type != "cpu":
        raise _broken(path, f"a {found.layout} tensor on {found.device} is not served")
    if dtype_name(found.dtype) not in STORED:
        raise _broken(path, f"dtype {dtype_name(found.dtype)} is not served")
    return found.detach().resolve_conj().resolve_neg()


def read_objects(path: Path) -> Mapping[str, Any]:
    """A dictionary in a .pt file; objects of classes that torch refuses become `Inert`.

    Raises `RunError` naming the file. Before torch 2.6 a file with such objects is refused.
    """
    found = _loaded(path, objects=True)
    if not isinstance(found, dict):
        raise _broken(path, f"it holds a {type(found).__name__}, not a dictionary")
    return {str(key): value for key, value in found.items()}


def _loaded(path: Path, *, objects: bool) -> Any:
    """What a file holds; `objects`: also of classes that torch refuses, as `Inert`."""
    _require_regular(path)
    try:
        mapped = zipfile.is_zipfile(path)
        _require_small_pickle(path, mapped)
        allowed = _inert(path) if objects and mapped else nullcontext()
        with allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice is for whoever wrote the file.
            return torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    except Exception as failure:
        # Whatever a hostile or damaged file makes torch raise, it is this file that is wrong.
        raise _broken(path, failure) from failure


def _inert(path: Path) -> AbstractContextManager[Any]:
    """Lets the classes that a file names be `Inert` while it is read."""
    unsafe: Any = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    allow: Any = getattr(torch.serialization, "safe_globals", None)
    if unsafe is None or allow is None or torch.__version__.startswith("2.5."):
        return nullcontext()  # torch 2.5 allows classes by themselves only, not by a name.
    return allow([(Inert, name) for name in unsafe(path)])  # type: ignore[no-any-return]


def _require_regular(path: Path) -> None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise RunError(f"{path} is not a regular file.")
    except OSError as failure:
        raise RunError(f"{path} cannot be read: {failure.strerror}.") from failure


def _require_small_pickle(path: Path, zipped: bool) -> None:
    if not zipped:
        return
    with zipfile.ZipFile(path) as archive:
        sizes = [e.file_size for e in archive.infolist() if e.filename.endswith("/data.pkl")]
    if sum(sizes) > MOST_PICKLE:
        raise ValueError(f"it describes its tensors in {sum(sizes):,} bytes")


def _broken(path: Path, failure: object) -> RunError:
    reason = str(failure).partition("\n")[0].strip()[:200] or type(failure).__name__
    if isinstance(failure, EOFError) or "Weights only load failed" in reason:
        reason = _OBJECTS if " global" in str(failure).lower() else _DAMAGED
    return RunError(f"{path} cannot be read: {reason.rstrip('.')}.")


_OBJECTS = "it holds objects that only code could rebuild, and code in a file is never run"
_DAMAGED = "it is damaged, or no file of torch.save"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises `RunError` naming the file."""
    try:
        return parse_object(read_small(path, MOST_JSON))
    except (OSError, ValueError) as failure:
        raise RunError(f"{path} cannot be read: {failure}.") from failure


def cause(failure: RunError, path: Path) -> str:
    """What an error says beside the name of its file."""
    return str(failure).removeprefix(f"{path} ").rstrip(".")
