"""What is wrong with scanned weights, how bad it is, and what to do about it."""

from tensortap_analysis.weights.health.checking import (
    PRESETS,
    Health,
    check_preset,
    health,
    health_check,
)
from tensortap_analysis.weights.health.issue import SEVERITIES, Issue, Severity

__all__ = [
    "PRESETS",
    "SEVERITIES",
    "Health",
    "Issue",
    "Severity",
    "check_preset",
    "health",
    "health_check",
]
