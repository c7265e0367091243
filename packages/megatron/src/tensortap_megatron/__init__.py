"""tensortap for Megatron-LM. Nothing works here yet: installing it adds no integration.

Planned: canonical names and placements of tensor-, pipeline-, context- and expert-parallel
models, taps inside linear layers and the attention core, and `quantize(model, format)`. Until
then `tensortap.attach` takes a Megatron model under its native names, one rank at a time.
"""

__version__ = "0.1.0"
