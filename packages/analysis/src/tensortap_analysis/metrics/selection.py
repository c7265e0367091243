"""Exact order statistics from histograms of leading bits, in a bounded amount of memory.

Non-negative float64 are ordered as their bits are. The histogram says which prefix the value of
a rank has and how many values share it, and of how many nothing follows: those are known. Others
are collected and partitioned if there are not too many, else counted by their next bits first. A
prefix whose values are all equal is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tensortap.errors import RunError
from tensortap.native.counts import (
    KEY_SHIFT,
    NEXT_BITS,
    ROW,
    ROW_SHIFT,
    Histogram,
    Ints,
    Quest,
)

ROOM = 1 << 22
"""Most values that are collected at once: 32 MiB."""

Look = Callable[[Quest | None, Quest | None], None]
"""One pass over all pairs that serves the quests for differences and for relative ones."""


@dataclass(frozen=True, slots=True)
class _Bin:
    """Values that share the bits above `shift`; `below` values are smaller than all of them."""

    prefix: int
    below: int
    count: int


@dataclass(slots=True)
class Search:
    """The ranks that are looked for among values of one kind, and what is known of them."""

    ranks: Sequence[int]
    bins: Sequence[_Bin]
    shift: int
    found: dict[int, float] = field(default_factory=dict)

    @classmethod
    def begun(cls, seen: Histogram, ranks: Sequence[int]) -> Search:
        """From counts by keys, or by rows where there are no others."""
        rows = _bins_of(seen.rows.sum(axis=0), 0, 0, ranks)
        if seen.keys is None:
            return cls(ranks, rows, ROW_SHIFT)
        begun = cls(ranks, (), KEY_SHIFT)
        begun.bins = [bin_ for row in rows for bin_ in begun._opened(row, seen.keys)]
        return begun

    def _opened(self, row: _Bin, keys: Ints) -> list[_Bin]:
        """The bins of a row that hold ranks; values with nothing below their key are known."""
        exact, rest = keys[:, :, row.prefix].sum(axis=1)
        left = []
        for bin_ in _bins_of(exact + rest, row.prefix * ROW, row.below, self._ranks_in(row)):
            known = bin_.below + int(exact[bin_.prefix % ROW])
            ranks, value = self._ranks_in(bin_), _value(np.int64(bin_.prefix << KEY_SHIFT))
            self.found |= {rank: value for rank in ranks if rank < known}
            left += [bin_] if ranks[-1] >= known else []
        return left

    @property
    def waiting(self) -> int:
        """How many values share a prefix with one that is looked for."""
        return sum(bin_.count for bin_ in self.bins)

    def quest(self, threads: int, *, collect: bool) -> Quest | None:
        """What to look for in the next pass; `None` when all is known."""
        if not self.bins:
            return None
        found = np.empty(self.waiting, dtype=np.int64) if collect else None
        return Quest(self.shift, [bin_.prefix for bin_ in self.bins], found, threads)

    def learn(self, quest: Quest) -> None:
        """Take over what a pass has found. Raises `RunError` when the values are other ones."""
        seen = int(quest.counts.sum()) if quest.found is None else quest.taken
        if seen != self.waiting:
            raise RunError("The tensors changed while they were compared; compare them again.")
        if quest.found is not None:
            self._pick(quest.found)
            self.bins = ()
        else:
            self._narrow(quest)

    def _pick(self, found: Ints) -> None:
        places: dict[int, int] = {}
        before = 0
        for bin_ in self.bins:  # in ascending order, each with as many values as it counts
            places |= {rank: before + rank - bin_.below for rank in self._ranks_in(bin_)}
            before += bin_.count
        wanted = list(places.values())
        found.partition(sorted(set(wanted)))
        self.found |= zip(places, found[wanted].view(np.float64).tolist(), strict=True)

    def _narrow(self, quest: Quest) -> None:
        width, further = min(self.shift, NEXT_BITS), []
        counts = quest.counts.sum(axis=0)
        ones = np.bitwise_or.reduce(quest.ones)
        mixed = ones & np.bitwise_or.reduce(quest.zeros)
        for row, bin_ in enumerate(self.bins):
            ranks = self._ranks_in(bin_)
            inner = _bins_of(counts[row], bin_.prefix << width, bin_.below, ranks)
            for narrow in inner:
                place = narrow.prefix & ((1 << width) - 1)
                if mixed[row, place]:
                    further.append(narrow)
                    continue
                value = _value(ones[row, place])
                self.found |= {rank: value for rank in ranks if _holds(narrow, rank)}
        self.bins, self.shift = further, self.shift - width

    def _ranks_in(self, bin_: _Bin) -> list[int]:
        return [rank for rank in self.ranks if _holds(bin_, rank)]


def search(look: Look, absolute: Search, relative: Search, *, threads: int) -> None:
    """Pass over the pairs until both searches are done: once, or up to four times more."""
    while waiting := absolute.waiting + relative.waiting:
        collect = waiting <= ROOM
        quests = [one.quest(threads, collect=collect) for one in (absolute, relative)]
        look(*quests)
        for one, quest in zip((absolute, relative), quests, strict=True):
            if quest is not None:
                one.learn(quest)


def percentile_ranks(count: int, percents: Sequence[int]) -> list[int]:
    """The ranks, from 0, that `percentile` needs; none of no values."""
    if not count:
        return []
    places = [(count - 1) * (percent / 100) for percent in percents]
    return sorted(
        {min(rank, count - 1) for place in places for rank in (int(place), int(place) + 1)}
    )


def percentile(found: Mapping[int, float], count: int, percent: int) -> float:
    """Linear interpolation between the neighbours of a place, rounded as numpy's."""
    place = (count - 1) * (percent / 100)
    low = int(place)
    lower, upper, part = found[low], found[min(low + 1, count - 1)], place - low
    if lower == upper:
        return lower
    gap = upper - lower
    return upper - gap * (1 - part) if part >= 0.5 else lower + gap * part


def _bins_of(counts: Ints, start: int, below: int, ranks: Sequence[int]) -> list[_Bin]:
    """The bins that hold ranks; `start` is the prefix of the first bin."""
    until = below + np.cumsum(counts)
    places = sorted({int(place) for place in np.searchsorted(until, ranks, side="right")})
    return [
        _Bin(start + place, int(until[place] - counts[place]), int(counts[place]))
        for place in places
    ]


def _holds(bin_: _Bin, rank: int) -> bool:
    return bin_.below <= rank < bin_.below + bin_.count


def _value(bits: np.int64) -> float:
    return float(np.int64(bits).view(np.float64))
