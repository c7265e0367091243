"""`Comparison`: what `compare` found; saved, loaded and judged again without the runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tensortap.errors import RunError
from tensortap_analysis.divergence import Divergence, divergences
from tensortap_analysis.facts import RunFacts, noise_warnings, warnings
from tensortap_analysis.layers import Change, abnormal
from tensortap_analysis.pairing import Unpaired
from tensortap_analysis.pairs import Pair
from tensortap_analysis.presets import Judgement, judged, preset
from tensortap_analysis.tables import summary

Verdict = Literal["agree", "differ", "incomparable"]
_KIND, _SCHEMA = "tensortap-comparison", 1


@dataclass(frozen=True, slots=True)
class RunComparison:
    """One run against the reference: pairs in execution order, a judgement beside each."""

    run: RunFacts
    pairs: tuple[Pair, ...]
    unpaired: tuple[Unpaired, ...]
    changes: tuple[Change, ...]
    warnings: tuple[str, ...] = ()
    judgements: tuple[Judgement, ...] = ()
    divergences: tuple[Divergence, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """`incomparable` where not one tensor could be compared."""
        if not self.pairs:
            return "incomparable"
        return "differ" if self.divergences else "agree"

    @property
    def first_divergence(self) -> Divergence | None:
        """The earliest tensor in execution order that is beyond its limit."""
        return self.divergences[0] if self.divergences else None

    @property
    def local(self) -> tuple[Divergence, ...]:
        """The tensors beyond their limits whose error is not explained by their inputs'."""
        return tuple(found for found in self.divergences if found.origin == "local")

    @property
    def worst(self) -> Pair | None:
        """The pair farthest beyond, or nearest to, its limit; of equals the one of larger error."""
        both = zip(self.pairs, self.judgements, strict=True)
        ranked = [(judgement.excess, pair.error, -pair.order, pair) for pair, judgement in both]
        return max(ranked, key=lambda row: row[:3])[-1] if ranked else None

    @property
    def estimated(self) -> bool:
        """Is any limit an estimate?"""
        return any(judgement.estimated for judgement in self.judgements)

    @property
    def jumps(self) -> tuple[Change, ...]:
        """Sudden changes between adjacent layers, in either run."""
        return tuple(change for change in self.changes if change.jumps)

    @property
    def abnormal(self) -> tuple[str, ...]:
        """Tensors with NaN, infinities or an abnormal mean, as sentences."""
        return tuple(abnormal(self.pairs))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A reference and the runs compared with it, judged by a preset; see `compare`."""

    ref: RunFacts
    runs: tuple[RunComparison, ...]
    noise: RunFacts | None = None
    preset: str = "noise"
    thresholds: Mapping[str, float] | None = None

    @property
    def verdict(self) -> Verdict:
        """`differ` where any run does, `incomparable` where one could not be compared at all."""
        found = {run.verdict for run in self.runs}
        return next(word for word in ("incomparable", "differ", "agree") if word in found)

    @property
    def first_divergence(self) -> Divergence | None:
        """Of the first run that differs; each run has its own in `runs`."""
        found = (run.first_divergence for run in self.runs)
        return next((divergence for divergence in found if divergence is not None), None)

    def judge(self, preset: str | None = None, **thresholds: float) -> Comparison:
        """The same measurements by another preset or other thresholds (`ratio=2`); needs no run.

        Raises `ConfigError` for a preset or threshold there is not.
        """
        return judged_again(replace(self, preset=preset or self.preset), thresholds)

    def table(self, kind: str = "text") -> str:
        """The summary, a row for each run: `text`, `markdown` or `csv`."""
        return summary(self, kind)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that was measured as JSON; `Comparison.load` reads it."""
        text = json.dumps(self.to_json(), allow_nan=False)
        scratch = Path(f"{path}.partial")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read a saved comparison; raises `RunError` for anything else."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RunError(f"There is no saved comparison at {path}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            raise RunError(f"{path} is no saved comparison: {failure!r}.") from failure

    def to_json(self) -> dict[str, Any]:
        """What `save` writes."""
        return {
            "kind": _KIND,
            "schema": _SCHEMA,
            "preset": self.preset,
            "thresholds": dict(self.thresholds or {}),
            "ref": self.ref.to_json(),
            "noise": None if self.noise is None else self.noise.to_json(),
            "runs": [
                {
                    "run": run.run.to_json(),
                    "pairs": [pair.to_json() for pair in run.pairs],
                    "unpaired": [asdict(one) for one in run.unpaired],
                    "changes": [change.to_json() for change in run.changes],
                }
                for run in self.runs
            ],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Comparison:
        """Inverse of `to_json`, judged as it was."""
        if (document["kind"], document["schema"]) != (_KIND, _SCHEMA):
            raise ValueError(f"schema {document['schema']} of {document['kind']!r} is not known")
        runs = tuple(
            RunComparison(
                RunFacts.from_json(run["run"]),
                tuple(Pair.from_json(pair) for pair in run["pairs"]),
                tuple(Unpaired(**one) for one in run["unpaired"]),
                tuple(Change.from_json(change) for change in run["changes"]),
            )
            for run in document["runs"]
        )
        noise = document["noise"]
        found = cls(
            RunFacts.from_json(document["ref"]),
            runs,
            None if noise is None else RunFacts.from_json(noise),
            document["preset"],
        )
        return judged_again(found, document["thresholds"])


def judged_again(found: Comparison, thresholds: Mapping[str, float]) -> Comparison:
    """`found` with judgements, divergences and warnings by its preset and these thresholds."""
    limits = preset(found.preset, thresholds)
    runs = []
    for run in found.runs:
        judgements = judged(run.pairs, limits)
        notices = [*warnings(found.ref, run.run, run.pairs)]
        if found.noise is not None:
            notices += noise_warnings(found.ref, found.noise, run.pairs)
        beyond = tuple(divergences(run.pairs, judgements))
        runs.append(
            replace(run, judgements=judgements, divergences=beyond, warnings=tuple(notices))
        )
    return replace(found, runs=tuple(runs), thresholds=dict(thresholds))
