"""Execution order of runs whose layers are spread over the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensortap.names import layer_of
from tensortap.records import RunInfo
from tensortap.store.rows import RECOMPUTE
from tensortap.store.tables import Table

_WEIGHTS, _FORWARD, _AGAIN, _BACKWARD = range(4)
"""Parameters are there before the forward; what is recomputed goes forward once more."""

_WAYS = {"param": _WEIGHTS, "forward": _FORWARD, "backward": _BACKWARD, "grad": _BACKWARD}


def in_order(table: Table, infos: Mapping[int, RunInfo]) -> Table:
    """The rows of a run's table in execution order.

    Every rank numbers its records by itself, which is enough where all ranks run the same layers
    at the same time. The stages of a pipeline run one after the other, and a stage may hold
    several stretches of layers: there the forward of a microbatch goes up through the layers, and
    its backward down. Microbatches follow each other, though the ranks interleave them.
    """
    stages = {rank: info.parallel.get("pp_rank", 0) for rank, info in infos.items()}
    if len(set(stages.values())) < 2 or not len(table):
        return table
    keys = np.empty((len(table), 6), dtype=np.int64)
    for sequence in _sequences(table, stages):
        keys[sequence.rows] = sequence.keys()
    order = np.lexsort((*keys.T[::-1],))
    return replace(table, rows=table.rows[order])


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What one rank did for one microbatch in one direction, in its order.

    `at` is step, microbatch and direction; `names` are numbers of names, and `layers` those of
    their layers, or `None` for a tensor of no layer.
    """

    at: tuple[int, int, int]
    stage: int
    rows: Sequence[int]
    names: Sequence[int]
    layers: Sequence[int | None]

    def keys(self) -> list[tuple[int, ...]]:
        """Sorting by these puts the rows of all ranks in execution order."""
        return [
            (*self.at, turn, height, row)
            for row, (turn, height) in zip(self.rows, self._heights(), strict=True)
        ]

    def _heights(self) -> Iterator[tuple[int, int]]:
        """How many times the layers were gone through before, and how far they are this time.

        A name that comes again, lower down, begins the next time. One that does not (the gradient
        of a layer's input is seen after that of the output before it) stays where it is.
        """
        turn, reached = 0, None
        seen: set[int] = set()
        for name, layer in zip(self.names, self._placed(), strict=True):
            height = -layer if self._backward else layer
            if reached is not None and height < reached and name in seen:
                turn, reached = turn + 1, height
                seen = set()
            seen.add(name)
            reached = height if reached is None else max(reached, height)
            yield turn, reached

    def _placed(self) -> list[int]:
        """Layers, where a tensor of none stands with the one before it, or the one after it.

        The embedding is in front of the first stage's layers, the head behind the last one's.
        """
        before = _filled(self.layers)
        after = _filled(self.layers[::-1])[::-1]
        first, second = (after, before) if (self.stage == 0) != self._backward else (before, after)
        pairs = zip(first, second, strict=True)
        return [next((at for at in pair if at is not None), 0) for pair in pairs]

    @property
    def _backward(self) -> bool:
        return self.at[-1] == _BACKWARD


def _filled(layers: Sequence[int | None]) -> list[int | None]:
    """Each gap is the last number before it."""
    found: list[int | None] = []
    for layer in layers:
        found.append(layer if layer is not None or not found else found[-1])
    return found


def _sequences(table: Table, stages: Mapping[int, int]) -> Iterator[_Sequence]:
    numbers = [layer_of(name.partition("/")[0]) for name in table.names]
    ways = [_WAYS[name.split("/")[1]] for name in table.names]
    found: dict[tuple[int, tuple[int, int, int]], list[int]] = {}
    fields = ("rank", "step", "microbatch", "name", "flags")
    columns = (table.rows[field].tolist() for field in fields)
    for row, (rank, step, microbatch, name, flags) in enumerate(zip(*columns, strict=True)):
        way = _AGAIN if ways[name] == _FORWARD and flags & RECOMPUTE else ways[name]
        found.setdefault((rank, (step, microbatch, way)), []).append(row)
    for (rank, at), rows in found.items():
        names = table.rows["name"][rows].tolist()
        yield _Sequence(at, stages[rank], rows, names, [numbers[name] for name in names])
