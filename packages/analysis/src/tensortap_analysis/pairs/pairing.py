"""Pairing the tensors of two runs: by canonical name and coordinates, fused against split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tensortap.records import Segment
from tensortap_analysis.captured.moments import Catalogue, Moment
from tensortap_analysis.pairs.reasons import Kind

Where = Literal["ref", "run", "both"]
Segments = Mapping[str, tuple[Segment, ...]]


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A tensor that was not compared, why, and at how many moments; `where` says who has it."""

    name: str
    where: Where
    reason: str
    count: int = 1
    kind: Kind = "unknown"


@dataclass(frozen=True, slots=True)
class Match:
    """One tensor that both have: its name, and the moments it is read (or cut) from."""

    name: str
    ref: Moment
    other: Moment

    @property
    def at(self) -> Moment:
        """The tensor's own name at the moment of the reference."""
        return self.ref if self.name == self.ref.name else self.ref.renamed(self.name)

    @property
    def is_part(self) -> bool:
        """Is it cut from a fused tensor on either side?"""
        return not self.name == self.ref.name == self.other.name


@dataclass(frozen=True, slots=True)
class Pairing:
    """What two runs have in common, in execution order of the first, and what they have not."""

    matches: tuple[Match, ...]
    unpaired: tuple[Unpaired, ...]


def pair(ref: Catalogue, other: Catalogue) -> Pairing:
    """Pair two runs; every name that finds no partner is listed once, with the reason."""
    pairing = _Pairer(ref, other)
    matches = tuple(pairing.matches())
    return Pairing(matches, tuple(gathered(pairing.leftovers())))


class Partners:
    """Where another run has the tensors of a reference that are compared with a first one."""

    def __init__(self, ref: Catalogue, other: Catalogue) -> None:
        self._pairer = _Pairer(ref, other)

    def of(self, match: Match) -> Match | None:
        """The same tensor of the reference, or the same part of it, and what this run has of it."""
        found = self._pairer.partner(match.name, match.ref)
        return None if found is None else Match(match.name, match.ref, found)


def gathered(unpaired: Iterator[Unpaired] | list[Unpaired]) -> list[Unpaired]:
    """Each name and reason once, counted."""
    found: dict[tuple[str, Where, str, Kind], int] = {}
    for one in unpaired:
        key = (one.name, one.where, one.reason, one.kind)
        found[key] = found.get(key, 0) + one.count
    return [
        Unpaired(name, where, reason, count, kind)
        for (name, where, reason, kind), count in found.items()
    ]


@dataclass(slots=True)
class _Pairer:
    ref: Catalogue
    other: Catalogue
    taken: set[tuple[str, Moment]] = field(default_factory=set)
    alone: list[Moment] = field(default_factory=list)
    alike: dict[str, bool] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sources = {part: fused for fused, parts in self.other.parts.items() for part in parts}

    def matches(self) -> Iterator[Match]:
        for moment in self.ref.moments:
            for name in self._names(moment):
                partner = self._partner(name, moment)
                if partner is None:
                    self.alone.append(moment.renamed(name))
                else:
                    self.taken.add((name, partner))
                    yield Match(name, moment, partner)

    def _names(self, moment: Moment) -> list[str]:
        """What a tensor is compared as: itself, or its parts where the other has only those."""
        name, parts = moment.name, self.ref.parts.get(moment.name)
        if not parts:
            return [name]
        whole = name in self.ref.whole and self._at(moment) is not None
        if whole and self._cut_alike(name):
            return [name]
        if name not in self.ref.whole:
            return parts
        return parts if any(self._partner(part, moment) for part in parts) else [name]

    def partner(self, name: str, moment: Moment) -> Moment | None:
        """Where the other run has a tensor that may be cut in another way there."""
        whole = name == moment.name and name in self.ref.parts
        return None if whole and not self._cut_alike(name) else self._partner(name, moment)

    def _partner(self, name: str, moment: Moment) -> Moment | None:
        """Where the other run has this tensor: as it is, or inside a fused one."""
        found = self._at(moment if name == moment.name else moment.renamed(name))
        if found is None and name in self.sources:
            found = self._at(moment.renamed(self.sources[name]))
        return found

    def _at(self, moment: Moment) -> Moment | None:
        """The moment of the other run; a run of one data-parallel rank meets another's first."""
        if moment in self.other.moments:
            return moment
        alone = {None: 0, 0: None}
        if moment.dp_rank not in alone:
            return None
        found = moment.of_rank(alone[moment.dp_rank])
        return found if found in self.other.moments else None

    def _cut_alike(self, name: str) -> bool:
        if name not in self.other.parts:
            return True
        if name not in self.alike:
            self.alike[name] = _segments(self.ref, name) == _segments(self.other, name)
        return self.alike[name]

    def leftovers(self) -> Iterator[Unpaired]:
        """Tensors that were not paired, of the reference first."""
        others = _moments_by_name(self.other)
        mine = _moments_by_name(self.ref)
        for moment in self.alone:
            reason = _why(moment, others, "RUN")
            yield Unpaired(moment.name, "ref", reason, kind="absent")
        wholes = {moment for name, moment in self.taken if name == moment.name}
        for moment in self.other.moments:
            parts = self.other.parts.get(moment.name, [])
            missing = [part for part in parts if (part, moment) not in self.taken]
            if moment in wholes or (parts and not missing):
                continue
            for name in missing if len(missing) < len(parts) else [moment.name]:
                reason = _why(moment.renamed(name), mine, "REF")
                yield Unpaired(name, "run", reason, kind="absent")


def _segments(side: Catalogue, name: str) -> Segments:
    """How a fused tensor is cut, from its first record."""
    moment = next(moment for moment in side.moments if moment.name == name)
    placement = side.records(moment)[0].placement
    return {part.module: part.segments for part in placement.parts} if placement else {}


def _moments_by_name(side: Catalogue) -> dict[str, list[Moment]]:
    found: dict[str, list[Moment]] = {}
    for moment in side.moments:
        for name in (moment.name, *side.parts.get(moment.name, ())):
            found.setdefault(name, []).append(moment)
    return found


def _why(moment: Moment, others: Mapping[str, list[Moment]], who: str) -> str:
    """Why a moment has no partner: the name is unknown there, or it was seen at other moments."""
    known = others.get(moment.name)
    if not known:
        return f"{who} has no such tensor"
    steps = sorted({found.step for found in known})
    if moment.step not in steps:
        return f"{who} has it at other steps only: {_spans(steps)}"
    microbatches = sorted({found.microbatch for found in known if found.step == moment.step})
    if moment.microbatch not in microbatches:
        return f"{who} has it at other microbatches only: {_spans(microbatches)}"
    ranks = {found.dp_rank for found in known}
    if moment.dp_rank not in ranks and moment.dp_rank is not None:
        return f"{who} has no data-parallel rank {moment.dp_rank}"
    for flag, word in ((moment.eval, "evaluation"), (moment.recompute, "recomputed")):
        if flag and not any(_flags(found) == _flags(moment) for found in known):
            return f"{who} has no {word} forward of it"
    return f"{who} has it in other calls only"


def _flags(moment: Moment) -> tuple[bool, bool]:
    return moment.eval, moment.recompute


def _spans(numbers: list[int]) -> str:
    """`0-9, 20`: sorted numbers as ranges."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = [f"{a}" if a == b else f"{a}-{b}" for a, b in spans]
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "")
