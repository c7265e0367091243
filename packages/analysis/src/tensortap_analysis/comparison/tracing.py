"""What selected tensors were computed from, looked for in the whole runs.

A selection narrows what is listed and judged, not what is known: where a selected tensor is beyond
its limit, what it was directly computed from is compared too, although it is not listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from tensortap_analysis.captured.moments import Catalogue, Moment, catalogue
from tensortap_analysis.divergence.scope import Scope
from tensortap_analysis.divergence.upstream import Seen, Sources, upstream
from tensortap_analysis.judging.judgement import Preset
from tensortap_analysis.judging.presets import judged
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.pairs.pairing import Match, pair

_MOST = 200
"""Tensors that are compared beside few selected ones; beside more, as many as they are."""
_STEPS = 8
"""Steps whose whole list of tensors is gone through."""


@dataclass(frozen=True, slots=True)
class Whole:
    """All that the runs have at some steps, and what of it is to be compared beside a selection.

    `traced` are the moments of the selected tensors whose sources are all among it.
    """

    ref: Catalogue
    other: Catalogue
    beside: tuple[Match, ...]
    traced: frozenset[Moment]
    steps: frozenset[int]

    def of(self, side: Catalogue, step: int | None) -> Catalogue:
        """Another run's selected tensors, and all that it has at these steps."""
        return _with_all(side, step, self.steps)


@dataclass(frozen=True, slots=True)
class _Unmeasured:
    """A tensor that both runs have, of which only the name and the moment are known."""

    at: Moment
    equal: bool = True
    error: float = 0.0
    traced: bool = True
    numbers: tuple[object, ...] = ()

    @property
    def name(self) -> str:
        """Canonical name."""
        return self.at.name


def whole(
    pairs: Sequence[Pair], matches: Sequence[Match], ref: Catalogue, other: Catalogue,
    by: Preset, scope: Scope, step: int | None,
) -> Whole | None:  # fmt: skip
    """What tells where those of `pairs` come from that are beyond their limits; `None`: all agree.

    `ref` and `other` are the selected parts of the runs, at this `step` if one was chosen.
    """
    beyond = [place for place, found in enumerate(judged(pairs, by)) if not found.within]
    among = frozenset(_steps(pairs, beyond))
    if not among:
        return None
    one, two = (_with_all(side, step, among) for side in (ref, other))
    found = {match.at: match for match in pair(one, two).matches}
    found |= {match.at: match for match in matches}
    order = sorted(found.values(), key=lambda match: one.moments[match.ref].order)
    known = {pair.at: pair for pair in pairs}
    seen: list[Seen] = [known.get(match.at) or _Unmeasured(match.at) for match in order]
    wanted = {pairs[place].at for place in beyond if pairs[place].at.step in among}
    sources = list(upstream(seen, scope))
    ranked = [place for place, one_of_them in enumerate(seen) if one_of_them.at in wanted]
    beside, traced = _chosen(ranked, seen, sources, max(_MOST, len(pairs)))
    return Whole(
        one,
        two,
        tuple(order[place] for place in sorted(beside)),
        frozenset(seen[place].at for place in traced),
        among,
    )


def _steps(pairs: Sequence[Pair], beyond: Sequence[int]) -> Iterator[int]:
    """The first steps with something beyond; parameters come from the step before."""
    every = sorted({one.at.step for one in pairs})
    for step in islice(dict.fromkeys(pairs[place].at.step for place in beyond), _STEPS):
        before = every.index(step) - 1
        yield from ((step, every[before]) if before >= 0 else (step,))


def _with_all(side: Catalogue, step: int | None, among: frozenset[int]) -> Catalogue:
    """The selected tensors of a run, and all of these steps."""
    every = catalogue(side.run, step=step, among=among)
    return replace(
        every, moments={**side.moments, **every.moments}, parts={**side.parts, **every.parts}
    )


def _chosen(
    places: Sequence[int], seen: Sequence[Seen], sources: Sequence[Sources], most: int
) -> tuple[set[int], set[int]]:
    """Sources to compare, at most so many, and the tensors all of whose sources are known then."""
    beside: set[int] = set()
    traced: set[int] = set()
    for place in places:
        new = {at for at in sources[place].places if isinstance(seen[at], _Unmeasured)}
        if len(beside | new) <= most:
            beside |= new
            traced.add(place)
    return beside, traced
