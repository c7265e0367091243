"""The causal convolution of Mamba with its SiLU, in float32, from codes or from floats."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tensortap_hf.quamba.integers import LEVELS, Codes, half_even, single


def of_codes(window: Codes, weight: Codes, bias: Codes | None) -> torch.Tensor:
    """SiLU(convolution + bias) in float32, not rounded to any grid.

    `window` [batch, width - 1 + seq, channel] begins before the first token, `weight` is
    [channel, width]. The sum of products of codes is exact, as the kernel's is.
    """
    total = _summed(window.codes.float(), weight.codes.float())
    total.mul_(single(window.scale * weight.scale))
    return silu(total if bias is None else total.add_(bias.values()))


def of_floats(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same in the dtype of its arguments."""
    total = F.conv1d(window.mT, weight[:, None], bias, groups=weight.shape[0]).mT
    return F.silu(total)


def dynamically_requantized(window: Codes) -> Codes:
    """The values of `window` on a grid of their own, that ends at the largest of them.

    Of the whole batch, as Quamba does it: in mode 3 the numbers of a sequence depend on what else
    is in its batch, padding included.
    """
    found = window.values()
    absmax = float(found.abs().max())
    return half_even(found, single(absmax / LEVELS) if absmax > 0 else 1.0)


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU in the form of the kernels: x / (1 + exp(-x))."""
    return x / torch.exp(-x).add_(1)


def _summed(window: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One tap of the convolution after the other, the oldest token first."""
    width = weight.shape[1]
    seq = window.shape[1] - width + 1
    total = window[:, :seq] * weight[:, 0]
    for tap in range(1, width):
        total.addcmul_(window[:, tap : tap + seq], weight[:, tap])
    return total
