"""`tensortap neuron`: every layer of a full model, and whether its port to Neuron is right."""

import typer

from tensortap_neuron.command.compare import compare
from tensortap_neuron.command.layers import layers

app = typer.Typer(
    help="Every layer's output of a Hugging Face model, on Neuron and elsewhere, and compared.",
    no_args_is_help=True,
)
app.command(name="layers")(layers)
app.command(name="compare")(compare)
