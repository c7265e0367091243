"""What a scan measures beyond the method's name; part of what makes two scans the same scan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tensortap import formats as known
from tensortap.errors import ConfigError

METHODS = ("spectral", "quantization", "sparsity", "norms")
"""The methods there are, in the order of a report."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the measures are asked for; every field changes numbers, none changes how fast.

    `formats` are names of `tensortap.formats` whose SQNR is wanted, beside int8 per tensor and
    per channel. With `full_spectrum` all singular values are kept, descending.
    """

    formats: tuple[str, ...] = known.names()
    full_spectrum: bool = False

    def __post_init__(self) -> None:
        for name in self.formats:
            known.get(name)


def chosen_methods(wanted: str | Iterable[str]) -> tuple[str, ...]:
    """`"all"`, `"spectral,norms"` or a list of words; raises `ConfigError` for one there is not."""
    words = wanted.split(",") if isinstance(wanted, str) else list(wanted)
    words = [word.strip() for word in words if word.strip()]
    for word in words:
        if word not in ("all", *METHODS):
            raise ConfigError(f"There is no method {word!r}; there are all, {', '.join(METHODS)}.")
    if not words:
        raise ConfigError(f"No method is named; there are all, {', '.join(METHODS)}.")
    return METHODS if "all" in words else tuple(name for name in METHODS if name in words)
