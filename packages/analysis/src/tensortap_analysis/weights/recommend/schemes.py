"""How llm-compressor and Hugging Face's compressed-tensors write a number format down.

Source: `QuantizationArgs` and `QuantizationScheme` of compressed-tensors 0.12 and later. Formats
they have no words for (hifp8, mxfp6) can be measured and not be asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensortap import formats


@dataclass(frozen=True, slots=True)
class Scheme:
    """A format for weights: its `weights` arguments, stored bits a value, values in a block."""

    weights: Mapping[str, Any]
    bits: float
    block: int

    def fits(self, columns: int) -> bool:
        """Blocks lie along the columns; kernels take none that is cut short."""
        return columns % self.block == 0


def _args(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, **more,
        "dynamic": False,
    }  # fmt: skip


_ARGS: Mapping[str, Mapping[str, Any]] = {
    "int8": _args(8, "int", "channel"),
    "int4": _args(4, "int", "group", group_size=128),
    "mxfp8": _args(8, "float", "group", group_size=32, scale_dtype="torch.uint8"),
    "mxfp4": _args(4, "float", "group", group_size=32, scale_dtype="torch.uint8"),
    "nvfp4": _args(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn"),
}


def _schemes() -> dict[str, Scheme]:
    bits = {row.name: row.bits_stored for row in formats.table()}
    return {
        name: Scheme(args, bits[name], formats.get(name).block or 1) for name, args in _ARGS.items()
    }


SCHEMES: Mapping[str, Scheme] = _schemes()
"""By the format's name; `int8` has one scale a row here, as everyone quantises weights."""
