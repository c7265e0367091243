"""`compare`: one or more runs against a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count

from tensortap.errors import ConfigError
from tensortap.selection import Selection
from tensortap_analysis.captured.facts import RunFacts, facts_of
from tensortap_analysis.captured.moments import Catalogue, Moment, catalogue
from tensortap_analysis.captured.sources import Source, label, opened
from tensortap_analysis.captured.steps import require_step
from tensortap_analysis.comparison.mistakes import (
    absence,
    dead_patterns,
    lost,
    require_noise_of_its_own,
)
from tensortap_analysis.comparison.result import Comparison, RunComparison, judged_again
from tensortap_analysis.comparison.tracing import Whole, whole
from tensortap_analysis.divergence.products import with_products
from tensortap_analysis.divergence.scope import Scope
from tensortap_analysis.judging.judgement import Preset
from tensortap_analysis.judging.presets import preset as known_preset
from tensortap_analysis.measuring.crews import Crew
from tensortap_analysis.measuring.examining import BLOCK, examine
from tensortap_analysis.measuring.layers import changes
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.pairs.pairing import Match, Pairing, Partners, Unpaired, gathered, pair
from tensortap_analysis.pairs.reasons import NotComparable

Progress = Callable[[int, int], None]
"""Called with the number of tensors compared so far, and of those there are."""

_SAMPLES = 16


def compare(
    ref: Source,
    *runs: Source,
    noise: Source | None = None,
    preset: str = "noise",
    thresholds: Mapping[str, float] | None = None,
    select: str | Iterable[str] = "*",
    step: int | None = None,
    block: int = BLOCK,
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Compare runs with a reference, tensor by tensor; nothing is dropped silently.

    A run is a directory, an open `Run`, or a folder in any layout that can be imported. `noise` is
    a second reference whose difference from `ref` must be accepted (the same in bf16 on a trusted
    device, or a repeat with another seed). `preset` and `thresholds` judge; what was measured does
    not depend on them. `block` elements of each side are in memory at once, shared by the tensors
    that are compared at the same time, on torch's threads. Raises `RunError` where a run cannot
    be opened, `SelectionError` and `ConfigError` for what cannot be asked.
    """
    if not runs:
        raise ConfigError("compare needs a reference and at least one run.")
    limits = known_preset(preset, thresholds)
    require_noise_of_its_own(runs, noise)
    with ExitStack() as stack:

        def listed(source: Source) -> Catalogue:
            run = stack.enter_context(opened(source))
            require_step(run, label(source), step)
            return catalogue(run, select, step=step)

        reference = listed(ref)
        reference.require_something(select)
        second = listed(noise) if noise is not None else None
        others = [listed(run) for run in runs]
        about = facts_of(reference.run, label(ref))
        asked = _Asked(about, Selection.parse(select).text, step, limits)
        work = _Work(reference, second, block, asked)
        found = work.compare(others, [label(run) for run in runs], progress)
        accepted = facts_of(second.run, label(noise)) if second and noise is not None else None
        remarks = tuple(dead_patterns(select, [reference, *others]))
        measured = Comparison(
            about, tuple(found), accepted, preset, remarks=remarks, select=asked.select
        )
        return judged_again(measured, thresholds or {})


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was asked of a reference, and the preset that says what is beyond."""

    ref: RunFacts
    select: str
    step: int | None
    limits: Preset


class _Work:
    """The passes over tensors; what the noise run differs by is measured once for all runs."""

    def __init__(self, ref: Catalogue, noise: Catalogue | None, block: int, asked: _Asked) -> None:
        self._ref = ref
        self._noise = noise
        self._block = block
        self._asked = asked
        self._noisy = None if noise is None else Partners(ref, noise)
        self._measured: dict[tuple[str, Moment], Pair | None] = {}

    def compare(
        self, others: list[Catalogue], paths: list[str], progress: Progress
    ) -> list[RunComparison]:
        pairings = [pair(self._ref, other) for other in others]
        total = sum(len(pairing.matches) for pairing in pairings)
        done = count(1)
        return [
            self._compared(other, path, pairing, lambda: progress(next(done), total))
            for other, path, pairing in zip(others, paths, pairings, strict=True)
        ]

    def _compared(
        self, other: Catalogue, path: str, pairing: Pairing, tick: Callable[[], None]
    ) -> RunComparison:
        matches = pairing.matches
        crew = Crew.for_tensors(len(matches), _typical_bytes(matches, self._ref))
        pairs, failed, same = [], [], []
        outcomes = crew.each(lambda match: self._outcome(match, other, crew), matches)
        for match, outcome in zip(matches, outcomes, strict=True):
            tick()
            if isinstance(outcome, Pair):
                pairs.append(outcome)
                same.append(match)
            else:
                failed.append(outcome)
        moved = changes(same, self._ref, other, block=self._block // crew.workers, crew=crew)
        about = facts_of(other.run, path)
        unpaired = (
            *gathered(failed),
            *lost(pairing.unpaired, self._ref.run, other.run),
        )
        told, beside = self._parted(pairs, same, other, about, crew)
        return RunComparison(about, told, unpaired, tuple(moved), beside=beside)

    def _parted(
        self, pairs: list[Pair], same: list[Match], other: Catalogue, about: RunFacts, crew: Crew
    ) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
        """The pairs with all that tells inherited from added error, and those that tell it."""
        asked = self._asked
        scope = Scope.of(asked.ref, about, asked.select)
        found = None
        if asked.select != "*":
            found = whole(pairs, same, self._ref, other, asked.limits, scope, asked.step)
        if found is None:
            return tuple(with_products(pairs, same, self._ref, other, crew=crew)), ()
        noise = None if self._noise is None else found.of(self._noise, asked.step)
        further = _Work(found.ref, noise, self._block, asked)
        both = list(zip(same, pairs, strict=True))
        traced = [(match, replace(one, traced=one.at in found.traced)) for match, one in both]
        return further.with_beside(traced, found, crew)

    def with_beside(
        self, pairs: list[tuple[Match, Pair]], found: Whole, crew: Crew
    ) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
        """The pairs with what products pass on, and what they were computed from."""
        outcomes = crew.each(lambda match: self._outcome(match, found.other, crew), found.beside)
        beside = [
            (match, outcome)
            for match, outcome in zip(found.beside, outcomes, strict=True)
            if isinstance(outcome, Pair)
        ]
        every = sorted((*pairs, *beside), key=lambda one: one[1].order)
        matches, both = [match for match, _ in every], [one for _, one in every]
        told = with_products(both, matches, self._ref, found.other, crew=crew)
        selected = {one.at for _, one in pairs}
        return (
            tuple(one for one in told if one.at in selected),
            tuple(one for one in told if one.at not in selected),
        )

    def _outcome(self, match: Match, other: Catalogue, crew: Crew) -> Pair | Unpaired:
        try:
            return self._examined(match, other, crew).with_noise(self._noise_of(match, crew))
        except NotComparable as reason:
            kind = reason.kind
            if kind == "damaged":
                kind = absence(self._ref.run, other.run)
            return Unpaired(match.name, "both", str(reason), kind=kind)

    def _examined(self, match: Match, other: Catalogue, crew: Crew) -> Pair:
        block = self._block // crew.workers
        return examine(match, self._ref, other, block=block, threads=crew.threads)

    def _noise_of(self, match: Match, crew: Crew) -> Pair | None:
        key = (match.name, match.ref)
        if key not in self._measured:
            self._measured[key] = self._measure_noise(match, crew)
        return self._measured[key]

    def _measure_noise(self, match: Match, crew: Crew) -> Pair | None:
        noisy = self._noisy.of(match) if self._noisy is not None else None
        if noisy is None or self._noise is None:
            return None
        try:
            return self._examined(noisy, self._noise, crew)
        except NotComparable:
            return None  # such tensors are counted by `noise_warnings`


def _typical_bytes(matches: Sequence[Match], ref: Catalogue) -> float:
    """The mean size of a few of the tensors, evenly spread; 0 for statistics."""
    some = matches[:: max(1, len(matches) // _SAMPLES)]
    return sum(ref.moments[match.ref].nbytes for match in some) / max(len(some), 1)
