"""How each torch dtype lies in a safetensors file.

safetensors 0.8 has no complex128 or complex32 (stored as pairs of their real type, in a
trailing axis of length 2) and no packed or narrow integer types (stored as U8). The record
keeps the true dtype and shape; the words here only make a shard readable by other tools.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StoredType:
    """The safetensors word of a dtype, and the trailing axis its elements are split into."""

    torch: torch.dtype
    word: str
    itemsize: int
    trailing: tuple[int, ...] = ()


_WORDS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_PAIRS = {"complex128": "F64", "complex32": "F16"}
_BYTES = (
    "float4_e2m1fn_x2",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
    *("bits8", "bits1x8", "bits2x4", "bits4x2"),
)


def _known() -> dict[str, StoredType]:
    def of(name: str, word: str, trailing: tuple[int, ...] = ()) -> None:
        dtype = getattr(torch, name, None)  # older versions of torch lack some
        if dtype is not None:
            known[name] = StoredType(dtype, word, dtype.itemsize, trailing)

    known: dict[str, StoredType] = {}
    for name, word in _WORDS.items():
        of(name, word)
    for name, word in _PAIRS.items():
        of(name, word, (2,))
    for name in _BYTES:
        of(name, "U8")
    return known


STORED = _known()
"""torch's word without the prefix (`bfloat16`) to how it is stored."""


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
