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
        return f"{pair} are bitwise equal in all {self.tensors:,} outputs."

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


def sentences(found: Sequence[Equality]) -> list[str]:
    """What is equal and nobody declared, one sentence for all modes that are equal together."""
    same: list[set[str]] = []
    for one in found:
        if one.kind != "violated":
            joined = [group for group in same if group & {one.one, one.other}]
            same = [group for group in same if group not in joined]
            same.append({one.one, one.other}.union(*joined))
    suspect = {name for one in found if one.kind == "undeclared" for name in (one.one, one.other)}
    return [_suspicion(group, found) for group in same if group & suspect]


def _suspicion(group: set[str], found: Sequence[Equality]) -> str:
    declared = [one for one in found if one.kind == "declared" and {one.one, one.other} <= group]
    names = list(dict.fromkeys(name for one in found for name in (one.one, one.other)))
    kinds: list[list[str]] = []
    for name in (name for name in names if name in group):
        partners = {
            name,
            *(n for e in declared for n in (e.one, e.other) if name in (e.one, e.other)),
        }
        kind = next((kind for kind in kinds if partners & set(kind)), None)
        kinds.append([name]) if kind is None else kind.append(name)
    tensors = next(one.tensors for one in found if {one.one, one.other} <= group)
    said = " and ".join(" = ".join(kind) for kind in kinds)
    return (
        f"{said} are bitwise equal in all {tensors:,} outputs, though they are different modes: "
        "either they do not differ on these inputs, or one of them is not what it says."
    )


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
