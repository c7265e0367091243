"""`Moment`: which tensor, and when; what tensors of two runs are paired by."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tensortap.records import TensorRecord, Values
from tensortap.selection import Selection
from tensortap.store import Run
from tensortap.store.logical import LogicalTensor
from tensortap.store.lookup import dp_rank_of
from tensortap.store.rows import EVAL, PAYLOAD, RECOMPUTE, SAMPLE


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


@dataclass(slots=True)
class Sighting:
    """What a run has of one moment: where it stands in execution order, and in how much detail."""

    order: int
    values: Values
    ranks: set[int]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All moments of a run, in execution order, and what its fused tensors are cut into.

    `parts` maps a fused name to the selected names of its parts, `whole` holds the names that are
    selected themselves.
    """

    run: Run
    moments: dict[Moment, Sighting]
    parts: dict[str, list[str]]
    whole: frozenset[str]

    def require_something(self, select: str | Iterable[str]) -> None:
        """Raise `SelectionError`, with near misses, where no name is selected."""
        if not self.whole and not self.parts:
            known = [*self.run.names(), *self.run.part_names()]
            raise Selection.parse(select).nothing_in(known, str(self.run.path))

    def records(self, moment: Moment) -> list[TensorRecord]:
        """Its records, one a rank; of a gradient the last, which is the sum of all before it."""
        own = _phase(moment.name) != "grad"
        found = self.run.records(
            ["re:" + re.escape(moment.name)],
            step=moment.step,
            recompute=moment.recompute,
            eval=moment.eval,
            microbatch=moment.microbatch if own else None,
            call=moment.call if own else None,
        )
        ranks = self.moments[moment].ranks
        return list({r.at.rank: r for r in found if r.at.rank in ranks}.values())

    def tensor(self, moment: Moment, name: str, *, padded: bool = False) -> LogicalTensor:
        """The tensor `name` of this moment, which may be a part of what was captured."""
        own = _phase(name) != "grad"
        return self.run.logical(
            name,
            step=moment.step,
            recompute=moment.recompute,
            eval=moment.eval,
            dp_rank=moment.dp_rank,
            padded=padded,
            microbatch=moment.microbatch if own else None,
            call=moment.call if own else None,
        )


def catalogue(run: Run, select: str | Iterable[str] = "*", *, step: int | None = None) -> Catalogue:
    """Everything a run has of these names; read from its index.

    A fused tensor is listed where its own name or that of a part of it is selected.
    """
    selection = Selection.parse(select)
    parts: dict[str, list[str]] = {}
    for part, fused in sorted(run.part_sources().items()):
        if selection.matches(part):
            parts.setdefault(fused, []).append(part)
    whole = frozenset(filter(selection.matches, run.names()))
    return Catalogue(run, _sightings(run, whole | set(parts), step), parts, whole)


def _sightings(run: Run, wanted: frozenset[str], step: int | None) -> dict[Moment, Sighting]:
    table = run.table(step=step)
    places = {rank: dp_rank_of(run.info_of(rank)) for rank in run.ranks}
    spread = len(set(places.values())) > 1
    fields = ("name", "rank", "flags", "step", "microbatch", "call")
    rows = zip(*(table.rows[field].tolist() for field in fields), strict=True)
    found: dict[Moment, Sighting] = {}
    for order, (number, rank, flags, at, microbatch, call) in enumerate(rows):
        name = table.names[number]
        if name not in wanted:
            continue
        phase = _phase(name)
        once = phase == "grad"
        apart = spread and phase not in ("param", "grad")
        moment = Moment(
            name, at, 0 if once else microbatch, 0 if once else call,
            bool(flags & RECOMPUTE), bool(flags & EVAL), places[rank] if apart else None,
        )  # fmt: skip
        seen = found.setdefault(moment, Sighting(order, _values(flags), set()))
        seen.ranks.add(rank)
    return found


def _values(flags: int) -> Values:
    if not flags & PAYLOAD:
        return "stats"
    return "sample" if flags & SAMPLE else "full"


def _phase(name: str) -> str:
    return name.split("/")[1]
