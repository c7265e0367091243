"""Compile the kernel once per user and machine type, safely among many ranks starting at once."""

from __future__ import annotations

import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensortap.native.binding import Library, StaleLibrary
from tensortap.native.build import CompileError, compile_library, digest


class Unavailable(Exception):
    """No kernel could be compiled, kept or loaded; the text gives the reasons."""


def library() -> Library:
    """The cached kernel, compiled if need be, from the first directory that serves."""
    problems = []
    for directory in _directories():
        try:
            return _from(directory)
        except CompileError as problem:
            raise Unavailable(str(problem)) from problem
        except (OSError, StaleLibrary) as problem:
            problems.append(str(problem))
    raise Unavailable("; ".join(problems))


def _directories() -> list[Path]:
    """The user's cache, and for users without a writable home a private temporary directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    temporary = Path(tempfile.gettempdir()) / f"tensortap-{owner}"
    return [Path(cache) / "tensortap", temporary] if os.path.isabs(cache) else [temporary]


def _name() -> str:
    """A home directory may be shared by machines that cannot run each other's code."""
    libc = "-".join(platform.libc_ver()) or "libc"
    return f"stats-{digest()}-{sys.platform}-{platform.machine()}-{libc}.so"


def _from(directory: Path) -> Library:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(directory)
    path = directory / _name()
    if not path.exists():
        with _locked(directory / f"{path.name}.lock"):
            if not path.exists():
                compile_library(path)
    try:
        return Library(path)
    except (OSError, StaleLibrary):
        # Damaged, or from a machine that looks like this one and is not: once more, from source.
        compile_library(path)
        return Library(path)


def _check_private(directory: Path) -> None:
    """Code is loaded from here: nobody else may be able to put any."""
    found = directory.lstat()
    foreign = hasattr(os, "getuid") and found.st_uid != os.getuid()
    if foreign or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise PermissionError(f"{directory} is not a directory that only this user can write")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process compiles, the others wait; without a lock they would all compile, harmlessly."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # Some network file systems have no locks; the file appears by an atomic rename anyway.
            yield
        else:
            yield
