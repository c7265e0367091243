"""Finding the records that make up one logical tensor, and choosing among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from tensortap.errors import RunError, nearest
from tensortap.records import Coordinates, Part, Placement, RunInfo, TensorRecord
from tensortap.store.logical import LogicalTensor
from tensortap.store.pieces import Piece
from tensortap.store.query import Query, Which
from tensortap.store.ranks import Ranks, parts_of

Info = Callable[[int], RunInfo]
Loaded = tuple[TensorRecord, torch.Tensor, RunInfo]


@dataclass(frozen=True, slots=True)
class Found:
    """Records of one tensor, and the module whose part is wanted where they are fused."""

    records: tuple[TensorRecord, ...]
    part: str | None = None

    def choose(self, which: Which, info: Info) -> list[TensorRecord]:
        """One record a rank, all at the same coordinates; raises `RunError` with the choices."""
        self._require_one_moment()
        self._require_values()
        if which.rank is not None:
            return list(self.records)
        dp_rank = which.dp_rank
        places = {record.at.rank: dp_rank_of(info(record.at.rank)) for record in self.records}
        if dp_rank is not None:
            if dp_rank not in places.values():
                raise RunError(f"there is no dp_rank={dp_rank}, only {_listed(places.values())}")
            return [record for record in self.records if places[record.at.rank] == dp_rank]
        if len(set(places.values())) > 1 and not self._spans_data_parallel():
            raise RunError(f"data-parallel ranks differ; choose dp_rank={_listed(places.values())}")
        return list(self.records)

    def _require_one_moment(self) -> None:
        if len(self.records) == 1:
            return
        moments = {replace(record.at, rank=0) for record in self.records}
        if len(moments) > 1:
            raise RunError(f"captured several times; choose one of {describe(moments)}")
        ranks = [record.at.rank for record in self.records]
        if len(set(ranks)) < len(ranks):
            raise RunError(
                f"captured {len(ranks)} times at the same coordinates; read them one by one "
                "with run.records and run.piece"
            )

    def _require_values(self) -> None:
        for record in self.records:
            if record.values == "stats":
                raise RunError("only its statistics were captured; capture with values='full'")
            if record.values == "sample":
                raise RunError("only a sample was captured; read it with run.sample(record)")

    def _spans_data_parallel(self) -> bool:
        """Are data-parallel ranks more than observers of different data here?

        Parameters and gradients are replicated, sharded (FSDP) or to be summed over them.
        """
        if self.records[0].name.phase in ("param", "grad"):
            return True
        placements = [record.placement for record in self.records if record.placement]
        return any("dp" in placement.partial for placement in placements)

    def logical(self, loaded: list[Loaded], which: Which) -> LogicalTensor:
        """The logical tensor, or a single rank's piece as it is, cut to what was asked for."""
        # Where only one data-parallel rank is asked for, nothing is summed over them.
        one_replica = which.dp_rank is not None
        pieces = [
            Piece(
                record.at.rank,
                tensor,
                _of_one_replica(record.placement) if one_replica else record.placement,
                info.parallel,
            )
            for record, tensor, info in loaded
        ]
        records = [record for record, _, _ in loaded]
        alone = which.rank is not None
        return LogicalTensor(records, pieces, self._part(), alone=alone, padded=which.padded)

    def _part(self) -> Part | None:
        if self.part is None:
            return None
        return next(part for part in parts_of(self.records[0]) if part.module == self.part)


class Lookup:
    """Answers by name: what was captured under it, or the fused tensor that it is part of."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def find(self, name: str, query: Query) -> Found:
        """Records of this name, or else those of the fused tensor that it is part of."""
        records = tuple(self._records(name, query))
        if records:
            return Found(_last_sums(records))
        part = self._ranks.parts().get(name)
        if part is None:
            return Found(())
        return Found(_last_sums(tuple(self._records(part.fused, query))), part.module)

    def not_found(self, name: str, query: Query) -> RunError:
        """The error for a name without such a record: where else it is, or what is called so."""
        anywhere = Query(rank=query.rank)
        moments = {replace(r.at, rank=0) for r in self.find(name, anywhere).records[:1000]}
        if moments:
            return RunError(f"not at these coordinates; it is at {describe(moments)}")
        known = [*self._ranks.names(), *self._ranks.parts()]
        return RunError(f"not captured. Closest names: {nearest(name, known)}")

    def _records(self, name: str, query: Query) -> Iterator[TensorRecord]:
        for reader in self._ranks.chosen(query.rank).values():
            index = reader.index
            for position in query.positions(index, index.numbers.get(name, ())):
                record = reader.record(int(position))
                if record is not None:
                    yield record


def _last_sums(records: tuple[TensorRecord, ...]) -> tuple[TensorRecord, ...]:
    """Of the gradients of a parameter in one step the last: each is the sum of all before it."""
    if not records or records[0].name.phase != "grad":
        return records
    last: dict[tuple[int, int], TensorRecord] = {}
    for record in records:
        key = (record.at.step, record.at.rank)
        if key not in last or record.seq > last[key].seq:
            last[key] = record
    return tuple(last.values())


_REPLICAS = ("dp", "edp")
"""Groups of data-parallel ranks; experts have one of their own."""


def without_replicas(groups: Iterable[str]) -> tuple[str, ...]:
    """The groups to sum over where a single data-parallel rank is asked for."""
    return tuple(group for group in groups if group not in _REPLICAS)


def _of_one_replica(placement: Placement | None) -> Placement | None:
    if placement is None:
        return None
    return replace(placement, partial=without_replicas(placement.partial))


def dp_rank_of(info: RunInfo) -> int:
    """A rank's place among the data-parallel ones.

    A run that says nothing about parallelism is taken for a data-parallel one (plain DDP).
    """
    return info.parallel.get("dp_rank", 0) if info.parallel else info.rank


def describe(moments: Iterable[Coordinates]) -> str:
    """`step=0 microbatch=0 call=1, …`: the first few coordinates, in order."""
    ordered = sorted(moments, key=lambda at: (at.step, at.microbatch, at.call))
    listed = ", ".join(_describe_one(at) for at in ordered[:6])
    return listed + (f" and {len(ordered) - 6} more" if len(ordered) > 6 else "")


def _describe_one(at: Coordinates) -> str:
    flags = (" recompute=True" if at.recompute else "") + (" eval=True" if at.eval else "")
    return f"(step={at.step} microbatch={at.microbatch} call={at.call}{flags})"


def _listed(places: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(places))))
