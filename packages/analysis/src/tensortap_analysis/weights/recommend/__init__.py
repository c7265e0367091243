"""What to do with scanned weights: the number format each layer bears, what can be smaller."""

from tensortap_analysis.weights.recommend.classic import generate_quant_config, suggest_compression
from tensortap_analysis.weights.recommend.compressing import LowRank, compression_plan
from tensortap_analysis.weights.recommend.quantizing import Choice, QuantPlan, quant_plan
from tensortap_analysis.weights.recommend.schemes import SCHEMES

__all__ = [
    "SCHEMES",
    "Choice",
    "LowRank",
    "QuantPlan",
    "compression_plan",
    "generate_quant_config",
    "quant_plan",
    "suggest_compression",
]
