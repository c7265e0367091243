"""What captured runs say: where two of them first disagree, and whether that is more than noise."""

from tensortap_analysis.comparing import compare
from tensortap_analysis.comparison import Comparison, RunComparison
from tensortap_analysis.divergence import Divergence
from tensortap_analysis.pairing import Unpaired
from tensortap_analysis.pairs import Pair
from tensortap_analysis.presets import Judgement

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Divergence",
    "Judgement",
    "Pair",
    "RunComparison",
    "Unpaired",
    "compare",
]
