"""4-bit codes, two in a byte."""

from __future__ import annotations

import torch

from tensortap.errors import ConfigError


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes (uint8, of mxfp4, nvfp4 or int4) two a byte along the last axis.

    The first of two goes to the low half, as torch's float4_e2m1fn_x2 and torchao have it; an odd
    length is filled up with a zero.
    """
    if codes.dtype is not torch.uint8 or codes.dim() == 0:
        raise ConfigError(f"4-bit codes are uint8 with at least one axis, not {codes.dtype}.")
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor, length: int | None = None) -> torch.Tensor:
    """The inverse of `pack`; `length` is that of the last axis, where it was odd."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return codes if length is None else codes[..., :length]
