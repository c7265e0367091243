"""Writing that survives: whole writes, atomic replacement, fsync, and the writer's lock."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

READ_SAFELY = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Open for reading, but neither through a link nor waiting for the other end of a FIFO."""


def write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte, or raise `OSError`; `os.write` alone may stop half-way."""
    view = memoryview(data)
    while len(view):
        # Linux writes at most 2 GiB - 4 KiB at once.
        view = view[os.write(descriptor, view[: 1 << 30]) :]


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable, where the system can do that."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, *, sync: bool) -> None:
    """Write `path` so that a reader sees the old content or the new, never a part."""
    temporary = _write_temporary(path, content, sync=sync)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink()
        raise


def create_file(path: Path, content: bytes) -> None:
    """Write a new `path` atomically; raises `FileExistsError` when somebody was first."""
    temporary = _write_temporary(path, content, sync=True)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # File systems without hard links: exclusive all the same, a reader may have to retry.
        with open(path, "xb") as file:
            file.write(content)
    finally:
        temporary.unlink()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A place beside `path` for a new folder, which replaces `path` when the block succeeds.

    Whatever raises leaves an older folder as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_temporary(path: Path, content: bytes, *, sync: bool) -> Path:
    name = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with open(name, "xb", buffering=0) as file:
            write_all(file.fileno(), content)
            if sync:
                os.fsync(file.fileno())
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    return name


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Take the exclusive lock of an open file or directory; false when another holds it.

    The lock goes with the open file, so a killed process cannot leave it behind. Where the
    system or file system has no locks the answer is true: there is nothing to respect.
    """
    return sys.platform == "win32" or _flock(descriptor, fcntl.LOCK_EX, wait)


def is_locked(path: Path) -> bool:
    """Does a live process hold the lock of this file? False when it is absent.

    Asked with a shared lock, so that several who ask at once do not see each other.
    """
    if sys.platform == "win32":
        return False
    try:
        descriptor = os.open(path, READ_SAFELY)
    except OSError:
        return False
    try:
        return not _flock(descriptor, fcntl.LOCK_SH, wait=False)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True
