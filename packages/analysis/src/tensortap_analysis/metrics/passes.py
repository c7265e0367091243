"""The blocks of a pair as they are computed with, as often as a pass needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from tensortap.errors import NotSupported
from tensortap_analysis.metrics.pairs import BlockPair, prepared

Blocks = Callable[[], Iterable[BlockPair]]


@dataclass(slots=True)
class Passes:
    """Prepared blocks; a single one is prepared only once.

    `dtypes` are those given, known from the first block on. Raises `NotSupported` for blocks that
    do not match each other.
    """

    blocks: Blocks
    dtypes: tuple[torch.dtype, torch.dtype] | None = None
    _only: BlockPair | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[BlockPair]:
        if self._only is not None:
            yield self._only
            return
        several = False
        for ref, other in self.blocks():
            self._require_one_kind(ref.dtype, other.dtype)
            found = prepared(ref, other)
            self._only = None if several else found
            several = True
            yield found

    def _require_one_kind(self, ref: torch.dtype, other: torch.dtype) -> None:
        if self.dtypes not in (None, (ref, other)):
            raise NotSupported("The blocks of a tensor are of several dtypes.")
        self.dtypes = ref, other

    @property
    def one_dtype(self) -> bool:
        """Have both sides the same, or no block at all?"""
        return self.dtypes is None or self.dtypes[0] == self.dtypes[1]

    @property
    def floats(self) -> bool:
        """Are the values of the reference floats, real or complex?"""
        return self.dtypes is not None and (
            self.dtypes[0].is_floating_point or self.dtypes[0].is_complex
        )

    @property
    def parts(self) -> int:
        """How many values an element has: two where either side is complex."""
        return 2 if any(dtype.is_complex for dtype in self.dtypes or ()) else 1


def require_values(found: int, expected: int) -> None:
    """Raise `NotSupported` where blocks do not make up the shape they were given with."""
    if found != expected:
        raise NotSupported(f"The blocks hold {found} values, the shape {expected}.")
