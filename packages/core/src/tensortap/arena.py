"""`HostArena`: the host memory of payloads in flight; one block, so that it cannot grow."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

_PAGE = 4096


def rounded(nbytes: int) -> int:
    """What `nbytes` take in the arena: whole pages."""
    return max(_PAGE, -(-nbytes // _PAGE) * _PAGE)


class HostArena:
    """Hands out pieces of one block of `limit` bytes, first fit, and takes them back.

    A fresh allocation for each payload would cost a page fault per 4 KiB, and what the allocator
    keeps of freed ones would not count. The block is made at the first use; pages that were never
    used take no memory. On a machine with CUDA it is pinned, for copies that do not wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit // _PAGE * _PAGE
        self.used = 0
        self.peak = 0
        self._memory: torch.Tensor | None = None
        self._free = [(0, self.limit)]
        self._returned = threading.Condition()

    def take(self, nbytes: int, *, wait: Callable[[], bool]) -> torch.Tensor | None:
        """A uint8 tensor of at least `nbytes`; `None` when there is no room and `wait` says no."""
        size = rounded(nbytes)
        with self._returned:
            while (start := self._fit(size)) is None:
                if not wait():
                    return None
                self._returned.wait(timeout=0.5)
            self.used += size
            self.peak = max(self.peak, self.used)
            if self._memory is None:
                pinned = torch.cuda.is_available()
                self._memory = torch.empty(
                    self.limit, dtype=torch.uint8, device="cpu", pin_memory=pinned
                )
            return self._memory[start : start + size]

    def _fit(self, size: int) -> int | None:
        for place, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[place] = (start + size, length - size)
                return start
        return None

    def give(self, piece: torch.Tensor) -> None:
        """Take a piece back; its memory may be handed out again at once."""
        with self._returned:
            self.used -= piece.nbytes
            self._free = _joined([*self._free, (int(piece.storage_offset()), piece.nbytes)])
            self._returned.notify_all()

    def wake(self) -> None:
        """Let waiting threads ask `wait` again."""
        with self._returned:
            self._returned.notify_all()

    def clear(self) -> None:
        """Free the block, once nothing of it is used any more."""
        with self._returned:
            self._memory = None


def _joined(free: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order, and neighbours become one."""
    joined: list[tuple[int, int]] = []
    for start, length in sorted(free):
        before, size = joined[-1] if joined else (0, -1)
        if before + size == start:
            joined[-1] = (before, size + length)
        else:
            joined.append((start, length))
    return joined
