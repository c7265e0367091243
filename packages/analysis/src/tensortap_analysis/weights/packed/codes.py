"""What a decoder finds, and the arithmetic that decoders share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tensortap_analysis.weights.sources.source import Entry


@dataclass(frozen=True, slots=True)
class Found:
    """Codes under the name their values go by, and the names of what belongs to them.

    `entry` is `None` where the codes cannot be decoded; `reason` then says why.
    """

    name: str
    beside: tuple[str, ...]
    entry: Entry | None = None
    reason: str = ""


def spread(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """One scale for each element of [rows, columns], from one for each block of that size."""
    rows = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def bit_fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned numbers of `bits` bits in each word, lowest first, in a new last axis."""
    width = words.dtype.itemsize * 8
    shifts = torch.arange(0, width, bits, dtype=torch.int32)
    wide = words.to(torch.int32).unsqueeze(-1)
    return (wide >> shifts) & ((1 << bits) - 1)
