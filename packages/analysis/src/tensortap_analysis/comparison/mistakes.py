"""What can be wrong with what is asked of a comparison, found before it takes any time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tensortap.errors import ConfigError
from tensortap.selection import Selection
from tensortap.store import Run
from tensortap_analysis.captured.moments import Catalogue
from tensortap_analysis.captured.sources import Source, label
from tensortap_analysis.pairs.pairing import Unpaired
from tensortap_analysis.pairs.reasons import Kind


def require_noise_of_its_own(runs: Sequence[Source], noise: Source | None) -> None:
    """Raise `ConfigError` where the only run is its own noise run, by which it always agrees."""
    if noise is None or len(runs) != 1:
        return
    if Path(label(noise)).resolve() == Path(label(runs[0])).resolve():
        raise ConfigError(
            f"The noise run {label(noise)} is the run that it is to judge: every error would be "
            "accepted. Give another run of what one must accept, or leave --noise out."
        )


def dead_patterns(select: str | Iterable[str], sides: Sequence[Catalogue]) -> Iterator[str]:
    """A sentence for each pattern of a selection that matches nothing in any run."""
    names = {name for side in sides for name in (*side.run.names(), *side.run.part_names())}
    for pattern in Selection.parse(select).dead(names, ()):
        yield f"The pattern {pattern!r} of the selection matches nothing in any of the runs."


def lost(unpaired: Iterable[Unpaired], ref: Run, run: Run) -> Iterator[Unpaired]:
    """What an incomplete run lacks was captured perhaps, and is lost: nobody can say it agrees."""
    meaning = {where: absence(side) if side.problems else None
               for where, side in (("run", ref), ("ref", run))}  # fmt: skip
    for one in unpaired:
        kind = meaning.get(one.where)
        yield one if kind is None else replace(one, kind=kind)


def absence(*runs: Run) -> Kind:
    """What it means that something cannot be read: of a run that is still written, little."""
    return "unwritten" if any(run.live for run in runs) else "damaged"
