"""Finding the records that make up one logical tensor, and choosing among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from tensortap.errors import RunError
from tensortap.records import Coordinates, Part, Placement, RunInfo, TensorRecord
from tensortap.store.logical import LogicalTensor
from tensortap.store.pieces import Piece
from tensortap.store.query import Query
from tensortap.store.rank_reader import RankReader
from tensortap.store.rows import PARTS

Info = Callable[[int], RunInfo]
Loaded = tuple[TensorRecord, torch.Tensor, RunInfo]


@dataclass(frozen=True, slots=True)
class Found:
    """Records of one tensor, and the module whose part is wanted where they are fused."""

    records: tuple[TensorRecord, ...]
    part: str | None = None

    def choose(self, dp_rank: int | None, info: Info, *, alone: bool) -> list[TensorRecord]:
        """One record a rank, all at the same coordinates; raises `RunError` with the choices."""
        self._require_one_moment()
        self._require_values()
        if alone:
            return list(self.records)
        places = {record.at.rank: dp_rank_of(info(record.at.rank)) for record in self.records}
        if dp_rank is not None:
            if dp_rank not in places.values():
                raise RunError(f"there is no dp_rank={dp_rank}, only {_listed(places.values())}")
            return [record for record in self.records if places[record.at.rank] == dp_rank]
        if len(set(places.values())) > 1 and not self._spans_data_parallel():
            raise RunError(f"data-parallel ranks differ; choose dp_rank={_listed(places.values())}")
        return list(self.records)

    def _require_one_moment(self) -> None:
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

    def logical(
        self, loaded: list[Loaded], *, alone: bool, one_replica: bool, padded: bool
    ) -> LogicalTensor:
        """The logical tensor, or a single rank's piece as it is, cut to what was asked for.

        `one_replica`: only one data-parallel rank was asked for, so nothing is summed over them.
        """
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
        return LogicalTensor(records, pieces, self._part(), alone=alone, padded=padded)

    def _part(self) -> Part | None:
        if self.part is None:
            return None
        return next(part for part in parts_of(self.records[0]) if part.module == self.part)


class Lookup:
    """Answers by name over some ranks; parses one line a fused name to learn its parts."""

    def __init__(self, readers: Mapping[int, RankReader]) -> None:
        self._readers = readers

    def find(self, name: str, query: Query) -> Found:
        """Records of this name, or else those of the fused tensor that it is part of."""
        records = tuple(self._records(name, query))
        if records:
            return Found(_last_sums(records))
        for part, (module, fused) in self._fused().items():
            if part == name:
                return Found(_last_sums(tuple(self._records(fused, query))), module)
        return Found(())

    def coordinates(self, name: str) -> str:
        """Where a name was captured, for a message; empty when nowhere."""
        moments = {replace(r.at, rank=0) for r in self.find(name, Query()).records[:1000]}
        return describe(moments) if moments else ""

    def part_sources(self) -> dict[str, str]:
        """Names that parts of fused tensors have, and whose parts they are."""
        return {part: fused for part, (_, fused) in self._fused().items()}

    def _records(self, name: str, query: Query) -> Iterable[TensorRecord]:
        for reader in self._readers.values():
            index = reader.index
            for position in query.positions(index, index.numbers.get(name, ())):
                record = reader.record(int(position))
                if record is not None:
                    yield record

    def _fused(self) -> dict[str, tuple[str, str]]:
        """Name of a part -> its module, and the name of the fused tensor it is cut from."""
        found: dict[str, tuple[str, str]] = {}
        for reader in self._readers.values():
            rows = reader.index.rows
            fused = np.flatnonzero(rows["flags"] & PARTS)
            _, firsts = np.unique(rows["name"][fused], return_index=True)
            for position in fused[firsts]:
                record = reader.record(int(position))
                if record is None:
                    continue
                for part in parts_of(record):
                    name = f"{part.module}/{record.name.phase}/{record.name.tensor}"
                    found.setdefault(name, (part.module, str(record.name)))
        return found


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


def _of_one_replica(placement: Placement | None) -> Placement | None:
    if placement is None or not set(placement.partial) & set(_REPLICAS):
        return placement
    return replace(placement, partial=tuple(g for g in placement.partial if g not in _REPLICAS))


def parts_of(record: TensorRecord) -> tuple[Part, ...]:
    """The parts of a fused tensor; none for any other."""
    return record.placement.parts if record.placement is not None else ()


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
