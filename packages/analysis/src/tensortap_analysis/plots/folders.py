"""Runs to draw from: a run directory, or a folder that another tool wrote, imported for a while."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensortap.errors import RunError, TensortapError
from tensortap.layouts import layout, layouts
from tensortap.store import Run, RunDirectorySink, open_run
from tensortap.store.layout import rank_directories


@contextmanager
def opened(path: Path, layout_name: str | None = None) -> Iterator[Run]:
    """The run at `path`; a foreign folder is imported into a temporary run.

    Without a layout's name each one is tried, `pt` last: it takes any folder of .pt files by
    name only. Raises `RunError` saying what each one found wrong.
    """
    if layout_name is None and _is_run(path):
        with open_run(path) as run:
            yield run
        return
    if not path.is_dir():
        raise RunError(f"There is no run and no folder at {path}.")
    with tempfile.TemporaryDirectory(prefix="tensortap-plot-") as folder:
        names = [layout_name] if layout_name else _in_order()
        with open_run(_imported(path, Path(folder), names)) as run:
            yield run


def _is_run(path: Path) -> bool:
    try:
        return bool(rank_directories(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _in_order() -> list[str]:
    return sorted(layouts(), key=lambda name: (name == "pt", name))


def _imported(path: Path, folder: Path, names: list[str]) -> Path:
    """A run below `folder`, made by the first layout that can; its name is that of `path`."""
    refused = []
    for name in names:
        target = folder / name / (path.resolve().name or "imported")
        target.parent.mkdir()
        try:
            layout(name).load(path, RunDirectorySink(target), lambda done: None)
        except (TensortapError, OSError) as failure:
            refused.append(f"{name}: {failure}")
        else:
            return target
    raise RunError(f"{path} is no run, and no layout can read it. " + " ".join(refused))
