"""Presets: what counts as agreement. A pair and its limits give a `Judgement`, without any run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tensortap.errors import ConfigError, nearest
from tensortap_analysis.metrics import Metrics, bhattacharyya
from tensortap_analysis.pairs import Pair
from tensortap_analysis.rounding import eps, expected, largest

Limits = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a pair is within its limits, and by how much.

    `excess` is the worst measure in units of its limit: beyond where it is 1 or more, 0 for equal
    tensors, infinite for NaN or infinity on one side only. `grade` says it in words. `estimated`:
    the limit is an estimate of what rounding does, not a measured noise.
    """

    excess: float
    grade: str
    estimated: bool = False

    @property
    def within(self) -> bool:
        """Does the pair agree, by these limits?"""
        return self.excess < 1


@dataclass(frozen=True, slots=True)
class Preset:
    """A way to judge, and its thresholds, which can be replaced one by one."""

    name: str
    says: str
    limits: Limits
    judge: Callable[[Pair, Limits, float], Judgement]


def preset(name: str, thresholds: Limits | None = None) -> Preset:
    """The preset of this name, some thresholds replaced; raises `ConfigError` for unknown ones."""
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; there are {nearest(name, PRESETS)}.")
    found = PRESETS[name]
    for key, value in (thresholds or {}).items():
        if key not in found.limits:
            known = nearest(key, found.limits)
            raise ConfigError(f"The preset {name} has no threshold {key!r}; it has {known}.")
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"A threshold is a number above 0, and {key}={value} is none.")
    return Preset(name, found.says, {**found.limits, **(thresholds or {})}, found.judge)


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
    found = by.judge(pair, by.limits, floor)
    if pair.by == "statistics":
        at_least = f"{found.grade}, at least" if not found.within else "nothing in the statistics"
        return Judgement(found.excess, at_least, found.estimated)
    return found


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


def _classic(pair: Pair, limits: Limits, floor: float) -> Judgement:
    """Words of the older tools: for the MSE by powers of ten, for the correlation by nines."""
    mse = pair.rmse**2
    steps = (mse < limits["mse"] / 100, mse < limits["mse"] / 10, mse < limits["mse"])
    words = [next((w for w, ok in zip(_SIZES, steps, strict=True) if ok), "large")]
    excess = mse / limits["mse"]
    correlation = pair.metrics.correlation
    if correlation is not None:
        miss, most = 1 - correlation, 1 - limits["correlation"]
        nines = (miss < most / 100, miss < most / 10, miss < most)
        words.append(next((w for w, ok in zip(_NINES, nines, strict=True) if ok), "look at it"))
        excess = max(excess, miss / most)
    return Judgement(excess, ", ".join(words))


_SIZES = ("very close", "good", "fair")
_NINES = ("near perfect", "excellent", "good")


def _port(pair: Pair, limits: Limits, floor: float) -> Judgement:
    metrics = pair.metrics
    measures = {"max abs": pair.max_abs / limits["max_abs"]}
    if metrics.mae is not None:
        measures["mean abs"] = metrics.mae / limits["mean_abs"]
    if metrics.cosine is not None:
        measures["cosine"] = (1 - metrics.cosine) / (1 - limits["cosine"])
    word, excess = max(measures.items(), key=lambda item: item[1])
    return Judgement(excess, "good" if excess < 1 else f"{word} {excess:.3g}x its limit")


def _noise(pair: Pair, limits: Limits, floor: float) -> Judgement:
    """The error in units of the error that the noise run makes at the same tensor.

    Where the noise run happens to be closer than one rounding of its own dtype, that rounding
    counts. A run that is closer to the reference than the noise is never blamed for the shape of
    its errors. Without noise the estimate of `rounding` stands in.
    """
    noise = pair.noise
    if noise is None or noise.nonfinite or noise.by != pair.by:
        return _estimated(pair, limits, floor)
    rounding = max(eps(noise.ref.dtype), eps(noise.other.dtype)) * 0.21
    accepted = max(noise.rmse, rounding * (pair.metrics.ref.rms or 0.0))
    if pair.by == "statistics":  # of both errors only the least is known: the floor steadies them
        accepted = max(accepted, floor * (pair.metrics.ref.rms or 0.0))
    ratio = pair.rmse / accepted if accepted else math.inf
    excess, grade = ratio / limits["ratio"], f"{ratio:.3g}x the noise"
    likeness = bhattacharyya(pair.metrics, noise.metrics) if pair.by != "statistics" else None
    if likeness is not None and ratio > 1 and noise.rmse >= accepted:
        lost = 1 - likeness - _by_chance(pair.metrics, noise.metrics)
        unlike = lost / (1 - limits["bhattacharyya"])
        if unlike >= 1 and unlike > excess:
            grade += f", errors spread unlike it (Bhattacharyya {likeness:.4f})"
        excess = max(excess, unlike)
    return Judgement(excess, grade)


def _estimated(pair: Pair, limits: Limits, floor: float) -> Judgement:
    if floor == 0:
        return Judgement(math.inf, "values that are not rounded differ", estimated=True)
    ratio = pair.error / floor
    return Judgement(ratio / limits["ratio"], f"{ratio:.3g}x rounding (estimate)", estimated=True)


def _by_chance(one: Metrics, two: Metrics) -> float:
    """What samples of one distribution lose of their coefficient, at most once in 1000 times.

    On average they lose a third of it, by simulation with 64 to 10,000 normal errors.
    """
    bins = max(_bins(one), _bins(two))
    return bins * (1 / one.compared + 1 / two.compared) / 2


def _bins(metrics: Metrics) -> int:
    found = metrics.error_histogram.absolute
    return len(found.negative) + len(found.positive) + bool(found.zero)


PRESETS: Mapping[str, Preset] = {
    found.name: found
    for found in (
        Preset(
            "noise",
            "error over the noise run's, or an estimate of rounding without one",
            {"ratio": 1.5, "bhattacharyya": 0.99},
            _noise,
        ),
        Preset("classic", "MSE and correlation", {"mse": 1e-2, "correlation": 0.99}, _classic),
        Preset(
            "port",
            "largest and mean difference, cosine",
            {"max_abs": 0.01, "mean_abs": 0.001, "cosine": 0.99},
            _port,
        ),
    )
}
