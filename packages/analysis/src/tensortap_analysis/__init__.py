"""What captured runs say: where two of them first disagree, and whether that is more than noise."""

from tensortap_analysis.comparison.comparing import compare
from tensortap_analysis.comparison.result import Comparison, RunComparison
from tensortap_analysis.divergence.parting import Divergence
from tensortap_analysis.judging.presets import Judgement
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.pairs.pairing import Unpaired

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
