"""`tensortap modes`: numeric variants of one model, captured on the same inputs and compared."""

import typer

from tensortap_hf.command.capture import capture
from tensortap_hf.command.listing import list_modes

app = typer.Typer(
    help="Numeric variants of a Hugging Face model: capture them on the same inputs, and compare.",
    no_args_is_help=True,
)
app.command(name="list")(list_modes)
app.command(name="capture")(capture)
