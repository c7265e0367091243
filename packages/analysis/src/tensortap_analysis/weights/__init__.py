"""Which weights of a checkpoint are sick, before anything runs: no model code, no data."""

from tensortap_analysis.weights.options import METHODS, Options
from tensortap_analysis.weights.weight import Kind, Weight

__all__ = ["METHODS", "Kind", "Options", "Weight"]
