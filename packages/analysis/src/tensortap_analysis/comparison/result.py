"""`Comparison`: what `compare` found; saved, loaded and judged again without the runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tensortap.errors import ConfigError
from tensortap.selection import Selection
from tensortap_analysis.captured.facts import RunFacts
from tensortap_analysis.captured.moments import Moment
from tensortap_analysis.captured.steps import spelled
from tensortap_analysis.comparison.notices import notes, twins, warnings
from tensortap_analysis.comparison.outcome import RunComparison, Verdict
from tensortap_analysis.comparison.saving import decoded, encoded, load, save
from tensortap_analysis.comparison.tables import summary
from tensortap_analysis.divergence.depth import by_depth
from tensortap_analysis.divergence.parting import Divergence, divergences
from tensortap_analysis.divergence.scope import Scope
from tensortap_analysis.divergence.upstream import upstream
from tensortap_analysis.judging.acceptance import noise_warnings
from tensortap_analysis.judging.judgement import Judgement
from tensortap_analysis.judging.presets import judged, preset

__all__ = ["Comparison", "RunComparison", "Verdict", "judged_again"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A reference and the runs compared with it, judged by a preset; see `compare`.

    `remarks` are warnings about what was asked for, whatever the runs are; `select` is what was
    compared of them.
    """

    ref: RunFacts
    runs: tuple[RunComparison, ...]
    noise: RunFacts | None = None
    preset: str = "noise"
    thresholds: Mapping[str, float] | None = None
    remarks: tuple[str, ...] = ()
    select: str = "*"

    @property
    def verdict(self) -> Verdict:
        """`differ` where any run does, `incomparable` where one could not be compared at all."""
        found = {run.verdict for run in self.runs}
        words: tuple[Verdict, ...] = ("incomparable", "differ", "agree")
        return next(word for word in words if word in found)

    @property
    def first_divergence(self) -> Divergence | None:
        """Of the first run that differs; each run has its own in `runs`."""
        found = (run.first_divergence for run in self.runs)
        return next((divergence for divergence in found if divergence is not None), None)

    def judge(self, preset: str | None = None, **thresholds: float) -> Comparison:
        """The same measurements by another preset or other thresholds (`ratio=2`); needs no run.

        Thresholds that were replaced before stay so, as long as the preset stays. Raises
        `ConfigError` for a preset or threshold there is not.
        """
        stays = preset in (None, self.preset)
        limits = {**(self.thresholds or {} if stays else {}), **thresholds}
        return judged_again(replace(self, preset=preset or self.preset), limits)

    def narrowed(self, select: str | Iterable[str] = "*", *, step: int | None = None) -> Comparison:
        """Only the tensors of these names, at this step; needs no run.

        Raises `SelectionError` and `ConfigError` where nothing was compared of them.
        """
        wanted = Selection.parse(select)
        pairs = [pair for run in self.runs for pair in run.pairs]
        if not any(wanted.matches(pair.name) for pair in pairs):
            raise wanted.nothing_in(sorted({pair.name for pair in pairs}), "the comparison")
        steps = sorted({pair.at.step for pair in pairs})
        if step is not None and step not in steps:
            raise ConfigError(f"Nothing was compared at step {step}, only at {spelled(steps)}.")
        runs = tuple(_narrowed(run, wanted, step) for run in self.runs)
        return judged_again(replace(self, runs=runs), self.thresholds or {})

    def table(self, kind: str = "text") -> str:
        """The summary, a row for each run: `text`, `markdown` or `csv`."""
        return summary(self, kind)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that was measured as JSON; `Comparison.load` reads it.

        Raises `ConfigError` where it cannot be written.
        """
        save(self.to_json(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read a saved comparison; raises `RunError` for anything else."""
        return load(path, cls.from_json)

    def to_json(self) -> dict[str, Any]:
        """What `save` writes."""
        return {
            **encoded(self.ref, self.runs, self.noise),
            "preset": self.preset,
            "thresholds": dict(self.thresholds or {}),
            "remarks": list(self.remarks),
            "select": self.select,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Comparison:
        """Inverse of `to_json`, judged as it was."""
        remarks = tuple(document["remarks"])
        select = str(document.get("select", "*"))
        found = cls(*decoded(document), document["preset"], remarks=remarks, select=select)
        return judged_again(found, document["thresholds"])


def _narrowed(run: RunComparison, wanted: Selection, step: int | None) -> RunComparison:
    """What is not wanted is still known: it tells where the rest comes from."""

    def fits(at: Moment) -> bool:
        return wanted.matches(at.name) and (step is None or at.step == step)

    kept = tuple(pair for pair in run.pairs if fits(pair.at))
    others = tuple(pair for pair in run.pairs if not fits(pair.at))
    return replace(
        run,
        pairs=kept,
        beside=(*run.beside, *others),
        unpaired=tuple(one for one in run.unpaired if wanted.matches(one.name)),
        changes=tuple(change for change in run.changes if fits(change.at)),
    )


def judged_again(found: Comparison, thresholds: Mapping[str, float]) -> Comparison:
    """`found` with judgements, divergences and warnings by its preset and these thresholds."""
    limits = preset(found.preset, thresholds)
    runs = []
    for run in found.runs:
        judgements = judged(run.pairs, limits)
        again = parted(
            replace(run, judgements=judgements), Scope.of(found.ref, run.run, found.select)
        )
        said = notes(found.ref, again)
        runs.append(replace(again, warnings=_warnings(found, again), notes=tuple(said)))
    for place, warning in twins(runs).items():
        runs[place] = replace(runs[place], warnings=(warning, *runs[place].warnings))
    return replace(found, runs=tuple(runs), thresholds=dict(thresholds))


_NOT_JUDGED = Judgement(0.0, "not selected")


def parted(run: RunComparison, scope: Scope) -> RunComparison:
    """A run that is judged, with its divergences, and the error by depth."""
    judgements = {id(pair): one for pair, one in zip(run.pairs, run.judgements, strict=True)}
    pairs = (
        sorted((*run.pairs, *run.beside), key=lambda pair: pair.order) if run.beside else run.pairs
    )
    sources = list(upstream(pairs, scope))
    judged_all = [judgements.get(id(pair), _NOT_JUDGED) for pair in pairs]
    listed = [id(pair) in judgements for pair in pairs]
    return replace(
        run,
        divergences=tuple(divergences(pairs, judged_all, sources)),
        depth=tuple(by_depth(pairs, sources, listed)),
    )


def _warnings(found: Comparison, run: RunComparison) -> tuple[str, ...]:
    about = list(warnings(found.ref, run))
    if found.noise is not None:
        about += noise_warnings(found.ref, run.run, found.noise, run.pairs)
    return tuple(about)
