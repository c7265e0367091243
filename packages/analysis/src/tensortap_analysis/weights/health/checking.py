"""`health_check`: what is wrong with the weights of a scan, and how well they are altogether."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tensortap.errors import ConfigError
from tensortap_analysis.weights.health import classic, default, gains, peers
from tensortap_analysis.weights.health.issue import (
    SEVERITIES,
    Issue,
    Limits,
    Rule,
    Severity,
    layers_of,
    limits_with,
    peers_of,
)
from tensortap_analysis.weights.options import METHODS
from tensortap_analysis.weights.result import ScanResult
from tensortap_analysis.weights.saved import encoded
from tensortap_analysis.weights.scope import Scope

GOOD, FAIR = 80, 60


@dataclass(frozen=True, slots=True)
class Preset:
    """Rules, their limits, and how issues make a score from 0 to 100.

    Those that compare are given peers, too: weights beside a selection, to hold it against.
    """

    rules: Mapping[str, Rule]
    comparing: Mapping[str, Rule]
    limits: Limits
    score: Callable[[Sequence[Issue], int], float]


_COMPARING: Mapping[str, Rule] = {"norm": peers.norms, **gains.RULES}
PRESETS: Mapping[str, Preset] = {
    "default": Preset(default.RULES, _COMPARING, default.LIMITS, default.score),
    "classic": Preset(classic.RULES, _COMPARING, classic.LIMITS, classic.score),
}


@dataclass(frozen=True, slots=True)
class Health:
    """Issues, the worst first within each severity, and the score they make.

    `unresolved` counts the layers whose condition number the stored dtype cannot resolve,
    `unmeasured` names the methods that the scan was without: their rules found nothing to judge.
    `unjudged` are sentences on what a rule could not judge, or only by less.
    """

    score: float
    issues: Mapping[Severity, tuple[Issue, ...]]
    preset: str
    layers: int
    unresolved: int = 0
    unmeasured: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """`good` from 80, `improve` from 60, `do not deploy` below."""
        if self.score >= GOOD:
            return "good"
        return "improve" if self.score >= FAIR else "do not deploy"

    def at_least(self, severity: Severity) -> list[Issue]:
        """Issues of this severity and of worse ones."""
        worse = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return [issue for one in worse for issue in self.issues[one]]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {
            "preset": self.preset,
            "score": self.score,
            "verdict": self.verdict,
            "layers": self.layers,
            "unresolved_condition_numbers": self.unresolved,
            "unmeasured": list(self.unmeasured),
            "unjudged": list(self.unjudged),
            "issues": {
                severity: [encoded(asdict(issue)) for issue in issues]
                for severity, issues in self.issues.items()
            },
        }


def health(
    result: ScanResult, preset: str = "default", thresholds: Mapping[str, float] | None = None
) -> Health:
    """Judge a scan; needs no weights. `thresholds` replace limits of the preset one by one.

    Raises `ConfigError` for a preset or threshold there is not.
    """
    by, limits = check_preset(preset, thresholds or {})
    layers = layers_of(result)
    every = [*layers, *peers_of(result)]
    issues = [issue for rule in by.rules.values() for issue in rule(layers, limits)]
    compared = [issue for rule in by.comparing.values() for issue in rule(every, limits)]
    issues += [issue for issue in compared if issue.layer in result.facts]
    ranked = sorted(issues, key=lambda issue: -issue.excess)
    matrices = [layer for layer in layers if not layer.vector]
    return Health(
        score=by.score(issues, len(matrices)),
        issues={one: tuple(i for i in ranked if i.severity == one) for one in SEVERITIES},
        preset=preset,
        layers=len(matrices),
        unresolved=sum(
            layer.unresolved("spectral", "condition_number") is not None for layer in matrices
        ),
        unmeasured=tuple(name for name in METHODS if name not in result.methods),
        unjudged=tuple(peers.unjudged(every)),
    )


def health_check(
    model: str | os.PathLike[str] | nn.Module | ScanResult,
    preset: str = "default",
    thresholds: Mapping[str, float] | None = None,
) -> tuple[float, dict[Severity, list[Issue]]]:
    """Score and issues by severity, of a saved report (`.json`), a scan, or a model to scan.

    An index of shards (`.index.json`) is a model.

    score, issues = health_check("report.json")
    for issue in issues["critical"]:
        print(issue)
    """
    found = health(_scanned(model), preset, thresholds)
    return found.score, {severity: list(some) for severity, some in found.issues.items()}


def _scanned(model: str | os.PathLike[str] | nn.Module | ScanResult) -> ScanResult:
    if isinstance(model, ScanResult):
        return model
    if isinstance(model, nn.Module) or not _report(Path(model).name):
        return Scope(model).scan()
    return ScanResult.load(model)


def _report(name: str) -> bool:
    return name.endswith(".json") and not name.endswith(".index.json")


def check_preset(name: str, thresholds: Mapping[str, float]) -> tuple[Preset, Limits]:
    """The preset, and its limits with some replaced; raises `ConfigError`."""
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
    found = PRESETS[name]
    return found, limits_with(name, found.limits, thresholds)
