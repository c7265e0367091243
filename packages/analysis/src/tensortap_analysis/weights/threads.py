"""Numbers of threads that hold for a whole process, while several scans may run in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class OneThread:
    """Sets a number of threads to 1 when the first user comes, and back when the last one goes."""

    def __init__(self, get: Callable[[], int], put: Callable[[int], object]) -> None:
        self.get, self.put = get, put
        self._lock = threading.Lock()
        self._users = 0
        self._before = 1

    @contextmanager
    def used(self) -> Iterator[None]:
        """One thread inside; from any number of threads at once."""
        with self._lock:
            if self._users == 0:
                self._before = self.get()
                self.put(1)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self.put(self._before)
