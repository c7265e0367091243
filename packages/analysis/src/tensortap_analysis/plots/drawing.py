"""`Drawing`: what the pictures of one run have in common: where they go, and what is not drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tensortap.errors import NotSupported, RunError
from tensortap.store import Run
from tensortap_analysis.captured.moments import Captured
from tensortap_analysis.captured.words import format_of
from tensortap_analysis.plots.files import picture
from tensortap_analysis.plots.survey import Survey

Progress = Callable[[str], None]
"""Called with what is drawn next."""


@dataclass(slots=True)
class Plotted:
    """What was written; `left_out` says what could not be drawn for want of captured values,
    `failed` what could not be read, `problems` what the runs themselves lack.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Drawing:
    """Pictures of one run as they are drawn; `latest` is every tensor at its last step."""

    run: Run
    called: str
    found: Survey
    latest: dict[str, Captured]
    out: Path
    progress: Progress
    done: Plotted = field(default_factory=Plotted)

    def path(self, kind: str, tensor: Captured, more: str = "") -> Path:
        """Where a picture of a tensor goes."""
        moment = tensor.moment.when.replace(" ", "_")
        return picture(self.out / kind, tensor.name, f"{moment}__{more}" if more else moment)

    def without_values(self, name: str) -> None:
        """Note once that there is nothing to draw of a tensor."""
        line = f"{name}: only its statistics were captured; capture it with values='full'"
        if line not in self.done.left_out:
            self.done.left_out.append(line)

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """A tensor that cannot be read is listed, and the rest is drawn."""
        try:
            yield
        except (RunError, NotSupported) as failure:
            line = str(failure)
            told = line if name in line else f"{name}: {line}"
            if told not in self.done.failed:
                self.done.failed.append(told)


def title(tensor: Captured) -> str:
    """Run, name, moment, shape and format."""
    record = tensor.first()
    shape: tuple[int, ...] = record.placement.logical_shape if record.placement else ()
    if tensor.part is not None:
        shape = tensor.open().shape
    spelled = "x".join(map(str, shape or record.shape)) or "scalar"
    run = tensor.run.path.name
    return f"{run}: {tensor.name}   {tensor.moment.when}, {spelled} {format_of(record)}"
