"""`compare`: one or more runs against a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from tensortap.errors import ConfigError
from tensortap_analysis.comparison import Comparison, RunComparison, judged_again
from tensortap_analysis.examining import BLOCK, NotComparable, examine
from tensortap_analysis.facts import facts_of
from tensortap_analysis.layers import changes
from tensortap_analysis.moments import Catalogue, Moment, catalogue
from tensortap_analysis.pairing import Match, Unpaired, gathered, pair
from tensortap_analysis.pairs import Pair
from tensortap_analysis.presets import preset as known_preset
from tensortap_analysis.sources import Source, label, opened

Progress = Callable[[int, int], None]
"""Called with the number of tensors compared so far, and of those there are."""


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
    not depend on them. `block` elements of each side are in memory at once. Raises `RunError`
    where a run cannot be opened, `SelectionError` and `ConfigError` for what cannot be asked.
    """
    if not runs:
        raise ConfigError("compare needs a reference and at least one run.")
    known_preset(preset, thresholds)
    with ExitStack() as stack:

        def listed(source: Source) -> Catalogue:
            return catalogue(stack.enter_context(opened(source)), select, step=step)

        reference = listed(ref)
        reference.require_something(select)
        second = listed(noise) if noise is not None else None
        others = [listed(run) for run in runs]
        work = _Work(reference, second, block)
        found = work.compare(others, [label(run) for run in runs], progress)
        about = facts_of(reference.run, label(ref))
        accepted = facts_of(second.run, label(noise)) if second and noise is not None else None
        return judged_again(Comparison(about, tuple(found), accepted, preset), thresholds or {})


class _Work:
    """The passes over tensors; what the noise run differs by is measured once for all runs."""

    def __init__(self, ref: Catalogue, noise: Catalogue | None, block: int) -> None:
        self._ref = ref
        self._noise = noise
        self._block = block
        self._noisy: dict[tuple[str, Moment], Match] = {}
        self._measured: dict[tuple[str, Moment], Pair | None] = {}
        if noise is not None:
            self._noisy = {(match.name, match.ref): match for match in pair(ref, noise).matches}

    def compare(
        self, others: list[Catalogue], paths: list[str], progress: Progress
    ) -> list[RunComparison]:
        pairings = [pair(self._ref, other) for other in others]
        total, done = sum(len(pairing.matches) for pairing in pairings), 0
        found = []
        for other, path, pairing in zip(others, paths, pairings, strict=True):
            pairs, failed = [], []
            for match in pairing.matches:
                try:
                    compared = examine(match, self._ref, other, block=self._block)
                    pairs.append(compared.with_noise(self._noise_of(match)))
                except NotComparable as reason:
                    failed.append(Unpaired(match.name, "both", str(reason)))
                done += 1
                progress(done, total)
            moved = changes(pairing.matches, self._ref, other, block=self._block)
            unpaired = (*gathered(failed), *pairing.unpaired)
            found.append(
                RunComparison(facts_of(other.run, path), tuple(pairs), unpaired, tuple(moved))
            )
        return found

    def _noise_of(self, match: Match) -> Pair | None:
        key = (match.name, match.ref)
        if key not in self._measured:
            self._measured[key] = self._measure_noise(self._noisy.get(key))
        return self._measured[key]

    def _measure_noise(self, match: Match | None) -> Pair | None:
        if match is None or self._noise is None:
            return None
        try:
            return examine(match, self._ref, self._noise, block=self._block)
        except NotComparable:
            return None  # such tensors are counted by `noise_warnings`
