"""What changed between checkpoints: how far each layer went, and which did so oddly."""

from tensortap_analysis.weights.drift.alerts import LIMITS, alerts, overall_alerts
from tensortap_analysis.weights.drift.changes import change
from tensortap_analysis.weights.drift.tracking import Comparison, Drift, track

__all__ = ["LIMITS", "Comparison", "Drift", "alerts", "change", "overall_alerts", "track"]
