"""What to do with scanned weights: the number format each layer bears, what can be smaller."""

from tensortap_analysis.weights.recommend.classic import generate_quant_config, suggest_compression

__all__ = ["generate_quant_config", "suggest_compression"]
