"""One run against the reference: what was measured, how it is judged, and what that comes to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tensortap_analysis.captured.facts import RunFacts
from tensortap_analysis.divergence.depth import LayerError
from tensortap_analysis.divergence.parting import Divergence
from tensortap_analysis.judging.judgement import Judgement
from tensortap_analysis.judging.rounding import is_mask
from tensortap_analysis.measuring.layers import Change, abnormal
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.pairs.pairing import Unpaired
from tensortap_analysis.pairs.reasons import Kind

Verdict = Literal["agree", "differ", "incomparable"]


@dataclass(frozen=True, slots=True)
class RunComparison:
    """One run against the reference: pairs in execution order, a judgement beside each.

    `beside` are pairs that were not selected, and are not listed or judged, but tell where those
    that are come from.
    """

    run: RunFacts
    pairs: tuple[Pair, ...]
    unpaired: tuple[Unpaired, ...]
    changes: tuple[Change, ...]
    warnings: tuple[str, ...] = ()
    judgements: tuple[Judgement, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    depth: tuple[LayerError, ...] = ()
    notes: tuple[str, ...] = ()
    beside: tuple[Pair, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """What it comes to; agreement is that of the tensors that could be compared.

        `differ`: a tensor is beyond its limit, has another shape, or its ranks contradict each
        other. `incomparable`: nothing could be compared, or something is damaged, or has only
        statistics where the preset needs values, so that nobody can say that the runs agree.
        """
        if not self.pairs:
            return "incomparable"
        apart = self.of_kind("shape", "conflict")
        # Each framework makes masks of its own, with or without axes for batch and heads.
        if self.divergences or any(not is_mask(one.name) for one in apart):
            return "differ"
        lost = self.of_kind("damaged", "unwritten")
        return "incomparable" if lost or self.undecided else "agree"

    @property
    def first_divergence(self) -> Divergence | None:
        """The earliest tensor in execution order that is beyond its limit."""
        return self.divergences[0] if self.divergences else None

    @property
    def local(self) -> tuple[Divergence, ...]:
        """The tensors beyond their limits whose inputs certainly do not explain the error."""
        return tuple(found for found in self.divergences if found.origin == "local")

    @property
    def unknown(self) -> tuple[Divergence, ...]:
        """Those of which nobody can say whether the error was added there or inherited."""
        return tuple(found for found in self.divergences if found.origin == "unknown")

    @property
    def suspects(self) -> tuple[Divergence, ...]:
        """Those that added most, certainly or by all appearances; each name once, most first."""
        some = [found for found in self.divergences if found.suspicious]
        ranked = sorted(some, key=lambda found: (-found.local, found.pair.order))
        return tuple({found.name: found for found in reversed(ranked)}.values())[::-1]

    @property
    def ranked(self) -> tuple[tuple[Pair, Judgement], ...]:
        """All pairs, the farthest beyond its limit first; measured limits before estimated ones."""
        both = zip(self.pairs, self.judgements, strict=True)
        measured = any(pair.noise is not None for pair in self.pairs)

        def how_bad(row: tuple[Pair, Judgement]) -> tuple[float, ...]:
            pair, judgement = row
            known = not (measured and judgement.estimated)
            return math.isinf(judgement.excess), known, judgement.excess, pair.error, -pair.order

        return tuple(sorted(both, key=how_bad, reverse=True))

    @property
    def worst(self) -> Pair | None:
        """The pair farthest beyond, or nearest to, its limit; of equals the one of larger error."""
        return self.ranked[0][0] if self.pairs else None

    @property
    def estimated(self) -> bool:
        """Is any limit an estimate?"""
        return any(judgement.estimated for judgement in self.judgements)

    @property
    def undecided(self) -> tuple[Pair, ...]:
        """Tensors of which only statistics are known, by which the preset cannot judge them."""
        both = zip(self.pairs, self.judgements, strict=True)
        return tuple(pair for pair, judgement in both if not judgement.decided)

    @property
    def not_compared(self) -> int:
        """How many tensors were not compared, counted at every moment."""
        return sum(one.count for one in self.unpaired)

    def of_kind(self, *kinds: Kind) -> tuple[Unpaired, ...]:
        """What was not compared for reasons of these kinds."""
        return tuple(one for one in self.unpaired if one.kind in kinds)

    @property
    def jumps(self) -> tuple[Change, ...]:
        """Sudden changes between adjacent layers, in either run."""
        return tuple(change for change in self.changes if change.jumps)

    @property
    def abnormal(self) -> tuple[str, ...]:
        """Tensors with NaN, infinities or an abnormal mean, as sentences."""
        return tuple(abnormal(self.pairs))


def counted(unpaired: tuple[Unpaired, ...]) -> Iterator[str]:
    """`12 only in REF`: how many were not compared, by what is wrong with them."""
    words = (
        ("absent", "ref", "only in REF"),
        ("absent", "run", "only in RUN"),
        ("damaged", None, "lost or damaged"),
        ("unwritten", None, "not written yet"),
        ("conflict", None, "of which ranks contradict each other"),
        ("shape", None, "of other shapes"),
        ("unknown", None, "of which not enough was captured"),
    )
    for kind, where, text in words:
        some = [one for one in unpaired if one.kind == kind and where in (None, one.where)]
        if some:
            yield f"{sum(one.count for one in some):,} {text}"
