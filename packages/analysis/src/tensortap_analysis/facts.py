"""What two runs say about themselves, and what deserves a warning when they are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tensortap.store import Run
from tensortap_analysis.pairs import Pair

_MOST_PROBLEMS = 5


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Who a run is: its path as given, model, mode, format, versions, and what is wrong with it."""

    path: str
    model: str = ""
    mode: str | None = None
    format: str | None = None
    created: str = ""
    versions: Mapping[str, str] | None = None
    problems: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """`runs/mxfp4 (mxfp4)`: the path, and the mode or format where it is known."""
        claim = self.mode or self.format
        return f"{self.path} ({claim})" if claim else self.path

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse is `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunFacts:
        """Inverse of `to_json`."""
        return cls(**{**document, "problems": tuple(document["problems"])})


def facts_of(run: Run, path: str) -> RunFacts:
    """Read from run.json; the mode of a run that was captured by hand may be in its metadata."""
    info = run.info
    mode, format = (
        value or _text(info.metadata.get(key))
        for key, value in (("mode", info.mode), ("format", info.format))
    )
    problems = tuple(run.problems)
    return RunFacts(
        path, info.model_class, mode, format, info.created, dict(info.versions), problems
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def warnings(ref: RunFacts, run: RunFacts, pairs: Sequence[Pair]) -> Iterator[str]:
    """Sentences, the loudest first."""
    if not pairs:
        yield f"{run.path} and {ref.path} have nothing in common: no tensor could be compared."
    elif all(pair.equal for pair in pairs):
        yield from _suspiciously_equal(ref, run, pairs)
    yield from _different("model", ref.model, run.model)
    if not (ref.mode == run.mode and ref.format == run.format):
        yield f"Modes differ, as they may: {_claim(ref)} and {_claim(run)}."
    yield from _versions(ref.versions or {}, run.versions or {})
    for who, side in (("REF", ref), ("RUN", run)):
        for problem in side.problems[:_MOST_PROBLEMS]:
            yield f"{who} is incomplete: {problem}"
        if len(side.problems) > _MOST_PROBLEMS:
            yield f"{who}: and {len(side.problems) - _MOST_PROBLEMS} more problems."


def _suspiciously_equal(ref: RunFacts, run: RunFacts, pairs: Sequence[Pair]) -> Iterator[str]:
    exactly = all(pair.by == "values" for pair in pairs)
    how = "bitwise equal" if exactly else "equal in everything that was captured"
    if (ref.mode, ref.format) != (run.mode, run.format):
        yield (
            f"{ref.path} claims {_claim(ref)} and {run.path} claims {_claim(run)}, but all "
            f"{len(pairs):,} tensors are {how}: one of them is not what it says, or the mode "
            "does nothing here."
        )


def _claim(side: RunFacts) -> str:
    claims = (("mode", side.mode), ("format", side.format))
    return " and ".join(f"{key} {value}" for key, value in claims if value) or "no mode"


def _different(what: str, one: str, two: str) -> Iterator[str]:
    if one and two and one != two:
        yield f"The {what}s differ: {one} and {two}."


def _versions(one: Mapping[str, str], two: Mapping[str, str]) -> Iterator[str]:
    apart = [
        f"{key} {one[key]} and {two[key]}"
        for key in sorted(one.keys() & two.keys())
        if one[key] != two[key]
    ]
    if apart:
        yield f"Versions differ: {', '.join(apart)}."


def noise_warnings(ref: RunFacts, noise: RunFacts, pairs: Sequence[Pair]) -> Iterator[str]:
    """What is wrong with a noise run; `pairs` are those of the run that is judged by it."""
    beside = [pair for pair in pairs if pair.noise is not None]
    if pairs and not beside:
        yield f"The noise run {noise.path} has none of the tensors; rounding is estimated instead."
    elif beside and all(pair.noise is not None and pair.noise.equal for pair in beside):
        yield (
            f"The noise run {noise.path} equals {ref.path} in every tensor: it says nothing about "
            "noise. Only one rounding of its dtype is accepted."
        )
    elif len(beside) < len(pairs):
        missing = len(pairs) - len(beside)
        yield f"The noise run lacks {missing:,} of {len(pairs):,} tensors; theirs is estimated."
