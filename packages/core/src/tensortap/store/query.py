"""Finding records by name and coordinates on the index, before any line is parsed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tensortap.selection import Selection
from tensortap.store.index import Index
from tensortap.store.rows import BAD, EVAL, RECOMPUTE, Rows

_FEW = 8  # names whose rows are looked up one by one instead of passing over all rows


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for; `None` does not restrict."""

    step: int | None = None
    microbatch: int | None = None
    call: int | None = None
    phase: str | None = None
    recompute: bool | None = None
    eval: bool | None = None

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
        return found

    def names(self, index: Index, selection: Selection | None) -> list[int]:
        """Numbers of the names that the selection and the phase let through."""
        return [
            number
            for number, (name, _) in enumerate(index.names)
            if (self.phase is None or name.phase == self.phase)
            and (selection is None or selection.matches(str(name)))
        ]
