"""tensortap for AWS Neuron and XLA devices.

The backends are found by the device of a tensor: `xla` for lazy tensors of torch_xla, `neuron`
for the native device of TorchNeuron.
"""

__version__ = "0.1.0"
