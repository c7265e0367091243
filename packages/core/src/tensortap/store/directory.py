"""Making, joining and replacing a run directory, when several processes do so at once."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tensortap.errors import CaptureError, RunError, RunExists
from tensortap.records import RunInfo
from tensortap.store.disk import create_file, is_locked, lock
from tensortap.store.documents import encode_document, encode_info, read_document
from tensortap.store.layout import RECORDS, RUN, rank_directories, rank_directory

_PATIENCE = 2.0
"""Seconds a joining process waits for run.json where it cannot be created atomically."""


def claim(path: Path, info: RunInfo, *, overwrite: bool) -> Path:
    """Create or join the run at `path` and return the new directory of this rank.

    The first process of a launch writes run.json, the others with its `launch_id` join. Raises
    `RunExists` for a run of another launch, unless `overwrite`: then the old run is renamed
    away, which is atomic, and deleted afterwards.
    """
    run = Path(os.path.realpath(path))
    run.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(run.parent):
        old = _make_room(run, info, overwrite=overwrite)
        run.mkdir(exist_ok=True)
        with suppress(FileExistsError):  # another machine was first; checked below
            create_file(run / RUN, encode_document(encode_info(info)))
    if old is not None:
        shutil.rmtree(old)
    if _launch_of(run) != info.launch_id:
        raise _exists(run)
    return _claim_rank(run, info)


def give_up(directory: Path) -> None:
    """Remove what `claim` made, for a run of one process in which nothing was recorded.

    Anything that is not part of the run stays, and so does the directory that holds it.
    """
    run = directory.parent
    with _one_at_a_time(run.parent):
        shutil.rmtree(directory)
        if not rank_directories(run):
            (run / RUN).unlink()
            with suppress(OSError):  # somebody put a file of theirs into it
                run.rmdir()


def _claim_rank(run: Path, info: RunInfo) -> Path:
    directory = run / rank_directory(info.rank)
    try:
        directory.mkdir()
    except FileExistsError:
        raise RunExists(
            f"{directory} is there already: rank {info.rank} of launch {info.launch_id} was "
            "captured before, or two processes believe they are that rank. Choose another path."
        ) from None
    return directory


@contextmanager
def _one_at_a_time(parent: Path) -> Iterator[None]:
    """Processes that share a file system with locks come here one after another."""
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _make_room(run: Path, info: RunInfo, *, overwrite: bool) -> Path | None:
    """Rename a foreign run away if that was asked for; returns where it went."""
    if not run.is_dir():
        if run.exists():
            raise RunExists(f"{run} is a file; a run is a directory. Choose another path.")
        return None
    if not (run / RUN).exists():
        _require_empty(run)
        return None
    if _launch_of(run) == info.launch_id:
        return None
    if not overwrite:
        raise _exists(run)
    if any(is_locked(ranked / RECORDS) for ranked in rank_directories(run).values()):
        raise RunExists(
            f"{run} is still being written by a live process; it was left alone. If that is an "
            "earlier tap of this process, detach it, or call tensortap.detach_all()."
        )
    away = run.with_name(f".{run.name}.replaced-{secrets.token_hex(4)}")
    run.rename(away)
    return away


def _require_empty(run: Path) -> None:
    """Never write into, or delete, a directory that is not ours."""
    foreign = [name for name in os.listdir(run) if not name.startswith(f".{RUN}.")]
    if foreign:
        raise RunExists(
            f"{run} holds {foreign[0]!r} but no {RUN}, so it is not a run and was left alone. "
            "Choose a new or empty directory."
        )


def _launch_of(run: Path) -> str | None:
    """The launch id of the run; `None` when run.json is damaged or unreadable.

    Waits for a run.json that is just being written by another process.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return str(read_document(run / RUN).get("launch_id"))
        except FileNotFoundError:
            raise CaptureError(f"{run / RUN} disappeared while the run was opened.") from None
        except RunError:
            if time.monotonic() > deadline or not _just_written(run / RUN):
                return None
        time.sleep(0.05)


def _just_written(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return abs(time.time() - path.stat().st_mtime) < _PATIENCE
    return False


def _exists(run: Path) -> RunExists:
    return RunExists(
        f"{run} holds a run of another launch. Choose another path, or replace it: "
        "overwrite=True (tensortap import: --overwrite)."
    )
