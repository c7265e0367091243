"""Which runs are bitwise equal: declared equalities are checked, all others reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

from tensortap.store import Run
from tensortap_hf.command.runs import ModeRun

Kind = Literal["declared", "violated", "undeclared"]
Digests = Mapping[tuple[str, int, int, int], tuple[str, str]]
"""(name, step, microbatch, call) -> (dtype, digest of the bytes)."""


@dataclass(frozen=True, slots=True)
class Equality:
    """Two modes that are equal (`declared` or `undeclared`), or should be (`violated`)."""

    one: str
    other: str
    kind: Kind
    tensors: int
    first: str | None = None
    """Where two modes part that should not: the first tensor in execution order."""

    def __str__(self) -> str:
        pair = f"{self.one} and {self.other}"
        if self.kind == "violated":
            return f"{pair} are declared to be bitwise equal, and differ from {self.first} on."
        same = f"{pair} are bitwise equal in all {self.tensors:,} outputs"
        if self.kind == "declared":
            return f"{same}, as they declare."
        return f"{same}, though they are different modes: one does nothing here, or not its own."

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def equalities(runs: Sequence[ModeRun]) -> list[Equality]:
    """Pairs of runs that are equal in every output both have, or declare to be."""
    digests = [_digests(one.run, "*/forward/output") for one in runs]
    found = []
    for (one, mine), (other, theirs) in combinations(zip(runs, digests, strict=True), 2):
        common = [key for key in mine if key in theirs]
        parted = next((key for key in common if mine[key] != theirs[key]), None)
        declared = one.must_equal(other)
        if common and (declared or parted is None):
            kind: Kind = "undeclared" if not declared else "violated" if parted else "declared"
            first = None if parted is None else f"{parted[0]} (sample {parted[1]})"
            found.append(Equality(one.name, other.name, kind, len(common), first))
    return found


def groups(runs: Sequence[ModeRun], name: str) -> list[list[str]]:
    """Names of runs, those together whose tensor `name` is bitwise equal in every sample."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for one in runs:
        digests = _digests(one.run, name)
        found.setdefault(tuple(sorted(digests.items())), []).append(one.name)
    return list(found.values())


def _digests(run: Run, select: str) -> Digests:
    """Digests of all payloads of these names; `{}` where a run has none of them."""
    wanted = [name for name in run.names() if _matches(select, name)]
    if not wanted:
        return {}
    return {
        (str(record.name), at.step, at.microbatch, at.call): (record.dtype, record.payload.digest)
        for record in run.records(wanted)
        if (at := record.at) and record.payload is not None
    }


def _matches(select: str, name: str) -> bool:
    return name.endswith(select.removeprefix("*")) if select.startswith("*") else name == select
