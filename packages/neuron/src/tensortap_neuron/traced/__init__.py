"""Models that NxD and NxDI trace and compile: tensors must be graph outputs to be captured.

`prepare` turns a selection into what to compile, `Capture.hook` writes what comes back into a run.
"""

from tensortap_neuron.traced.application import Application, application
from tensortap_neuron.traced.capture import Capture
from tensortap_neuron.traced.choosing import EVERY_LAYER, HIDDEN_STATES, prepare
from tensortap_neuron.traced.hook import TracedHook

__all__ = [
    "EVERY_LAYER",
    "HIDDEN_STATES",
    "Application",
    "Capture",
    "TracedHook",
    "application",
    "prepare",
]
