"""A folder of runs, one a mode: what `tensortap modes capture` writes and `compare` reads."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensortap.errors import RunError
from tensortap.store import Run, open_run
from tensortap.store.layout import RUN
from tensortap_hf import modes
from tensortap_hf.modes import Mode

COMMAND = "tensortap modes capture"


@dataclass(frozen=True, slots=True)
class ModeRun:
    """A run, and what it says of its mode."""

    name: str
    """Of its folder: the mode, with its family where two modes have one name."""
    run: Run
    mode: str
    family: str
    basis: str
    equals: tuple[str, ...]

    @classmethod
    def of(cls, name: str, run: Run) -> ModeRun:
        """Read from the run's metadata; a run that was captured otherwise is native."""
        told = run.info.metadata.get("mode")
        said: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
        return cls(
            name,
            run,
            str(run.info.mode or said.get("name") or name),
            str(said.get("family", "")),
            str(said.get("basis", "native")),
            tuple(map(str, said.get("equals", ()))),
        )

    def must_equal(self, other: ModeRun) -> bool:
        """Does either of the two declare that they are bitwise equal?"""
        declared = self.mode in other.equals or other.mode in self.equals
        return declared and self.family == other.family and self._made_of == other._made_of

    @property
    def model(self) -> str:
        """Where the model came from."""
        return str(self.run.info.metadata.get("model", "?"))

    @property
    def _made_of(self) -> list[Any]:
        """What the numbers of a mode follow from."""
        told = self.run.info.metadata
        return [told.get(key) for key in ("weights", "inputs", "calibration", "exclude")]


def folders(chosen: Sequence[Mode]) -> list[str]:
    """The folder of each mode: its name, after its family's where two have one name."""
    names = [mode.name for mode in chosen]
    return [
        mode.name if names.count(mode.name) == 1 else f"{mode.family}-{mode.name}"
        for mode in chosen
    ]


@contextmanager
def opened(folder: Path, names: Iterable[str] | None = None) -> Iterator[list[ModeRun]]:
    """The runs in a folder, in the order they were captured in; raises `RunError` for none.

    With `names`, only the runs in folders of these names.
    """
    # A capture that was killed leaves a folder whose name begins with a dot.
    found = sorted(path.parent for path in folder.glob(f"[!.]*/{RUN}"))
    wanted = [path for path in found if names is None or path.name in names]
    if not wanted:
        raise RunError(f"{folder} holds no runs of modes; `{COMMAND} … --out {folder}` makes them.")
    with ExitStack() as stack:
        runs = [ModeRun.of(path.name, stack.enter_context(open_run(path))) for path in wanted]
        yield sorted(runs, key=lambda one: (one.run.info.created, one.name))


def find(name: str, runs: Sequence[ModeRun], folder: Path) -> ModeRun:
    """The run of a mode; raises `RunError` that names the command which makes it."""
    spelled = name.replace("/", "-", 1)
    for one in runs:
        if name in (one.name, f"{one.family}/{one.mode}") or spelled == one.name:
            return one
    of_mode = [one for one in runs if one.mode == name]
    if len(of_mode) == 1:
        return of_mode[0]
    if of_mode:
        spelled = " or ".join(f"{one.family}/{one.mode}" for one in of_mode)
        raise RunError(f"{folder} has several runs of mode {name!r}; write {spelled}.")
    there = ", ".join(one.name for one in runs)
    if name.rpartition("/")[2] not in modes.names():
        raise RunError(f"There is no mode {name!r}; {folder} has {there}.")
    raise RunError(
        f"{folder} has no run of mode {name!r}; it has {there}. This makes it: "
        f"{_command(name, runs, folder)}"
    )


def _command(name: str, runs: Sequence[ModeRun], folder: Path) -> str:
    """The capture that is missing, with the options of those that are there."""
    known = (one.run.info.metadata.get("command") for one in runs)
    given = next((command for command in known if isinstance(command, list)), ["MODEL"])
    return f"{COMMAND} {shlex.join([*map(str, given), '--modes', name, '--out', str(folder)])}"
