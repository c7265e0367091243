"""`Layout`: export a run to, or import it from, a foreign or older file layout.

Core holds the protocol and one plain layout, `pt`: one `torch.load(weights_only=True)` file a
tensor. Others come with the integration whose predecessor wrote them, as entry points of the
group `tensortap.layouts`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from tensortap.errors import ConfigError, RunError, RunExists
from tensortap.plugins import LAYOUTS, load_plugin
from tensortap.records import RunInfo
from tensortap.sinks import TensorSink
from tensortap.store import Run, RunDirectorySink

Progress = Callable[[int], None]
"""Called with the number of records done so far."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What an export or import did; `skipped` says why per record that could not go."""

    records: int
    files: int
    skipped: tuple[str, ...] = ()


class Layout(Protocol):
    """One foreign file layout; a subset of a run is exported by selecting names.

    One that is only imported says so: `exports = False`, and its `export` raises `NotSupported`.
    """

    name: str

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """Write the selected records of `run` below the new folder `out`."""

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """Read `folder` into an unopened sink; opens and closes it."""


def layouts() -> dict[str, Layout]:
    """Every layout installed, by name; a broken plugin raises `PluginError`."""
    found: dict[str, Layout] = {"pt": importlib.import_module("tensortap.pt_layout").PtLayout()}
    for entry in entry_points(group=LAYOUTS):
        found[entry.name] = load_plugin(entry)
    return found


def layout(name: str) -> Layout:
    """The layout called `name`; raises `ConfigError` listing the known ones."""
    known = layouts()
    if name not in known:
        raise ConfigError(f"There is no layout {name!r}; installed: {_listed(known)}.")
    return known[name]


def _listed(known: Mapping[str, Layout]) -> str:
    """All names; of those that cannot be written, that they are only imported."""
    words = {
        name: f"{name!r}" if getattr(found, "exports", True) else f"{name!r} (only imported)"
        for name, found in known.items()
    }
    return ", ".join(words[name] for name in sorted(words))


def new_folder(path: Path) -> Path:
    """Make `path`; raises `RunExists` when something is there already."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not path.is_dir() or any(path.iterdir()):
            raise RunExists(f"{path} exists; choose another --out, or remove it.") from None
    except OSError as error:
        raise RunError(f"{path} cannot be made: {error.strerror}.") from error
    return path


def sinks_of_ranks(
    sink: TensorSink, ranks: Iterable[int]
) -> list[tuple[TensorSink, tuple[int, ...]]]:
    """Unopened sinks for an import, each with the ranks whose records it takes.

    A run directory's sink writes a single rank, so every rank gets a twin with the same options;
    any other sink takes them all.
    """
    if isinstance(sink, RunDirectorySink):
        return [(copy(sink), (rank,)) for rank in ranks]
    return [(sink, tuple(ranks))]


@contextmanager
def filling(sink: TensorSink, info: RunInfo) -> Iterator[None]:
    """Open a sink for an import, and close it; a run whose import stops half-way says so."""
    sink.open(info)
    try:
        yield
    except BaseException as failure:
        if isinstance(sink, RunDirectorySink):
            sink.mark_incomplete(f"the import stopped: {failure}")
        raise
    finally:
        sink.close()
