"""Options that several commands share, and what they are read as."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tensortap.errors import ConfigError

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run, or a folder in an importable layout.")
]
Noise = Annotated[Path | None, typer.Option(help="A second reference: its error must be accepted.")]
Thresholds = Annotated[
    list[str] | None,
    typer.Option(
        "--threshold", metavar="NAME=VALUE", help="Replace a threshold of the preset: ratio=2."
    ),
]
Select = Annotated[str, typer.Option(help="Names: globs with commas, ! excludes, re: regex.")]
Step = Annotated[int | None, typer.Option(help="Only this step.")]


def limits_of(thresholds: Iterable[str] | None, example: str = "ratio=2") -> dict[str, float]:
    """`["ratio=2"]` as `{"ratio": 2.0}`; raises `ConfigError` for what is no number."""
    return dict(_limit(text, example) for text in thresholds or ())


def _limit(text: str, example: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise ConfigError(f"--threshold {text} is not NAME=VALUE, for example {example}.") from None
