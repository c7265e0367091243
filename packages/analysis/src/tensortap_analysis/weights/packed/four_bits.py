"""Codes of the four-bit float E2M1, two in a byte, the first in its low half.

X_blocks + X_scales                                     gpt-oss: mxfp4
X.weight_packed + X.weight_scale + X.weight_global_scale    compressed-tensors: nvfp4
X.weight (uint8) + X.weight_scale + X.weight_scale_2    ModelOpt: nvfp4
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from tensortap_analysis.weights.packed.codes import Found, bit_fields
from tensortap_analysis.weights.sources.source import Config, Entry

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1 = torch.cat([_E2M1, -_E2M1])
_MX_BYTES, _NV_BLOCK = 16, 16


def mxfp4(name: str, entries: Mapping[str, Entry], config: Config) -> Found | None:
    """[…, blocks, 16] bytes and one power of two a block: [experts, out, in]."""
    base = name.removesuffix("_blocks")
    scale = entries.get(f"{base}_scales")
    codes = entries[name]
    if base == name or scale is None or codes.dtype != torch.uint8 or len(codes.shape) != 4:
        return None
    if codes.shape[-1] != _MX_BYTES or scale.shape != codes.shape[:-1]:
        return Found(base, (scale.name,), reason="codes and scales do not fit as mxfp4")

    def parts() -> Iterator[torch.Tensor]:
        for block, exponent in zip(codes.load(), scale.load(), strict=True):
            exact = torch.ldexp(_values(block), exponent.int().unsqueeze(-1) - 127)
            yield exact.flatten(1)

    count, rows, blocks, _ = codes.shape
    shape = (count, rows, blocks * _MX_BYTES * 2)
    entry = replace(
        codes, name=base, shape=shape, load=lambda: torch.stack(list(parts())), load_parts=parts,
        decoded=True, note="codes of mxfp4 times scales",
    )  # fmt: skip
    return Found(base, (scale.name,), entry)


def nvfp4(name: str, entries: Mapping[str, Entry], config: Config) -> Found | None:
    """[out, in / 2] bytes, a float8 scale for 16 values, and one for all."""
    base = name.removesuffix("_packed")
    codes, scale = entries[name], entries.get(f"{base}_scale")
    over, under = entries.get(f"{base}_scale_2"), entries.get(f"{base}_global_scale")
    whole = over or under
    if codes.dtype != torch.uint8 or scale is None or whole is None or len(codes.shape) != 2:
        return None
    beside = (scale.name, whole.name, *_inputs(base, entries))
    rows, columns = codes.shape[0], codes.shape[1] * 2
    if scale.shape != (rows, columns // _NV_BLOCK):
        return Found(base, beside, reason="codes and scales do not fit as nvfp4")

    def load() -> torch.Tensor:
        factor = whole.load().float().reshape(())
        scales = scale.load().float() * (factor if over else 1 / factor)
        blocks = _values(codes.load()).view(rows, -1, _NV_BLOCK)
        return blocks.mul_(scales.unsqueeze(-1)).view(rows, columns)

    entry = replace(
        codes, name=base, shape=(rows, columns), load=load, decoded=True,
        note="codes of nvfp4 times scales",
    )  # fmt: skip
    return Found(base, beside, entry)


def bitsandbytes(name: str, entries: Mapping[str, Entry], config: Config) -> Found | None:
    """Codes with `X.weight.absmax` and tables beside them: recognised, and not decoded."""
    if f"{name}.absmax" not in entries:
        return None
    beside = tuple(other for other in entries if other.startswith(f"{name}."))
    why = "packed by bitsandbytes, which is not decoded; scan the checkpoint it was made from"
    return Found(name, beside, reason=why)


def _inputs(base: str, entries: Mapping[str, Entry]) -> list[str]:
    layer = base.removesuffix(".weight")
    possible = (f"{layer}.input_scale", f"{layer}.input_global_scale")
    return [name for name in possible if name in entries]


def _values(codes: torch.Tensor) -> torch.Tensor:
    """The numbers of bytes of codes, in float32; the last axis becomes twice as long."""
    return _E2M1[bit_fields(codes, 4).flatten(-2).long()]
