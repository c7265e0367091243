"""What changed between checkpoints: how far each layer went, and which did so oddly."""

from tensortap_analysis.weights.drift.changes import change

__all__ = ["change"]
