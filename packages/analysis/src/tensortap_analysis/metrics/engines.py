"""Who computes the passes over the pairs: the compiled kernel, or numpy where there is none."""

from __future__ import annotations

from typing import Protocol

import torch

from tensortap import native
from tensortap.native.comparing import Comparing, Frame, Histograms, Quest, Totals
from tensortap_analysis.metrics.fallback import Plain


class Engine(Protocol):
    """Three passes over prepared blocks; see `tensortap.native.comparing.Comparing`."""

    threads: int

    def first(self, ref: torch.Tensor, other: torch.Tensor) -> tuple[float, float] | None:
        """The first pair that is finite on both sides."""

    def add(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        totals: Totals,
        histograms: Histograms,
    ) -> None:
        """Add a block to totals and histograms."""

    def select(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        absolute: Quest | None,
        relative: Quest | None,
    ) -> None:
        """Look for the values of the quests in a block."""


class Compiled:
    """The kernel, on torch's threads."""

    def __init__(self, library: native.Library) -> None:
        self._comparing: Comparing = library.comparing
        self.threads = torch.get_num_threads() if library.threaded else 1
        self.first = self._comparing.first

    def add(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        totals: Totals,
        histograms: Histograms,
    ) -> None:
        self._comparing.add(ref, other, frame, totals, histograms, threads=self.threads)

    def select(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        absolute: Quest | None,
        relative: Quest | None,
    ) -> None:
        self._comparing.select(ref, other, frame, absolute, relative, threads=self.threads)


def engine() -> Engine:
    """The kernel if there is one; `TENSORTAP_NATIVE=0` rules it out."""
    library = native.library()
    return Plain() if library is None else Compiled(library)
