"""Gains of normalisations: zeros, those that exploded or vanished, and single channels of them.

What is assumed: trained gains lie between about 0.02 and 30. Single channels may be far above the
others of their layer (outlier dimensions: Kovaleva et al., "BERT Busters", 2021), and those of
Gemma, which are stored less 1 and do not decay, reach about 300 in the last layers ("Zero-centered
re-parameterization of LayerNorm", ceramic.ai, 2025). So a gain is held against those of the same
role in other depths, tenfold at least; where there are too few of those, against all of the model,
thirtyfold; and where there are too few of these as well, against 300.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tensortap_analysis.weights.health.issue import Issue, Layer, Limits, Rule, Severity, over
from tensortap_analysis.weights.health.places import Largest, largest, where
from tensortap_analysis.weights.roles import FEWEST

LIMITS: Mapping[str, float] = {
    "norm_gain_ratio": 10.0,
    "norm_gain_alone": 30.0,
    "norm_gain_vanished": 100.0,
    "norm_gain_high": 300.0,
}
_GAIN = re.compile(r"(?:^|\.)weight$|norm\w*[._](?:weight|gamma|scale|g)$", re.IGNORECASE)
_NO_GAIN = re.compile(r"prelu|(?:^|[._])act(?:[._]|$)|layer_?scale|(?:^|\.)ls\d?\.", re.IGNORECASE)
_BATCH = re.compile(r"(?:^|[._])(?:bn|batch_?norm)\w*\.", re.IGNORECASE)
_SHORTEST = 8
_Any = TypeVar("_Any")
_USUAL = 3.0
"""A gain up to this is ordinary whatever the others have: they begin at 1."""


@dataclass(frozen=True, slots=True)
class _Gain:
    layer: Layer
    size: float
    """Root mean square, with the offset that the model adds."""
    top: Largest | None

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return float(self.layer.get("norms", "max")) + self.layer.facts.offset


@dataclass(frozen=True, slots=True)
class _Usual:
    """What the others have: medians, how far is too far, and who the others are."""

    size: float
    peak: float
    far: float
    far_peak: float
    others: str


def zero_gains(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """A normalisation whose gains are all 0 gives nothing on: critical.

    Unless all are 0, as where a fresh model stores its gains less 1, or all last ones of residual
    branches (batch normalisations that begin at 0).
    """
    every = [layer for layer in layers if is_gain(layer) and not layer.facts.offset]
    none_left = len(every) > 1 and all(layer.zero for layer in every)
    for some in _by_role(every, lambda layer: layer).values():
        fresh = all(layer.zero and _BATCH.search(layer.facts.name) for layer in some)
        for layer in some:
            if layer.zero:
                yield _zero(layer, none_left=none_left, fresh=fresh)
            else:
                yield from _some_zeros(layer, limits["dead"])


def _zero(layer: Layer, *, none_left: bool, fresh: bool) -> Issue:
    if none_left:
        cause = "All gains of all normalisations are 0, as before training where 1 is added."
        return Issue(layer.name, "zero", "info", cause, "Does the model add 1? Else it is dead.")
    if fresh:
        cause = "All its gains are 0, as where a residual branch begins."
        return Issue(layer.name, "zero", "info", cause, "Was the model trained at all?")
    cause = "All its gains are 0: what reads it sees nothing of its input."
    remedy = "Was it loaded, and initialised? Compare names with those of the model."
    return Issue(layer.name, "zero", "critical", cause, remedy, 0.0, 0.0, math.inf)


def _some_zeros(layer: Layer, limit: float) -> Iterator[Issue]:
    count = layer.get("sparsity", "zeros")
    if count and count > limit * layer.facts.numel:
        at = where(layer, "sparsity", "dead_columns", count)
        cause = f"{count:,} of its {layer.facts.numel:,} gains are 0{at}: nothing passes there."
        remedy = "Was it pruned? Else look for a weight decay on gains."
        share = count / layer.facts.numel
        yield Issue(layer.name, "dead gains", "warning", cause, remedy, share, limit,
                    over(share, limit))  # fmt: skip


def sizes(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """Gains far from those of their peers, as a whole or in one channel."""
    every = [gain for layer in layers if (gain := _gain(layer)) is not None]
    of_all = _of_all(every, limits)
    for role, some in _by_role(every, lambda gain: gain.layer).items():
        usual = _of_role(role, some, limits) if len(some) >= FEWEST else of_all
        for gain in some:
            yield from _judged(gain, of_all if gain.layer.name == role else usual, limits)


def _by_role(some: Iterable[_Any], layer: Callable[[_Any], Layer]) -> dict[str, list[_Any]]:
    roles: dict[str, list[_Any]] = {}
    for one in some:
        roles.setdefault(layer(one).role, []).append(one)
    return roles


def is_gain(layer: Layer) -> bool:
    """Is it the gain of a normalisation? One axis, `weight`, and not the name of something else."""
    facts = layer.facts
    if facts.kind != "vector" or len(facts.shape) != 1 or facts.numel < _SHORTEST:
        return False
    return bool(_GAIN.search(facts.name)) and not _NO_GAIN.search(facts.name)


def _gain(layer: Layer) -> _Gain | None:
    mean, std, top = layer.get("norms", "mean"), layer.get("norms", "std"), largest(layer)
    if not is_gain(layer) or mean is None or std is None:
        return None
    size = math.hypot(mean + layer.facts.offset, std)
    return _Gain(layer, size, top) if 0 < size < math.inf else None


def _of_role(role: str, gains: Sequence[_Gain], limits: Limits) -> _Usual:
    far = max(limits["norm_gain_ratio"], _spread([one.size for one in gains], limits))
    far_peak = max(limits["norm_gain_alone"], _spread([one.peak for one in gains], limits))
    return _Usual(*_medians(gains), far, far_peak, f"the other {role}")


def _of_all(gains: Sequence[_Gain], limits: Limits) -> _Usual | None:
    """`None` where there are too few."""
    if len(gains) <= FEWEST:
        return None
    far, far_peak = limits["norm_gain_alone"], limits["norm_critical"]
    return _Usual(*_medians(gains), far, far_peak, "all normalisations")


def _medians(gains: Sequence[_Gain]) -> tuple[float, float]:
    return statistics.median(g.size for g in gains), statistics.median(g.peak for g in gains)


def _spread(values: Sequence[float], limits: Limits) -> float:
    """So many times the median are ordinary: `norm_spreads` median deviations of the logarithm."""
    logs = [math.log(value) for value in values]
    median = statistics.median(logs)
    return math.exp(
        min(limits["norm_spreads"] * statistics.median(abs(x - median) for x in logs), 700.0)
    )


def _judged(gain: _Gain, usual: _Usual | None, limits: Limits) -> Iterator[Issue]:
    if usual is None:
        if gain.size > limits["norm_gain_high"]:
            yield _exploded(gain, gain.size, limits["norm_gain_high"], "")
        return
    in_one = gain.top is not None and gain.top.times > limits["norm_critical"]
    ratio, peaks = gain.size / usual.size, gain.peak / usual.peak
    if in_one and peaks > usual.far_peak and gain.peak > limits["norm_gain_alone"]:
        yield _one_channel(gain, peaks, usual)
    elif ratio > usual.far and gain.size > _least(usual, limits):
        severe = ratio > max(limits["norm_critical"], usual.far)
        yield _exploded(gain, ratio, usual.far, _than(ratio, usual), severe=severe)
    elif ratio * max(limits["norm_gain_vanished"], usual.far) < 1:
        limit = 1 / max(limits["norm_gain_vanished"], usual.far)
        cause = f"Its gains are {gain.size:.3g}{_than(ratio, usual)}: it has vanished."
        remedy = "Check its initialisation, its weight decay, and whether gradients reach it."
        yield Issue(gain.layer.name, "gain", "warning", cause, remedy, ratio, limit, limit / ratio)


def _least(usual: _Usual, limits: Limits) -> float:
    return _USUAL if usual.far < limits["norm_gain_alone"] else limits["norm_gain_alone"]


def _than(ratio: float, usual: _Usual) -> str:
    times = f"{ratio:.3g}x" if ratio > 1 else f"1/{1 / ratio:.3g} of"
    return f", {times} the median of {usual.others} ({usual.size:.3g})"


def _exploded(gain: _Gain, value: float, limit: float, than: str, *, severe: bool = False) -> Issue:
    cause = f"Its gains are {gain.size:.3g} in the root mean square{than}: it has exploded."
    severity: Severity = "critical" if severe else "warning"
    return Issue(gain.layer.name, "gain", severity, cause, _EXPLODED, value, limit,
                 over(value, limit))  # fmt: skip


def _one_channel(gain: _Gain, ratio: float, usual: _Usual) -> Issue:
    cause = (
        f"{gain.top}, and {ratio:.3g}x the largest of {usual.others} (median {usual.peak:.3g}): "
        "one channel drowns all others."
    )
    return Issue(gain.layer.name, "gain", "warning", cause, _EXPLODED, ratio, usual.far_peak,
                 ratio / usual.far_peak)  # fmt: skip


_EXPLODED = (
    "Clip gradients and lower its learning rate; or is this copy damaged? Compare with another."
)

RULES: Mapping[str, Rule] = {"zero gains": zero_gains, "gain": sizes}
