"""Quamba's W8A8 modes of Mamba, emulated on Hugging Face's `MambaForCausalLM` without its kernels.

    from tensortap_hf import modes, quamba

    scales = quamba.calibrate(model, samples)
    with modes.apply(model, "2-1", calibration=scales), tensortap.attach(model, "runs/2-1"):
        model(input_ids)
    quamba.unrotate(run.tensor("layers.0/forward/output"))

What is emulated: calibration, folded norms, Hadamard rotation, int8 weights and static scales, the
arithmetic of int8 products, convolution and scan with their roundings, and the order of the
scan. What is not: int8 embeddings and output layers, W4 weights, Quamba2's Mamba2. Source: the
papers arXiv 2410.13229 and 2601.09451 and their public code.
"""

from tensortap_hf.quamba.calibration import calibrate
from tensortap_hf.quamba.reading import values
from tensortap_hf.quamba.rotation import is_residual, unrotate
from tensortap_hf.quamba.scales import LayerScales, Scales

__all__ = ["LayerScales", "Scales", "calibrate", "is_residual", "unrotate", "values"]
