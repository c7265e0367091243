"""tensortap for Megatron-core: sharded names and placements, and quantised training.

`tensortap.attach(model)` finds this package by itself. `quantize` trains in a number format,
`MegatronPtSink` writes one file a tensor under the names of older tools.
"""

from tensortap_megatron.layout import MegatronPtSink
from tensortap_megatron.quantization import quantize

__all__ = ["MegatronPtSink", "__version__", "quantize"]

__version__ = "0.1.0"
