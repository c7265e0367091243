"""Captures on their way from a device: first a tensor there, then what it held, on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from tensortap.records import Statistics
from tensortap_neuron import reduction
from tensortap_neuron.reduction import Layout


@dataclass(slots=True)
class Vector:
    """The numbers that the statistics of one tensor are made of."""

    layout: Layout
    waiting: torch.Tensor | None
    numbers: Sequence[float] = ()

    def arrived(self, value: torch.Tensor) -> None:
        """Take the numbers, on the host."""
        self.waiting, self.numbers = None, value.reshape(-1).tolist()

    def statistics(self) -> Statistics:
        """Of a vector that has arrived."""
        return reduction.statistics(self.numbers, self.layout)


@dataclass(slots=True)
class Clone:
    """The values of one tensor; implements `tensortap.backends.Snapshot`."""

    nbytes: int
    shape: torch.Size
    waiting: torch.Tensor | None
    fetch: Callable[[Clone], object]
    """Has this one `arrived`; for callers that did not collect it with others."""
    value: torch.Tensor | None = None

    def arrived(self, value: torch.Tensor) -> None:
        """Take the values, on the host."""
        self.waiting, self.value = None, value.reshape(self.shape).contiguous()

    def host(self) -> torch.Tensor:
        """The values, contiguous."""
        if self.value is None:
            self.fetch(self)
        assert self.value is not None
        return self.value


Pending: TypeAlias = Vector | Clone


def still_waiting(captures: Sequence[Pending]) -> list[tuple[Pending, torch.Tensor]]:
    """Each capture that has not arrived, once, with its tensor."""
    unique = {id(one): one for one in captures}.values()
    return [(one, one.waiting) for one in unique if one.waiting is not None]


def contiguous_clone(tensor: torch.Tensor, stride: int) -> torch.Tensor:
    """A copy on the device of every `stride`-th element, in logical order."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    wanted = tensor if stride == 1 else tensor.reshape(-1)[::stride]
    return wanted.clone(memory_format=torch.contiguous_format)
