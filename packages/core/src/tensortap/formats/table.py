"""What the formats can hold, as data: for a reader to choose by."""

from __future__ import annotations

from dataclasses import dataclass

from tensortap.formats.hifloat8 import MAX, SMALLEST, SMALLEST_NORMAL
from tensortap.formats.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, Element


@dataclass(frozen=True, slots=True)
class Properties:
    """A format's elements before scaling, and its scale; integers have no exponent.

    `bits` is what an element takes without its scale, `bits_stored` with its share of the scale
    (that of one scale per tensor or channel is nothing).
    """

    name: str
    bits: int
    bits_stored: float
    block: int | None
    scale: str | None
    emax: int | None
    max: float
    smallest_normal: float
    smallest_subnormal: float | None


def table() -> tuple[Properties, ...]:
    """One row a format, in the order of `names()`, with default options."""
    return (
        Properties("hifp8", 8, 8.0, None, None, 15, MAX, SMALLEST_NORMAL, SMALLEST),
        _blocked("mxfp8", E4M3, 32, "e8m0"),
        _blocked("mxfp8_e5m2", E5M2, 32, "e8m0"),
        _blocked("mxfp6_e3m2", E3M2, 32, "e8m0"),
        _blocked("mxfp6_e2m3", E2M3, 32, "e8m0"),
        _blocked("mxfp4", E2M1, 32, "e8m0"),
        _blocked("nvfp4", E2M1, 16, "e4m3, and float32 per tensor"),
        Properties("int8", 8, 8.0, None, "float32", None, 127.0, 1.0, None),
        Properties("int4", 4, 4.25, 128, "float32", None, 7.0, 1.0, None),
        Properties("fp16", 16, 16.0, None, None, 15, 65504.0, 2.0**-14, 2.0**-24),
        Properties(
            "bf16", 16, 16.0, None, None, 127, (2.0 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133
        ),
    )


def _blocked(name: str, element: Element, block: int, scale: str) -> Properties:
    stored = element.bits + 8 / block
    return Properties(
        name, element.bits, stored, block, scale, element.emax, element.max,
        element.smallest_normal, element.smallest_subnormal,
    )  # fmt: skip
