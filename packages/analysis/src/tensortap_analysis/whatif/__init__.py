"""What each number format would do to the tensors of a run, without running the model again."""

from tensortap_analysis.whatif.judging import FORMATS, Expected, WhatIf, expected, what_if

__all__ = ["FORMATS", "Expected", "WhatIf", "expected", "what_if"]
