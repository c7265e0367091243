"""tensortap for AWS Neuron and XLA devices. Nothing works here yet: it adds no backend.

Planned: a backend that reduces and copies tensors of lazy XLA devices, and taps for compiled
models of NxD Inference. Until then capture the same model on the CPU or a GPU.
"""

__version__ = "0.1.0"
