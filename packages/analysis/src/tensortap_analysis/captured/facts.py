"""What two runs say about themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tensortap.errors import SelectionError
from tensortap.selection import Selection
from tensortap.store import Run


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Who a run is: its path as given, model, mode, format, versions, and what is wrong with it.

    `select` and `phases` are what it was asked to capture; `None` where it does not say.
    """

    path: str
    model: str = ""
    mode: str | None = None
    format: str | None = None
    created: str = ""
    versions: Mapping[str, str] | None = None
    problems: tuple[str, ...] = ()
    select: str | None = None
    phases: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """`runs/mxfp4 (mxfp4)`: the path, and the mode or format where it is known."""
        claim = self.mode or self.format
        return f"{self.path} ({claim})" if claim else self.path

    @property
    def claim(self) -> str:
        """`mode 2-4 and format int8`: what it says it is."""
        format = None if self.format == self.mode else self.format
        claims = (("mode", self.mode), ("format", format))
        return " and ".join(f"{key} {value}" for key, value in claims if value) or "no mode"

    def claims_as(self, other: RunFacts) -> bool:
        """Do both say they are the same?"""
        return (self.mode, self.format) == (other.mode, other.format)

    def contradicts(self, other: RunFacts) -> bool:
        """Do both say what they are, and that it is not the same?"""
        said = all(side.mode or side.format for side in (self, other))
        return said and not self.claims_as(other)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse is `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunFacts:
        """Inverse of `to_json`."""
        lists = {key: tuple(document.get(key, ())) for key in ("problems", "phases")}
        return cls(**{**document, **lists})


def facts_of(run: Run, path: str) -> RunFacts:
    """Read from run.json; the mode of a run that was captured by hand may be in its metadata."""
    info = run.info
    mode, format = (
        value or _text(info.metadata.get(key))
        for key, value in (("mode", info.mode), ("format", info.format))
    )
    phases = info.settings.get("phases")
    return RunFacts(
        path,
        info.model_class,
        mode,
        format,
        info.created,
        dict(info.versions),
        tuple(run.problems),
        _selection(info.settings.get("select")),
        tuple(map(str, phases)) if isinstance(phases, list) else (),
    )


def _selection(value: object) -> str | None:
    """A selection that can be parsed: what is in a file may be anything."""
    try:
        return Selection.parse(value).text if isinstance(value, str) else None
    except SelectionError:
        return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
