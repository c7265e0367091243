"""Runs to analyse: a directory, an open `Run`, or a folder that another tool wrote."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tensortap.errors import RunError, TensortapError
from tensortap.layouts import layout, layouts
from tensortap.store import Run, RunDirectorySink, open_run
from tensortap.store.layout import rank_directories

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Named:
    """An open run, called otherwise than by where it lies: an imported one by its folder."""

    run: Run
    label: str


Source = str | os.PathLike[str] | Run | Named
"""Where a run comes from."""


@contextmanager
def opened(source: Source, layout_name: str | None = None) -> Iterator[Run]:
    """The run of a source; one that was opened or imported here is closed and removed again.

    A folder that is no run is imported into a temporary directory, by the layout of this name or
    by the first that can: `pt` last, since it takes any folder of .pt files by name only. Raises
    `RunError`, with what each layout said where none could read it.
    """
    if isinstance(source, Named):
        yield source.run
    elif isinstance(source, Run):
        yield source
    elif layout_name is not None or _is_foreign(Path(source)):
        names = _in_order() if layout_name is None else [layout_name]
        with (
            tempfile.TemporaryDirectory(prefix="tensortap-") as room,
            open_run(_imported(Path(source), Path(room), names)) as run,
        ):
            yield run
    else:
        _require_no_checkpoint(Path(source))
        with open_run(source) as run:
            yield run


def label(source: Source) -> str:
    """What a source is called in tables: its path as given."""
    if isinstance(source, Named):
        return source.label
    return str(source.path if isinstance(source, Run) else source)


def _is_foreign(path: Path) -> bool:
    """Is it a folder with something in it, and no run?"""
    try:
        return path.is_dir() and not rank_directories(path) and any(path.iterdir())
    except OSError:
        return False


def _in_order() -> list[str]:
    return sorted(layouts(), key=lambda name: (name == "pt", name))


def _imported(folder: Path, room: Path, names: Iterable[str]) -> Path:
    """`folder` as a run of its name below `room`, by the first layout that reads it."""
    if not folder.is_dir():
        raise RunError(f"There is no run and no folder at {folder}.")
    said = []
    for name in names:
        target = room / name / (folder.resolve().name or "imported")
        target.parent.mkdir()
        try:
            layout(name).load(folder, RunDirectorySink(target), lambda done: None)
        except (TensortapError, OSError) as failure:
            said.append(f"{name}: {failure}")
        else:
            return target
    _require_no_checkpoint(folder)
    raise RunError(f"{folder} is neither a run nor in a layout that is installed. {' '.join(said)}")


def _require_no_checkpoint(path: Path) -> None:
    """Raise `RunError` for weights of a model, which other commands look at."""
    holds = path.is_dir() and any(one for glob in _WEIGHTS for one in path.glob(glob))
    if holds or (path.is_file() and path.suffix in _SUFFIXES):
        raise RunError(
            f"{path} is a checkpoint, not a run: it holds weights and no captured tensors. "
            "tensortap scan MODEL judges the weights of one, tensortap diff-weights A B compares "
            "two; capture a run of it with tensortap.attach."
        )
