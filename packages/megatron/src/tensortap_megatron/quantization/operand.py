"""Operands on the grid of a format, and methods of modules put in the place of the originals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tensortap.formats import Codec
from tensortap.records import FormatInfo


@dataclass(frozen=True, slots=True)
class Quantizer:
    """Puts the operands of matrix products on the grid of one format.

    `once`: the result does not depend on the contraction axis (no blocks, no channels), so an
    operand of two products is quantised for both at once.
    """

    codec: Codec
    once: bool

    @classmethod
    def of(cls, codec: Codec) -> Quantizer:
        """The quantizer of a codec."""
        return cls(codec, once=codec.quantize(torch.ones(1, 1)).axis is None)

    @property
    def info(self) -> FormatInfo:
        """What a record says about an operand."""
        return self.codec.info

    def __call__(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """`x` with values on the grid, in its own dtype; `axis` is the one summed over."""
        return self.codec.fake_quantize(x, axis)

    def again(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """`x` for another product, where `x` is quantised already if the format allows `once`."""
        return x if self.once else self(x, axis)


class Replacement:
    """Stands in for a method of one module; a copy of the module has its own method."""

    method: ClassVar[str]

    def __init__(self, module: nn.Module, quantizer: Quantizer) -> None:
        self.module = module
        self.quantizer = quantizer
        self.original: Callable[..., Any] = getattr(module, self.method)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module, str]]:
        # Where this runs, the module's copy exists but is empty: what it has is its class's.
        return getattr, (self.module, self.method)


def replacement(module: nn.Module) -> Replacement | None:
    """What a module's method was replaced by; `None`: the module is not quantised."""
    return next((found for found in vars(module).values() if isinstance(found, Replacement)), None)
