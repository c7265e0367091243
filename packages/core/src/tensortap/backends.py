"""`Backend`: reduction, snapshot and transfer of tensors on one type of device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from tensortap.records import Statistics

Allocate = Callable[[int, bool], torch.Tensor]
"""(nbytes, pinned) -> a 1-d uint8 CPU tensor of at least that size, from the transfer's pool."""


class Reduction(Protocol):
    """Statistics of one tensor on their way to the host; opaque to all but its backend."""


class Snapshot(Protocol):
    """A copy of a tensor that later writes to the tensor do not change."""

    nbytes: int

    def host(self) -> torch.Tensor:
        """The copy as a contiguous CPU tensor; may block, called from the transfer thread."""


class Backend(Protocol):
    """The plugin for one device type; entry points of `tensortap.backends` are named after it."""

    def reduce(self, tensor: torch.Tensor, *, exponents: bool) -> Reduction:
        """Start computing statistics on the tensor's device, without a host synchronisation."""

    def snapshot(self, tensor: torch.Tensor, allocate: Allocate, *, stride: int = 1) -> Snapshot:
        """Copy the tensor, or every `stride`-th element of it in logical order, likewise."""

    def flush(self, reductions: Sequence[Reduction]) -> list[Statistics]:
        """Bring all reductions to the host at once: one synchronisation, one batch of copies."""
