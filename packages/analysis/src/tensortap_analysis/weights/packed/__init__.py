"""Weights that a checkpoint keeps quantised: their values, where codes and scales give them."""

from tensortap_analysis.weights.packed.finding import unpacked

__all__ = ["unpacked"]
