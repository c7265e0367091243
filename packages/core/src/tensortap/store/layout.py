"""Names of the files of a run directory, and the only ways in which they are opened.

Everything in a run directory is data that somebody else may have written. No path is built
from the contents of a file without a check, links are not followed below the run, and nothing
but regular files is opened (a FIFO would block for ever).
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from tensortap.errors import RunCorrupt, RunError
from tensortap.store.disk import READ_SAFELY

SCHEMA = 1
"""Version of the run directory's layout; a reader refuses one it does not know."""

RUN = "run.json"
RANK = "rank.json"
RECORDS = "records.jsonl"
INDEX = "index.bin"
NAMES = "names.jsonl"
COVERAGE = "coverage.json"

_RANK_DIRECTORY = re.compile(r"rank(\d{5,9})")
_SHARD = re.compile(r"shard-(\d{5,9})\.safetensors")


def rank_directory(rank: int) -> str:
    """`rank00003`."""
    return f"rank{rank:05d}"


def shard_name(number: int) -> str:
    """`shard-00003.safetensors`."""
    return f"shard-{number:05d}.safetensors"


def shard_number(name: str) -> int:
    """The number in a shard's name; raises `ValueError` for another name."""
    match = _SHARD.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a shard")
    return int(match.group(1))


def is_shard(name: str) -> bool:
    """Is this the name of a shard (and therefore not a path that leads anywhere else)?"""
    return _SHARD.fullmatch(name) is not None


def shards_of(directory: Path) -> list[str]:
    """Names of the shard files of a rank directory, in order of their number."""
    return sorted(filter(is_shard, os.listdir(directory)), key=shard_number)


def rank_directories(run: Path) -> dict[int, Path]:
    """Rank to its directory, in rank order; links and files of that name are left out."""
    found: dict[int, Path] = {}
    for entry in os.scandir(run):
        match = _RANK_DIRECTORY.fullmatch(entry.name)
        rank = int(match.group(1)) if match else -1
        if entry.name == rank_directory(rank) and entry.is_dir(follow_symlinks=False):
            found[rank] = run / entry.name
    return dict(sorted(found.items()))


def require_run(path: Path) -> dict[int, Path]:
    """The rank directories of a run; raises `RunError` when `path` is none."""
    try:
        directories = rank_directories(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"There is no run at {path}.") from None
    except OSError as failure:
        raise RunError(f"{path} cannot be read: {failure.strerror}.") from failure
    if not directories:
        raise RunError(
            f"{path} is not a run: no rank has a directory in it. If another tool, or "
            "`tensortap export`, wrote it, `tensortap import` makes a run of it."
        )
    return directories


def open_regular(path: Path, flags: int = READ_SAFELY) -> int:
    """Open a regular file of a run, not through a link; the caller closes the descriptor.

    Raises `FileNotFoundError` when it is absent, `RunCorrupt` when it is anything else than a
    regular file, `RunError` when it may not be read.
    """
    try:
        descriptor = os.open(path, flags | READ_SAFELY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except OSError as failure:
        if path.is_symlink() or not path.is_file():
            raise RunCorrupt(f"{path} is not a regular file; a run holds no links.") from failure
        raise RunError(f"{path} cannot be opened: {failure.strerror}.") from failure
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunCorrupt(f"{path} is not a regular file; a run holds no links.")
    return descriptor


def read_small(path: Path, limit: int = 256 << 20) -> bytes:
    """The whole content of a small file; raises as `open_regular`, and beyond `limit` bytes."""
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise RunCorrupt(f"{path} has {size} bytes; more than {limit} cannot be right.")
        return file.read(limit)
