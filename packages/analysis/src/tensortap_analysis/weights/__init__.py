"""Which weights of a checkpoint are sick, before anything runs: no model code, no data."""

from tensortap_analysis.weights.options import METHODS, Options
from tensortap_analysis.weights.result import Facts, ReportError, ScanResult
from tensortap_analysis.weights.scope import Scope
from tensortap_analysis.weights.sources import CheckpointError, Skipped, Source
from tensortap_analysis.weights.weight import Kind, Weight

__all__ = [
    "METHODS",
    "CheckpointError",
    "Facts",
    "Kind",
    "Options",
    "ReportError",
    "ScanResult",
    "Scope",
    "Skipped",
    "Source",
    "Weight",
]
