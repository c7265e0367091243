"""Who computes the passes over the pairs: the compiled kernel, or numpy where there is none."""

from __future__ import annotations

from typing import Protocol

import torch

from tensortap import native
from tensortap.native.comparing import Comparing
from tensortap.native.counts import CodePairs, Histograms, Quest
from tensortap.native.totals import Frame, Totals
from tensortap_analysis.metrics.fallback import Plain


class Engine(Protocol):
    """Passes over prepared blocks; see `tensortap.native.comparing.Comparing`."""

    threads: int

    def add(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        totals: Totals,
        histograms: Histograms,
    ) -> None:
        """Add a block to totals and histograms; the first that has any sets the frame's origins."""

    def select(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        absolute: Quest | None,
        relative: Quest | None,
    ) -> None:
        """Look for the values of the quests in a block."""

    def count(self, ref: torch.Tensor, other: torch.Tensor, pairs: CodePairs) -> None:
        """Count the pairs of a block of codes."""

    def change(self, ref: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
        """The largest and the summed |other - ref|; NaN once one of them is."""


class Compiled:
    """The kernel, on so many of torch's threads."""

    def __init__(self, library: native.Library, threads: int) -> None:
        self._comparing: Comparing = library.comparing
        self.threads = threads if library.threaded else 1
        self.change = self._comparing.change

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

    def count(self, ref: torch.Tensor, other: torch.Tensor, pairs: CodePairs) -> None:
        self._comparing.count(ref, other, pairs, threads=self.threads)


def engine(threads: int | None = None) -> Engine:
    """The kernel if there is one; `TENSORTAP_NATIVE=0` rules it out."""
    library = native.library()
    if library is None:
        return Plain()
    return Compiled(library, threads or torch.get_num_threads())
