"""Where weights come from: files of several kinds and live modules, read tensor by tensor."""

from tensortap_analysis.weights.sources.opening import open_source
from tensortap_analysis.weights.sources.source import CheckpointError, Skipped, Source

__all__ = ["CheckpointError", "Skipped", "Source", "open_source"]
