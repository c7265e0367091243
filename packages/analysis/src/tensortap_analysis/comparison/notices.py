"""What deserves a warning when runs are compared, and what only has to be said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from tensortap_analysis.captured.facts import RunFacts
from tensortap_analysis.comparison.outcome import RunComparison, counted
from tensortap_analysis.divergence.modules import Tensor
from tensortap_analysis.judging.rounding import eps
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.pairs.reasons import Kind

_MOST_PROBLEMS = 5


def warnings(ref: RunFacts, found: RunComparison) -> Iterator[str]:
    """Sentences about a run that is judged, the loudest first."""
    run, pairs = found.run, found.pairs
    if not pairs:
        yield _nothing(ref, found)
    elif all(pair.equal for pair in pairs):
        yield from _suspiciously_equal(ref, run, pairs)
    yield from _not_compared(found)
    yield from _only_statistics(found)
    yield from _other_data(found)
    yield from _different("model", ref.model, run.model)
    yield from _versions(ref.versions or {}, run.versions or {})
    for who, side in (("REF", ref), ("RUN", run)):
        for problem in side.problems[:_MOST_PROBLEMS]:
            yield f"{who} is incomplete: {problem}"
        if len(side.problems) > _MOST_PROBLEMS:
            yield f"{who}: and {len(side.problems) - _MOST_PROBLEMS} more problems."


def notes(ref: RunFacts, found: RunComparison) -> Iterator[str]:
    """What is as it may be: another mode, and tensors that only the run has besides."""
    if not ref.claims_as(found.run):
        yield f"modes differ, as they may: REF has {ref.claim}, RUN {found.run.claim}"
    if found.pairs and _only_more(found):
        yield f"{_many(found.not_compared, 'tensor')} only in RUN; all of REF were compared"


def _only_more(found: RunComparison) -> bool:
    """Is all that was not compared something that only the run has?"""
    return bool(found.unpaired) and all(
        (one.kind, one.where) == ("absent", "run") for one in found.unpaired
    )


def _nothing(ref: RunFacts, found: RunComparison) -> str:
    both = [one for one in found.unpaired if one.where == "both"]
    if not both:
        return (
            f"{found.run.path} and {ref.path} have nothing in common: no tensor could be compared."
        )
    shared = len({one.name for one in both})
    return (
        f"{found.run.path} and {ref.path} share {_many(shared, 'name')}, and not one tensor could "
        f"be compared: {both[0].reason}."
    )


def _not_compared(found: RunComparison) -> Iterator[str]:
    if not found.unpaired or not found.pairs or _only_more(found):
        return
    total = len(found.pairs) + found.not_compared
    said = f"{found.not_compared:,} of {total:,} tensors could not be compared: "
    said += ", ".join(counted(found.unpaired))
    kinds: tuple[Kind, ...] = ("damaged", "unwritten", "conflict", "shape", "unknown")
    worst = [one for kind in kinds for one in found.of_kind(kind)[:1]]
    first = f" (first: {worst[0].name}: {worst[0].reason})" if worst else ""
    yield f"{said}{first}."


def _only_statistics(found: RunComparison) -> Iterator[str]:
    """Statistics show what a difference is at least; that they show none proves nothing."""
    some = sum(pair.by == "statistics" for pair in found.pairs)
    if not some or found.divergences:
        return
    only = f"{some:,} of {len(found.pairs):,} tensors have statistics only"
    if found.undecided:
        yield (
            f"{only}, which show what a difference is at least: of {len(found.undecided):,} that "
            "differ they do not tell whether it is beyond the limit. This preset needs values "
            "(values='full' or 'sample')."
        )
    else:
        yield f"{only}, which show what a difference is at least: they agree as far as these tell."


def _other_data(found: RunComparison) -> Iterator[str]:
    """Were the models given other inputs?"""
    names = [pair.name for pair in found.pairs if pair.max_abs > 0 and _is_data(pair)]
    names += [one.name for one in found.of_kind("shape") if Tensor.of(one.name).is_from_outside]
    if names:
        yield f"The runs were given other data: {names[0]} differs."


def _is_data(pair: Pair) -> bool:
    """Something the whole model was given, or the indices that the embedding was."""
    tensor = Tensor.of(pair.name)
    ids = (tensor.module, tensor.name) == ("embed", "input") and not eps(pair.ref.dtype)
    mask = "mask" in tensor.name
    return tensor.phase == "forward" and (tensor.is_from_outside or ids) and not mask


def _suspiciously_equal(ref: RunFacts, run: RunFacts, pairs: Sequence[Pair]) -> Iterator[str]:
    exactly = all(pair.by == "values" for pair in pairs)
    how = "bitwise equal" if exactly else "equal in everything that was captured"
    if ref.contradicts(run):
        yield (
            f"{ref.path} claims {ref.claim} and {run.path} claims {run.claim}, but all "
            f"{len(pairs):,} tensors are {how}: one of them is not what it says, or the mode "
            "does nothing here."
        )


def twins(runs: Sequence[RunComparison]) -> Mapping[int, str]:
    """Warnings on runs, by place, that equal an earlier one and claim to be something else."""
    found: dict[int, str] = {}
    for (_, one), (place, two) in combinations(enumerate(runs), 2):
        if place not in found and one.run.contradicts(two.run) and _equally_far(one, two):
            found[place] = (
                f"{one.run.path} claims {one.run.claim} and {two.run.path} claims "
                f"{two.run.claim}, but they differ from REF by the same numbers in all "
                f"{len(two.pairs):,} tensors: one of them is not what it says, or the modes do "
                "the same here."
            )
    return found


def _equally_far(one: RunComparison, two: RunComparison) -> bool:
    """Is everything that was measured of both the same, and not nothing?"""
    mine, theirs = ({p.at: (p.metrics, p.bounds) for p in run.pairs} for run in (one, two))
    return mine == theirs and not all(pair.equal for pair in one.pairs)


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


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
