"""The preset `noise`: errors in units of the error that must be accepted."""

from __future__ import annotations

import math

from tensortap_analysis.judging.chance import (
    FEW,
    larger,
    larger_by_chance,
    lost_likeness,
    rms_ratio,
)
from tensortap_analysis.judging.judgement import Judgement, Limits, Preset
from tensortap_analysis.judging.rounding import once
from tensortap_analysis.metrics import bhattacharyya
from tensortap_analysis.pairs.pair import Pair


def usable(pair: Pair) -> Pair | None:
    """The noise beside a pair, where it was measured in the same way and is finite."""
    noise = pair.noise
    if noise is None or noise.nonfinite:
        return None
    alike = (noise.by == "statistics") == (pair.by == "statistics")
    return noise if alike else None


def _noise(pair: Pair, limits: Limits, floor: float) -> Judgement:
    """The error in units of the error that the noise run makes at the same tensor.

    Where the noise run happens to be closer than one rounding of its own dtype, that rounding
    counts. Few values are allowed the scatter that they have by chance. A run that is closer to
    the reference than the noise may have errors of another shape, but not more than a few that are
    larger than all of the noise's: one broken channel hides in the RMS of many good ones. Without
    noise the estimate of `rounding` stands in.
    """
    noise = usable(pair)
    if noise is None:
        return _estimated(pair, limits, floor)
    accepted = max(noise.rmse, _least(pair, noise, floor))
    ratio = _over(pair.rmse, accepted)
    values = min(pair.metrics.compared, noise.metrics.compared)
    allowed = limits["ratio"] * rms_ratio(values)
    excess, grade = ratio / allowed, f"{ratio:.3g}x the noise"
    if values < FEW:
        grade += f" (few values: up to {allowed:.3g}x accepted)"
    elif noise.rmse >= accepted and pair.by != "statistics":
        unlike = _unlike(pair, noise, limits) if ratio > 1 else _standing_out(pair, noise)
        if unlike:
            grade, excess = f"{grade}, {unlike}", max(excess, 1.0)
    return Judgement(excess, grade)


def _unlike(pair: Pair, noise: Pair, limits: Limits) -> str | None:
    """In words, that errors are spread otherwise than the noise's."""
    likeness = bhattacharyya(pair.metrics, noise.metrics) or 0.0
    lost = 1 - likeness - lost_likeness(pair.metrics, noise.metrics)
    if lost < 1 - limits["bhattacharyya"]:
        return None
    return f"spread unlike it (Bhattacharyya {likeness:.3f})"


def _standing_out(pair: Pair, noise: Pair) -> str | None:
    """In words, that more errors than chance allows are larger than all of the noise's."""
    count = larger(pair.metrics, noise.metrics)
    if count < larger_by_chance(pair.metrics, noise.metrics):
        return None
    return f"but {count:,} values stand out beyond its largest error"


def _least(pair: Pair, noise: Pair, floor: float) -> float:
    """What is accepted of the RMS error, however small the noise is."""
    relative = max(once(noise.ref.dtype), once(noise.other.dtype))
    if pair.by == "statistics":  # of both errors only the least is known: the floor steadies them
        relative = max(relative, floor)
    return relative * (pair.metrics.ref.rms or 0.0)


def _estimated(pair: Pair, limits: Limits, floor: float) -> Judgement:
    if floor == 0:
        differs = pair.error > 0
        return Judgement(math.inf, "integers differ") if differs else Judgement(0.0, "equal")
    ratio = pair.error / floor
    return Judgement(ratio / limits["ratio"], f"{ratio:.3g}x rounding (estimate)", estimated=True)


def _over(error: float, accepted: float) -> float:
    if accepted:
        return error / accepted
    return math.inf if error else 0.0


NOISE = Preset(
    "noise",
    "error over the noise run's, where there is one, else over an estimate of rounding",
    {"ratio": 1.5, "bhattacharyya": 0.99},
    _noise,
)
