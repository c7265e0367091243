"""Which runs are bitwise equal: declared equalities are checked, all others reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    digests = [_digests(one.run, lambda name: name.endswith("/forward/output")) for one in runs]
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


def declared(found: Sequence[Equality]) -> str | None:
    """Which modes are equal as they declare, as a sentence; `None`: there are none."""
    groups = _joined([one for one in found if one.kind == "declared"])
    if not groups:
        return None
    return f"Bitwise equal, as declared: {'; '.join(' = '.join(group) for group in groups)}."


def undeclared(found: Sequence[Equality]) -> list[str]:
    """What is equal and nobody declared: a sentence for all modes that are equal together."""
    declared = _joined([one for one in found if one.kind == "declared"])
    suspect = {name for one in found if one.kind == "undeclared" for name in (one.one, one.other)}
    sentences = []
    for group in _joined([one for one in found if one.kind != "violated"]):
        if suspect & set(group):
            kinds = [kind for kind in declared if kind[0] in group]
            kinds += [[name] for name in group if not any(name in kind for kind in kinds)]
            said = " and ".join(" = ".join(kind) for kind in kinds)
            sentences.append(
                f"{said} are equal in every output too, which they do not declare: these inputs "
                "do not tell the modes apart, or one of them is not what it says."
            )
    return sentences


def _joined(pairs: Sequence[Equality]) -> list[list[str]]:
    """Modes that are equal to each other, together; in the order they are met."""
    found: list[list[str]] = []
    for pair in pairs:
        touched = [group for group in found if pair.one in group or pair.other in group]
        names = [name for group in touched for name in group] + [pair.one, pair.other]
        found = [group for group in found if group not in touched]
        found.append(list(dict.fromkeys(names)))
    return found


def groups(runs: Sequence[ModeRun], name: str) -> list[list[str]]:
    """Names of runs, those together whose tensor `name` is bitwise equal in every sample."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for one in runs:
        digests = _digests(one.run, lambda known: known == name)
        found.setdefault(tuple(sorted(digests.items())), []).append(one.name)
    return list(found.values())


def _digests(run: Run, is_wanted: Callable[[str], bool]) -> Digests:
    """Digests of all payloads of these names; `{}` where a run has none of them."""
    wanted = list(filter(is_wanted, run.names()))
    if not wanted:
        return {}
    return {
        (str(record.name), at.step, at.microbatch, at.call): (record.dtype, record.payload.digest)
        for record in run.records(wanted)
        if (at := record.at) and record.payload is not None
    }
