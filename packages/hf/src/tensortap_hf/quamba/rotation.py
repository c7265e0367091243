"""Norms folded into the weights after them, and the residual stream multiplied by H.

With g the weight of a norm, H the Hadamard matrix of the hidden size and H_i that of the channels:

    E     <- E H                    W_in <- W_in diag(g) H,  g <- 1
    W_out <- H^T W_out H_i          W_lm <- W_lm diag(g_f) H,  g_f <- 1   (untied from E)

RMS norms do not see H, so the logits stay what they were up to rounding, if what enters W_out is
multiplied by H_i as well. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tensortap_hf.quamba import hadamard
from tensortap_hf.quamba.parts import Parts

_ROWS = 512
"""Of a matrix at a time: the float64 copy stays in the cache."""

_RESIDUAL = re.compile(
    r"embed/forward/output"
    r"|layers\.\d+/forward/(input|output)"
    r"|layers\.\d+\.norm/forward/input"
    r"|layers\.\d+\.mixer/forward/output"
    r"|final_norm/forward/input"
)


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """A parameter and its new value."""

    module: nn.Module
    key: str
    value: torch.Tensor


def edits(parts: Parts, dtype: torch.dtype) -> Iterator[Edit]:
    """Every parameter that folding and rotation change, one at a time; the model is only read."""
    embedding, head = parts.embed.weight, parts.lm_head.weight
    yield Edit(parts.embed, "weight", _rotated(embedding, None, dtype))
    for block in parts.blocks:
        gain, mixer = block.norm.weight, block.mixer
        yield Edit(mixer.in_proj, "weight", _rotated(mixer.in_proj.weight, gain, dtype))
        yield Edit(mixer.out_proj, "weight", _rotated_on_both_sides(mixer.out_proj.weight, dtype))
        yield Edit(block.norm, "weight", torch.ones_like(gain, dtype=dtype))
    gain = parts.final_norm.weight
    yield Edit(parts.lm_head, "weight", _rotated(head, gain, dtype))
    yield Edit(parts.final_norm, "weight", torch.ones_like(gain, dtype=dtype))


def unrotate(tensor: torch.Tensor) -> torch.Tensor:
    """A residual stream [..., hidden] of a rotated model in the basis of the original one.

    For tensors that `is_residual` names; in the dtype of the tensor, 16-bit ones in float32.
    """
    return hadamard.inverse(tensor.double()).to(torch.promote_types(tensor.dtype, torch.float32))


def is_residual(name: str) -> bool:
    """Is the tensor of this name in the basis of the residual stream, and nothing else changed?

    The output of a norm is not: its weight is folded away. Channels, dt, B, C and the state are
    in no basis, and compare as they are.
    """
    return _RESIDUAL.fullmatch(name) is not None


@torch.no_grad()
def _rotated(weight: torch.Tensor, gain: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`weight diag(gain) H` for weight [rows, hidden]."""
    result = torch.empty_like(weight, dtype=dtype)
    for rows, place in zip(torch.split(weight, _ROWS), torch.split(result, _ROWS), strict=True):
        values = rows.double() if gain is None else rows.double() * gain.double()
        place.copy_(hadamard.transform(values))
    return result


@torch.no_grad()
def _rotated_on_both_sides(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`H^T weight H_i` for weight [hidden, channels]."""
    right = hadamard.transform(weight.double())
    return hadamard.transform(right.T).T.to(dtype).contiguous()
