"""Number formats: codes, scales and values on the grid of each, bit for bit.

    codec = formats.get("mxfp4")
    q = codec.quantize(x, axis=-1)          # q.codes, q.scales
    codec.dequantize(q)
    codec.fake_quantize(x, axis=-1)         # the same at once, in the dtype of x

Works on tensors of any floating-point dtype, shape and layout, on CPU and GPU.
"""

from tensortap.formats.codec import Codec, Quantized
from tensortap.formats.packing import pack, unpack
from tensortap.formats.registry import get, names
from tensortap.formats.table import Properties, table

__all__ = ["Codec", "Properties", "Quantized", "get", "names", "pack", "table", "unpack"]
