"""Presets: what counts as agreement. A pair and its limits give a `Judgement`, without any run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tensortap.errors import ConfigError
from tensortap_analysis.judging.judgement import Judgement, Limits, Preset
from tensortap_analysis.judging.noise import NOISE
from tensortap_analysis.judging.rounding import eps, expected, largest
from tensortap_analysis.judging.thresholds import CLASSIC, PORT
from tensortap_analysis.pairs.pair import Pair

__all__ = ["PRESETS", "Judgement", "Limits", "Preset", "judged", "preset"]

PRESETS: Mapping[str, Preset] = {found.name: found for found in (NOISE, CLASSIC, PORT)}
_LIKENESSES = ("bhattacharyya", "correlation", "cosine")


def preset(name: str, thresholds: Limits | None = None) -> Preset:
    """The preset of this name, some thresholds replaced; raises `ConfigError` for unknown ones."""
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; there are {_listed(PRESETS)}.")
    found = PRESETS[name]
    for key, value in (thresholds or {}).items():
        if key not in found.limits:
            known = _listed(found.limits)
            raise ConfigError(f"The preset {name} has no threshold {key!r}; it has {known}.")
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"A threshold is a number above 0, and {key}={value} is none.")
        if key in _LIKENESSES and value >= 1:
            raise ConfigError(f"{key} is a likeness, below 1, and {key}={value:g} is not.")
    return replace(found, limits={**found.limits, **(thresholds or {})})


def _listed(words: Iterable[str]) -> str:
    return ", ".join(map(repr, words))


def judged(pairs: Iterable[Pair], by: Preset) -> tuple[Judgement, ...]:
    """A judgement for each pair; pairs in execution order."""
    pairs = list(pairs)
    floors = expected(pairs)
    return tuple(_judged(pair, by, floor) for pair, floor in zip(pairs, floors, strict=True))


def _judged(pair: Pair, by: Preset, floor: float) -> Judgement:
    if pair.nonfinite:
        return Judgement(math.inf, "NaN or infinity on one side only")
    if pair.equal:
        return Judgement(0.0, "equal" if pair.by != "statistics" else "equal statistics")
    if _is_mask(pair):
        return Judgement(0.0, "a mask: the largest number of each dtype")
    if pair.by == "statistics":
        return _by_statistics(pair, by, floor)
    if pair.max_abs == 0:
        return Judgement(0.0, "equal values")  # in another dtype, or zeros of another sign
    return by.judge(pair, by.limits, floor)


def _by_statistics(pair: Pair, by: Preset, floor: float) -> Judgement:
    """By the least that the difference must be; that is beyond, or says nothing."""
    found = by.judge(pair, by.limits, floor)
    if not found.within:
        return replace(found, grade=f"{found.grade}, at least")
    grade = "statistics differ, and do not tell" if by.needs_values else "nothing in the statistics"
    return replace(found, grade=grade, decided=not by.needs_values)


def _is_mask(pair: Pair) -> bool:
    """Do both hold the largest number of their own dtype, in place of infinity, and agree else?"""
    sides = ((pair.ref, pair.metrics.ref), (pair.other, pair.metrics.other))
    steps = [eps(half.dtype) for half, _ in sides]
    return (
        pair.ref.dtype != pair.other.dtype
        and all(steps)
        and all(side.absmax == largest(half.dtype) for half, side in sides)
        and pair.error <= max(steps)
    )
