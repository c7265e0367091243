"""Runs to analyse: a directory, an open `Run`, or a folder that another tool wrote."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensortap.errors import RunError, TensortapError
from tensortap.layouts import layouts
from tensortap.store import Run, RunDirectorySink, open_run
from tensortap.store.layout import rank_directories

Source = str | os.PathLike[str] | Run
"""Where a run comes from."""


@contextmanager
def opened(source: Source) -> Iterator[Run]:
    """The run of a source; one that was opened or imported here is closed and removed again.

    A folder that is no run is tried with every layout installed, and imported into a temporary
    directory. Raises `RunError`, with what each layout said where none could read it.
    """
    if isinstance(source, Run):
        yield source
    elif _is_foreign(Path(source)):
        with (
            tempfile.TemporaryDirectory(prefix="tensortap-") as room,
            open_run(_imported(Path(source), Path(room))) as run,
        ):
            yield run
    else:
        with open_run(source) as run:
            yield run


def label(source: Source) -> str:
    """What a source is called in tables: its path as given."""
    return str(source.path if isinstance(source, Run) else source)


def _is_foreign(path: Path) -> bool:
    """Is it a folder with something in it, and no run?"""
    try:
        return path.is_dir() and not rank_directories(path) and any(path.iterdir())
    except OSError:
        return False


def _imported(folder: Path, room: Path) -> Path:
    """`folder` as a run below `room`, by the first layout that reads it."""
    said = []
    for name, layout in layouts().items():
        try:
            layout.load(folder, RunDirectorySink(room / name), lambda done: None)
        except TensortapError as failure:
            said.append(f"{name}: {failure}")
            shutil.rmtree(room / name, ignore_errors=True)
        else:
            return room / name
    raise RunError(f"{folder} is neither a run nor in a layout that is installed. {' '.join(said)}")
