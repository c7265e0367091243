"""The table of Quamba's modes: what the convolution stores, what the scan is given, its order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tensortap_hf.quamba.scan import BLOCKED, SEQUENTIAL, Order


@dataclass(frozen=True, slots=True)
class Variant:
    """One row. In every one the linears, dt, B, C, z and the input of x_proj are int8."""

    name: str
    conv: Literal["int8", "grid", "float"]
    """The output of convolution and SiLU: codes, their float32 values, or never rounded."""
    u: Literal["int8", "float"]
    """What the scan is given: codes, made anew where there are none; or what was stored."""
    order: Order
    equals: tuple[str, ...] = ()
    """Rows that say the same in other words: every layer is bitwise equal."""
    dynamic: bool = False
    """Is the input of the convolution quantised once more, by its own absmax / 127?"""

    @property
    def description(self) -> str:
        """One line for people."""
        stored = {
            "int8": "int8 convolution output",
            "grid": "convolution output on the int8 grid in fp32",
            "float": "true fp32 convolution output",
        }[self.conv]
        given = {"int8": "int8", "float": "fp32"}[self.u]
        scan = "block" if self.order is BLOCKED else "sequential"
        again = ", its input requantised dynamically" if self.dynamic else ""
        return f"W8A8; {stored}{again}; {scan} scan of {given} u"


VARIANTS = (
    Variant("0", "int8", "int8", BLOCKED, equals=("2-0",)),
    Variant("2-0", "grid", "int8", BLOCKED, equals=("0",)),
    Variant("2-1", "int8", "int8", SEQUENTIAL, equals=("2-2", "2-3")),
    Variant("2-2", "grid", "float", SEQUENTIAL, equals=("2-1", "2-3")),
    Variant("2-3", "float", "int8", SEQUENTIAL, equals=("2-1", "2-2")),
    Variant("2-4", "float", "float", SEQUENTIAL),
    Variant("3", "float", "float", SEQUENTIAL, dynamic=True),
)
