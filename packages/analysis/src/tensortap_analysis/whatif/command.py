"""`tensortap formats`: which tensors survive which number format."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from tensortap.errors import ConfigError, RunError
from tensortap_analysis.options import RunPath, Select, Step
from tensortap_analysis.progress import told, warn
from tensortap_analysis.whatif.files import document, writer
from tensortap_analysis.whatif.judging import FORMATS, WhatIf, what_if
from tensortap_analysis.whatif.tables import show


def formats(
    run: RunPath,
    names: Annotated[
        str, typer.Option("--formats", help="Formats, with commas between them.")
    ] = ",".join(FORMATS),
    select: Select = "*",
    step: Step = None,
    threshold_db: Annotated[
        float, typer.Option(help="The SQNR that a format must reach to be recommended.")
    ] = 20.0,
    limit: Annotated[int, typer.Option(min=0, help="Tensors to print; 0 prints all.")] = 40,
    out: Annotated[
        Path | None, typer.Option(help="Also write all rows to this .csv, .md or .json file.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all rows as JSON instead of a table.")
    ] = False,
) -> None:
    """Print what number formats would do to each tensor: SQNR, and what underflows or overflows.

    The tensors that suffer most come first; `needs` is the format of the fewest stored bits that
    reaches --threshold-db. A ~ marks an estimate from an exponent histogram. Exit 1 when a tensor
    could not be judged, 2 when none could.
    """
    wanted = tuple(dict.fromkeys(word.strip() for word in names.split(",") if word.strip()))
    if not wanted:
        raise ConfigError(f"--formats {names!r} names no format; for example {','.join(FORMATS)}.")
    if math.isnan(threshold_db):
        raise ConfigError("--threshold-db nan: give a number of decibels, for example 20.")
    write = writer(out)
    with told("rounding") as progress:
        found = what_if(
            run, formats=wanted, select=select, step=step,
            progress=lambda done: progress(f"{done:,}"),
        )  # fmt: skip
    if not found.rows:
        raise RunError(f"{run}: no tensor could be judged; {found.skipped[0]}.")
    write(found, threshold_db)
    if as_json:
        sys.stdout.write(json.dumps(document(found, threshold_db), indent=2) + "\n")
    else:
        show(found, wanted, threshold_db, limit)
    warn(found.problems)
    raise typer.Exit(1 if _unjudged(found) else 0)


def _unjudged(found: WhatIf) -> list[str]:
    """What should have been judged; integers and masks are not rounded and are not missing."""
    return [line for line in found.skipped if not line.endswith("is not rounded to a format")]
