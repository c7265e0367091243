"""Fake quantisation of Megatron-core models: every matrix product on the grid of a number format.

    with quantize(model, "mxfp4"):
        train_step()

What is quantised: the linear layers and the two products of the attention core, each in forward
and in both products of its backward. What is not: additions (bias, residual), norms, softmax,
the MoE router, and in a Mamba mixer everything but its two projections (convolution, scan).
Inference that goes around the attention core (flash decoding, dynamic batching) computes those
products as ever. Works on the modules of the local spec, not on those of Transformer Engine.
"""

from tensortap_megatron.quantization.session import Quantization, format_of, quantize

__all__ = ["Quantization", "format_of", "quantize"]
