"""`tensortap modes`: numeric variants of one model, captured on the same inputs and compared."""

import typer

from tensortap_hf.command.capture import capture
from tensortap_hf.command.compare import compare
from tensortap_hf.command.first_layer import first_layer
from tensortap_hf.command.listing import list_modes

app = typer.Typer(
    help="Numeric variants of a Hugging Face model: capture them on the same inputs, and compare.",
    no_args_is_help=True,
)
app.command(name="list")(list_modes)
app.command(name="capture")(capture)
app.command(name="first-layer")(first_layer)
app.command(name="compare")(compare)
