"""The tensors of a run, one for each moment: what is drawn, judged, and paired with another run.

A `Moment` says which tensor and when, whoever holds its pieces; `Captured` is what a run has of
it. `captured` goes through a run, `catalogue` lists it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from tensortap.errors import RunError
from tensortap.records import Placement, TensorRecord, Values
from tensortap.selection import Selection
from tensortap.store import Run, Table
from tensortap.store.execution import in_order
from tensortap.store.logical import LogicalTensor
from tensortap.store.lookup import dp_rank_of
from tensortap.store.query import Which
from tensortap.store.rows import EVAL, PAYLOAD, RECOMPUTE, SAMPLE

DETAIL: tuple[Values, ...] = ("stats", "sample", "full")
"""What a record may hold, the least first."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Name and coordinates of a logical tensor; the ranks that hold its pieces do not count.

    `dp_rank` tells data-parallel ranks apart, which saw different data; parameters and gradients
    are one tensor for all of them. Of a gradient only the step counts: it is the sum of the step.
    """

    name: str
    step: int = 0
    microbatch: int = 0
    call: int = 0
    recompute: bool = False
    eval: bool = False
    dp_rank: int | None = None

    @property
    def when(self) -> str:
        """`step 3`, `step 3 microbatch 1 eval`: the step, and what else is not as usual."""
        numbered = (
            ("microbatch", self.microbatch),
            ("call", self.call),
            ("data-parallel rank", self.dp_rank),
        )
        words = [f"step {self.step}", *(f"{word} {number}" for word, number in numbered if number)]
        flags = (("eval", self.eval), ("recompute", self.recompute))
        return " ".join([*words, *(word for word, on in flags if on)])

    def renamed(self, name: str) -> Moment:
        """The same moment of another tensor."""
        return replace(self, name=name)

    def of_rank(self, dp_rank: int | None) -> Moment:
        """The same moment on a data-parallel rank, or of a run that has only one."""
        return replace(self, dp_rank=dp_rank)


@dataclass(frozen=True, slots=True)
class Captured:
    """What a run has of one moment; read from its index, until records or values are asked for.

    `order` is its place in execution order, `values` what all of its pieces have, `lines` a rank
    and a line for each record. `part` names the part that is meant of a fused tensor.
    """

    run: Run
    moment: Moment
    order: int
    values: Values
    lines: tuple[tuple[int, int], ...]
    part: str | None = None

    @property
    def name(self) -> str:
        """The tensor's name, or that of the part."""
        return self.part or self.moment.name

    def as_part(self, name: str) -> Captured:
        """The part of this name, or the tensor itself if it is its own."""
        return replace(self, part=None if name == self.moment.name else name)

    def records(self) -> list[TensorRecord]:
        """One a rank, of the fused tensor where this is a part; raises `RunError` without any.

        Those whose lines are damaged are left out.
        """
        found = list(self._read())
        if not found:
            raise RunError(f"{self.name} in {self.run.path}: its line is damaged.")
        return found

    def first(self) -> TensorRecord:
        """The first of `records`, for what they have in common: dtype, axes, format, stride."""
        found = next(self._read(), None)
        return found or self.records()[0]

    def pieces(self) -> list[TensorRecord]:
        """`records` without those that hold what another rank holds too."""
        found: dict[Hashable, TensorRecord] = {}
        for record in self.records():
            found.setdefault(place_of(record), record)
        return list(found.values())

    @property
    def nbytes(self) -> int:
        """Bytes of its payloads; of the fused tensor where this is a part."""
        return sum(record.payload.nbytes for record in self._read() if record.payload is not None)

    def _read(self) -> Iterator[TensorRecord]:
        for rank, line in self.lines:
            record = self.run.record_at(rank, line)
            if record is not None:
                yield record

    def open(self, *, padded: bool = False, verify: bool = True) -> LogicalTensor:
        """The tensor, mapped and read only to be verified; raises `RunError`."""
        which = Which(dp_rank=self.moment.dp_rank, padded=padded, verify=verify)
        return self.run.logical_of(self.records(), which, part=self.part)


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All moments of a run, in execution order, and what its fused tensors are cut into.

    `parts` maps a fused name to the selected names of its parts, `whole` holds the names that are
    selected themselves.
    """

    run: Run
    moments: dict[Moment, Captured]
    parts: dict[str, list[str]]
    whole: frozenset[str]

    def require_something(self, select: str | Iterable[str]) -> None:
        """Raise `SelectionError`, with near misses, where no name is selected."""
        if not self.whole and not self.parts:
            known = [*self.run.names(), *self.run.part_names()]
            raise Selection.parse(select).nothing_in(known, str(self.run.path))

    def records(self, moment: Moment) -> list[TensorRecord]:
        """Its records, one a rank; of a gradient the last, which is the sum of all before it."""
        return self.moments[moment].records()

    def tensor(
        self, moment: Moment, name: str, *, padded: bool = False, verify: bool = True
    ) -> LogicalTensor:
        """The tensor `name` of this moment, which may be a part of what was captured."""
        return self.moments[moment].as_part(name).open(padded=padded, verify=verify)

    def tensors(self) -> Iterator[Captured]:
        """All that is selected: a fused tensor where it is itself, else its selected parts."""
        for found in self.moments.values():
            name = found.moment.name
            for wanted in [name] if name in self.whole else self.parts[name]:
                yield found.as_part(wanted)


def catalogue(
    run: Run,
    select: str | Iterable[str] = "*",
    *,
    step: int | None = None,
    among: Collection[int] | None = None,
) -> Catalogue:
    """Everything a run has of these names; read from its index.

    A fused tensor is listed where its own name or that of a part of it is selected. Of `among`
    only these steps are listed, in places that do not depend on it.
    """
    parts, whole = _selected(run, select)
    return Catalogue(run, moments_of(run, whole | set(parts), step, among), parts, whole)


def captured(
    run: Run, select: str | Iterable[str] = "*", *, step: int | None = None
) -> Iterator[Captured]:
    """The `tensors` of the run's catalogue, listed step by step, so that a long run needs no more.

    Raises `SelectionError` when nothing is selected.
    """
    parts, whole = _selected(run, select)
    Catalogue(run, {}, parts, whole).require_something(select)
    for number in run.steps if step is None else (step,):
        found = moments_of(run, whole | set(parts), number)
        yield from Catalogue(run, found, parts, whole).tensors()


def _selected(run: Run, select: str | Iterable[str]) -> tuple[dict[str, list[str]], frozenset[str]]:
    """Selected parts by the fused tensor they are cut from, and names selected themselves."""
    selection = Selection.parse(select)
    whole = frozenset(filter(selection.matches, run.names()))
    return selected_parts(run, selection), whole


def selected_parts(run: Run, selection: Selection) -> dict[str, list[str]]:
    """Names of selected parts by that of their fused tensor, unless it is excluded itself."""
    found: dict[str, list[str]] = {}
    for part, fused in sorted(run.part_sources().items()):
        if selection.matches(part) and not selection.excludes(fused):
            found.setdefault(fused, []).append(part)
    return found


@dataclass(slots=True)
class _Seen:
    """The rows of one moment as they come."""

    order: int
    values: Values
    lines: list[tuple[int, int]] = field(default_factory=list)


def moments_of(
    run: Run, names: Collection[str], step: int | None, among: Collection[int] | None = None
) -> dict[Moment, Captured]:
    """What a run has of these captured names, in execution order; read from its index.

    Its place in that order does not depend on which names are asked for.
    """
    infos = {rank: run.info_of(rank) for rank in run.ranks}
    table = in_order(run.table(step=step), infos)
    places = {rank: dp_rank_of(info) for rank, info in infos.items()}
    if len(set(places.values())) == 1:
        places = {}
    seen: dict[Moment, _Seen] = {}
    for order, moment, values, line in _rows(table, names, places, among):
        known = seen.setdefault(moment, _Seen(order, values))
        if moment.name.split("/")[1] == "grad":  # the last sum of a rank counts
            known.lines = [other for other in known.lines if other[0] != line[0]]
        known.values = min(known.values, values, key=DETAIL.index)
        known.lines.append(line)
    return {
        moment: Captured(run, moment, found.order, found.values, tuple(found.lines))
        for moment, found in seen.items()
    }


def place_of(record: TensorRecord) -> Hashable:
    """What is equal for copies of a piece on several ranks, at one moment.

    Terms of a sum are no copies, but have one place: what is said of one of them is said of all.
    """
    placement = record.placement or Placement()
    if placement.unknown:
        return record.at.rank
    return tuple(sorted((axis, tuple(runs)) for axis, runs in placement.segments.items()))


def _rows(
    table: Table, wanted: Collection[str], places: dict[int, int], among: Collection[int] | None
) -> Iterator[tuple[int, Moment, Values, tuple[int, int]]]:
    """Place, moment, values, and (rank, line) of every row of a wanted name and step."""
    phases = [name.split("/")[1] for name in table.names]
    listed = np.array([name in wanted for name in table.names], dtype=bool)
    chosen = listed[table.rows["name"]]
    if among is not None:
        chosen &= np.isin(table.rows["step"], list(among))
    orders, rows = np.flatnonzero(chosen).tolist(), table.rows[chosen]
    fields = ("name", "rank", "flags", "step", "microbatch", "call", "line")
    columns = (rows[field].tolist() for field in fields)
    for order, number, rank, flags, step, microbatch, call, line in zip(
        orders, *columns, strict=True
    ):
        phase = phases[number]
        once = phase == "grad"
        moment = Moment(
            table.names[number],
            step,
            0 if once else microbatch,
            0 if once else call,
            bool(flags & RECOMPUTE),
            bool(flags & EVAL),
            None if phase in ("param", "grad") else places.get(rank),
        )
        yield order, moment, _values(flags), (rank, line)


def _values(flags: int) -> Values:
    if not flags & PAYLOAD:
        return "stats"
    return "sample" if flags & SAMPLE else "full"
