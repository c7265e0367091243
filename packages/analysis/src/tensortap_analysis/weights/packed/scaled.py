"""Codes that are numbers, of 8 bits: float8 or int8 beside scales of a tensor, row or block.

X.weight + X.weight_scale_inv        DeepSeek, Qwen: float8 by blocks of 128 x 128
X.weight + X.weight_scale            compressed-tensors, ModelOpt, FBGEMM: of a tensor or row
X.weight + X.SCB                     bitsandbytes: int8, scale SCB / 127 of a row
X        + X_scale_inv, X_scale      stacks of experts
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tensortap_analysis.weights.packed.codes import Found, spread
from tensortap_analysis.weights.sources.source import CheckpointError, Config, Entry

_SUFFIXES = ("_scale_inv", "_scale")
_BESIDE = ("_zero_point", "_shape", "_g_idx")
_ROW = 127.0
"""bitsandbytes keeps the largest magnitude of a row, which its codes give as 127."""


def found(name: str, entries: Mapping[str, Entry], config: Config) -> Found | None:
    """The values of `name`, if it is codes of 8 bits with a scale beside them."""
    codes = entries[name]
    if codes.dtype is None or codes.dtype.itemsize != 1 or codes.dtype == torch.uint8:
        return None
    layer = name.removesuffix(".weight")
    scales = [name + suffix for suffix in _SUFFIXES if name + suffix in entries]
    rows = f"{layer}.SCB"
    if codes.dtype == torch.int8 and not scales and rows in entries:
        scales = [rows]
    if not scales or len(codes.shape) not in (2, 3):
        return None
    beside = _beside(name, layer, entries)
    if name + "_g_idx" in entries:
        return Found(name, (*scales, *beside), reason="its columns are permuted (g_idx)")
    zero = entries.get(name + "_zero_point")
    return Found(name, (*scales, *beside), _entry(codes, entries[scales[0]], zero, config))


def _beside(name: str, layer: str, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    possible = [name + word for word in _BESIDE]
    possible += [f"{layer}.{word}" for word in ("input_scale", "output_scale", "activation_scale",
                                                "weight_format", "input_scale_ub")]  # fmt: skip
    return tuple(one for one in possible if one in entries)


def _entry(codes: Entry, scale: Entry, zero: Entry | None, config: Config) -> Entry:
    block = _block(config)

    def parts() -> Iterator[torch.Tensor]:
        values, scales = codes.load(), _scales(scale)
        zeros = None if zero is None else zero.load().float()
        if values.ndim == 2:
            yield _values(values, scales, zeros, block, codes.name)
            return
        for index, one in enumerate(values):
            own = scales[index] if scales.ndim and len(scales) == len(values) else scales
            yield _values(one, own, zeros, block, codes.name)

    def load() -> torch.Tensor:
        matrices = list(parts())
        return matrices[0] if len(codes.shape) == 2 else torch.stack(matrices)

    stacked = len(codes.shape) == 3
    note = f"codes times {scale.name.rpartition('.')[2]}"
    return replace(codes, load=load, load_parts=parts if stacked else None, decoded=True, note=note)


def _scales(scale: Entry) -> torch.Tensor:
    values = scale.load()
    if values.dtype == torch.uint8:  # e8m0, the exponents of powers of two
        return torch.ldexp(torch.ones(()), values.int() - 127)
    return values.float() / (_ROW if scale.name.endswith(".SCB") else 1.0)


def _block(config: Config) -> tuple[int, int] | None:
    quantization: Any = config.get("quantization_config")
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None


def _values(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    block: tuple[int, int] | None,
    name: str,
) -> torch.Tensor:
    """[rows, columns] in float32."""
    wide = codes.float()
    if zero is not None:
        wide -= _broadcast(zero, codes, block, name)
    return wide.mul_(_broadcast(scale, codes, block, name))


def _broadcast(
    scale: torch.Tensor, codes: torch.Tensor, block: tuple[int, int] | None, name: str
) -> torch.Tensor:
    """Scales as they multiply a matrix: of all of it, of a row, or of blocks."""
    rows, columns = codes.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.numel() == rows and scale.ndim <= 2 and scale.shape[0] == rows:
        return scale.reshape(rows, 1)
    for size in _sizes(scale, rows, columns, block):
        if (-(-rows // size[0]), -(-columns // size[1])) == tuple(scale.shape):
            return spread(scale, (rows, columns), size)
    raise CheckpointError(
        f"{name}: scales of shape {tuple(scale.shape)} do not fit codes of {tuple(codes.shape)}."
    )


def _sizes(
    scale: torch.Tensor, rows: int, columns: int, block: tuple[int, int] | None
) -> Iterator[tuple[int, int]]:
    """Sizes that blocks may have: as configured, as everybody has them, or even parts."""
    if scale.ndim == 2 and scale.numel():
        yield from (block,) if block else ()
        yield 128, 128
        if rows % scale.shape[0] == 0 and columns % scale.shape[1] == 0:
            yield rows // scale.shape[0], columns // scale.shape[1]
