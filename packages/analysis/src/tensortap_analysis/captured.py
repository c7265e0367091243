"""The tensors of a run, one after another: the pieces of each at one moment, and its values."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensortap.records import Coordinates, TensorRecord
from tensortap.store import Run
from tensortap.store.logical import LogicalTensor
from tensortap.store.lookup import dp_rank_of

Box = tuple[tuple[int, int], ...]
"""(start, stop) on every axis."""


@dataclass(frozen=True, slots=True)
class Captured:
    """One tensor at one moment: a record of each rank that holds a piece of it.

    `dp_rank` is set where data-parallel ranks saw different data: each is a tensor of its own.
    """

    records: tuple[TensorRecord, ...]
    dp_rank: int | None = None

    @property
    def name(self) -> str:
        return str(self.records[0].name)

    @property
    def at(self) -> Coordinates:
        """When; the rank is that of the first piece."""
        return self.records[0].at

    @property
    def whole(self) -> bool:
        """Were all values of every piece captured?"""
        return all(record.values == "full" for record in self.records)

    @property
    def moment(self) -> str:
        """`step 3 microbatch 1`: the step, and of the other coordinates those that are not 0."""
        at = self.at
        numbered = (("microbatch", at.microbatch), ("call", at.call), ("dp", self.dp_rank or 0))
        words = [f"step {at.step}", *(f"{word} {number}" for word, number in numbered if number)]
        marked = (("eval", at.eval), ("recomputed", at.recompute))
        return " ".join([*words, *(word for word, marks in marked if marks)])

    def open(self, run: Run) -> LogicalTensor:
        """The tensor without padding, mapped but not read; raises `RunError`."""
        at = self.at
        return run.logical(
            self.name,
            step=at.step,
            microbatch=at.microbatch,
            call=at.call,
            recompute=at.recompute,
            eval=at.eval,
            dp_rank=self.dp_rank,
            padded=False,
        )


def captured(
    run: Run, select: str | Iterable[str] = "*", *, step: int | None = None
) -> Iterator[Captured]:
    """Every tensor at every moment (or at one step), in execution order.

    Gradients of parameters are sums over the microbatches of a step: only the last one counts.
    """
    places = {rank: dp_rank_of(run.info_of(rank)) for rank in run.ranks}
    several = len(set(places.values())) > 1
    for _, group in itertools.groupby(
        run.records(select, step=step), key=lambda record: record.at.step
    ):
        yield from _one_step(group, places if several else {})


def _one_step(records: Iterable[TensorRecord], places: dict[int, int]) -> Iterator[Captured]:
    """Only as many records are held as one step has."""
    found: dict[tuple[Any, ...], dict[int, TensorRecord]] = {}
    for record in records:
        dp_rank = places.get(record.at.rank) if _differs(record) else None
        moment = None if record.name.phase == "grad" else replace(record.at, rank=0)
        found.setdefault((record.name, moment, dp_rank), {})[record.at.rank] = record
    for (_, _, dp_rank), pieces in found.items():
        yield Captured(tuple(pieces.values()), dp_rank)


def _differs(record: TensorRecord) -> bool:
    """May data-parallel ranks hold different tensors here?"""
    placement = record.placement
    summed = placement is not None and "dp" in placement.partial
    return record.name.phase in ("forward", "backward") and not summed


def boxes(shape: Sequence[int], limit: int, keep: int | None = None) -> Iterator[Box]:
    """Boxes of at most about `limit` elements that cover the shape; axis `keep` is never cut."""
    steps = [max(size, 1) for size in shape]
    for axis in range(len(steps)):
        inside = 1
        for step in steps:
            inside *= step
        if axis != keep and inside > limit:
            steps[axis] = max(1, limit * steps[axis] // inside)
    starts = (range(0, max(size, 1), step) for size, step in zip(shape, steps, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            (start, min(start + step, size))
            for start, step, size in zip(corner, steps, shape, strict=True)
        )
