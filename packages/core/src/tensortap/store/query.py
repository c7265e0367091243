"""What is looked for: records by coordinates, on the index before any line is parsed; a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensortap.errors import ConfigError
from tensortap.names import PHASES
from tensortap.store.index import Index
from tensortap.store.rows import BAD, EVAL, RECOMPUTE, Rows

_FEW = 8  # names whose rows are looked up one by one instead of passing over all rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """Which tensor of a name is wanted, and how; the arguments of `Run.tensor`.

    `rank` asks for that rank's piece alone, `dp_rank` chooses among data-parallel ranks (they saw
    different data), `padded=False` cuts padding off, `verify` checks the digest of every piece.
    """

    step: int | None = None
    microbatch: int | None = None
    call: int | None = None
    recompute: bool = False
    eval: bool = False
    rank: int | None = None
    dp_rank: int | None = None
    padded: bool = True
    verify: bool = True

    @property
    def query(self) -> Query:
        """The records to look for."""
        return Query(
            step=self.step,
            microbatch=self.microbatch,
            call=self.call,
            recompute=self.recompute,
            eval=self.eval,
            rank=self.rank,
        )


ANY = Which()
"""The only tensor of its name, all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which records to look for; `None` does not restrict. Raises `ConfigError` for no phase.

    `nonfinite` asks for those with NaN or infinity.
    """

    step: int | None = None
    microbatch: int | None = None
    call: int | None = None
    rank: int | None = None
    phase: str | None = None
    recompute: bool | None = None
    eval: bool | None = None
    nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.phase is not None and self.phase not in PHASES:
            known = ", ".join(PHASES)
            raise ConfigError(f"phase={self.phase!r} is not a phase; phases are {known}.")

    def positions(self, index: Index, names: Sequence[int]) -> npt.NDArray[np.intp]:
        """Rows of these names that match, in the order of the lines."""
        if len(names) == len(index.names):
            near = np.arange(len(index.rows))
        elif len(names) <= _FEW:
            parts = [index.positions(number) for number in names]
            near = np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.intp)
        else:
            wanted = np.zeros(len(index.names) + 1, dtype=bool)
            wanted[list(names)] = True
            near = np.flatnonzero(wanted[index.rows["name"]])
        return near[self._among(index.rows, near)]

    def _among(self, rows: Rows, near: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        flags = rows["flags"][near]
        found: npt.NDArray[np.bool_] = flags & BAD == 0
        for field in ("step", "microbatch", "call"):
            value = getattr(self, field)
            if value is not None:
                found &= rows[field][near] == value
        for bit, wanted in ((RECOMPUTE, self.recompute), (EVAL, self.eval)):
            if wanted is not None:
                found &= (flags & bit != 0) == wanted
        if self.nonfinite:
            found &= sum(rows[field][near] for field in ("nan", "posinf", "neginf")) > 0
        return found

    def names(self, index: Index, selected: Callable[[str], bool] | None) -> list[int]:
        """Numbers of the names that are selected (`None`: all) and of the phase."""
        return [
            number
            for number, (name, _) in enumerate(index.names)
            if (self.phase is None or name.phase == self.phase)
            and (selected is None or selected(str(name)))
        ]
