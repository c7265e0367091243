"""What is measured of a matrix of weights; `weights/weight.py` has the contract."""

from tensortap_analysis.weights.measures.measuring import measure

__all__ = ["measure"]
