"""File layouts: captures of NxDI and of vLLM-Neuron, and the layer files of an older guide."""

from tensortap_neuron.layouts.layers_pt import LAYERS_PT
from tensortap_neuron.layouts.nxdi import NXDI
from tensortap_neuron.layouts.vllm import VLLM_NEURON

__all__ = ["LAYERS_PT", "NXDI", "VLLM_NEURON"]
