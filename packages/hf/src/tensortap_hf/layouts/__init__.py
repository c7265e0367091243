"""The file layouts of older scripts: `layer-npy` and `first-layer-npz`."""

from tensortap_hf.layouts.first_layer import FIRST_LAYER_NPZ
from tensortap_hf.layouts.layer_npy import LAYER_NPY

__all__ = ["FIRST_LAYER_NPZ", "LAYER_NPY"]
