"""Finding records by name and coordinates on the index, before any line is parsed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensortap.selection import Selection
from tensortap.store.index import Index
from tensortap.store.rows import BAD, EVAL, RECOMPUTE


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for; `None` does not restrict."""

    step: int | None = None
    microbatch: int | None = None
    call: int | None = None
    phase: str | None = None
    recompute: bool | None = None
    eval: bool | None = None

    def positions(self, index: Index, names: Iterable[int]) -> npt.NDArray[np.intp]:
        """Rows of these names that match, in the order of the lines."""
        rows = index.rows
        wanted = np.zeros(len(index.names) + 1, dtype=bool)
        wanted[np.fromiter(names, dtype=np.intp)] = True
        found = wanted[rows["name"]] & (rows["flags"] & BAD == 0)
        for field, value in (
            ("step", self.step), ("microbatch", self.microbatch), ("call", self.call),
        ):  # fmt: skip
            if value is not None:
                found &= rows[field] == value
        for bit, value in ((RECOMPUTE, self.recompute), (EVAL, self.eval)):
            if value is not None:
                found &= (rows["flags"] & bit != 0) == value
        return np.flatnonzero(found)

    def names(self, index: Index, selection: Selection | None) -> list[int]:
        """Numbers of the names that the selection and the phase let through."""
        return [
            number
            for number, (name, _) in enumerate(index.names)
            if (self.phase is None or name.phase == self.phase)
            and (selection is None or selection.matches(str(name)))
        ]
