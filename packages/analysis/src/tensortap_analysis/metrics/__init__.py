"""All metrics between two tensors, block by block: two passes, memory for a few blocks."""

from tensortap_analysis.metrics.likeness import bhattacharyya
from tensortap_analysis.metrics.measuring import change, measure, measure_tensors
from tensortap_analysis.metrics.result import ErrorHistogram, Metrics, Octaves, Side

__all__ = [
    "ErrorHistogram",
    "Metrics",
    "Octaves",
    "Side",
    "bhattacharyya",
    "change",
    "measure",
    "measure_tensors",
]
