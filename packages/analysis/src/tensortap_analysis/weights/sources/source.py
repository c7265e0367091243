"""`Source`: the weights of one checkpoint or module, and what is in it beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import TensortapError
from tensortap_analysis.weights.weight import Kind, Weight

Config = Mapping[str, Any]
"""The `config.json` beside a checkpoint; empty where there is none."""
Identity = tuple[tuple[str, int, int, int], ...]
"""Path, inode, bytes and time of modification (ns) of each file."""
_LONGEST_TEXT = 1024


class CheckpointError(TensortapError):
    """A checkpoint that cannot be read; names the file, what is wrong with it, and what to do."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """What is not in a result, and why; `method` where only one method left it out."""

    name: str
    reason: str
    method: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as a file or module lists it: not yet known what it is, not yet read.

    `dtype` is `None` where torch has none like it, and `stored` says what it is called there.
    `transposed` is set where the place it comes from knows that it lies [in, out]. `decoded`:
    `load` computes the values from codes and scales. `kind` is set where the module is at hand.
    The rest as in `Weight`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    load_parts: Callable[[], Iterator[torch.Tensor]] | None = field(
        default=None, repr=False, compare=False
    )
    stored: str = ""
    transposed: bool = False
    decoded: bool = False
    kind: Kind | None = None
    note: str | None = None

    @property
    def numel(self) -> int:
        """How many values."""
        return math.prod(self.shape)

    def renamed(self, name: str) -> Entry:
        """The same tensor under another name."""
        return replace(self, name=name)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a reader of one kind of checkpoint gives: entries, what it left out, what it read."""

    entries: tuple[Entry, ...]
    files: tuple[Path, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    config: Config = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """What can be scanned, in the order of the checkpoint; nothing is read before it is asked for.

    `identity` changes when a file does, or another one is read; it is empty for a live module.
    `notes` are sentences that hold for all of it.
    """

    label: str
    weights: tuple[Weight, ...]
    skipped: tuple[Skipped, ...] = ()
    identity: Identity = ()
    notes: tuple[str, ...] = ()


def identity_of(files: tuple[Path, ...]) -> Identity:
    """Of each file, whole: two checkpoints may have files of one name, size and time."""
    found = ((path.resolve(), path.stat()) for path in sorted(set(files)))
    return tuple((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found)


def regular(path: Path) -> Path:
    """`path`, or the file a link leads to; raises `CheckpointError` for anything but a file."""
    try:
        found = path.resolve(strict=True)
    except (OSError, RuntimeError) as failure:
        raise CheckpointError(f"{path} cannot be found.") from failure
    if not found.is_file():
        raise CheckpointError(f"{path} is not a file.")
    return found


def short_text(path: Path) -> str:
    """The one word or name that a small file holds; raises `CheckpointError` for anything else."""
    with regular(path).open("rb") as file:
        content = file.read(_LONGEST_TEXT + 1)
    try:
        if len(content) > _LONGEST_TEXT:
            raise ValueError("it is too long")
        return content.decode().strip()
    except ValueError as failure:
        raise CheckpointError(f"{path} holds no name: {failure}.") from None


def plain_name(name: object, where: Path) -> str:
    """`name` if it is that of a file in the same folder; a path in an index leads elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0:"):
        raise CheckpointError(f"{where} names the file {name!r}; only files beside it are read.")
    return name
