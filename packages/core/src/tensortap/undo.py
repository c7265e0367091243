"""Every edit of an object we do not own records its own inverse, in the same line.

with Undo() as undo:                       # anything raised in the block undoes all of it
    undo.replace(module, "forward", tapped)
    undo.keep(module.register_forward_hook(hook))
undo.run()                                 # later: back to exactly what was there
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Any, Protocol

from tensortap.errors import CaptureWarning

_ABSENT: Any = object()


class Removable(Protocol):
    """What torch's `register_…_hook` returns."""

    def remove(self) -> None: ...


class Undo:
    """A stack of inverses; `run` plays them backwards, once."""

    def __init__(self) -> None:
        self._inverses: list[Callable[[], None]] = []

    def replace(self, owner: Any, attribute: str, value: Any) -> None:
        """Set `owner.attribute`; undone by restoring, or deleting what was absent before."""
        before = vars(owner).get(attribute, _ABSENT)
        setattr(owner, attribute, value)
        self._inverses.append(lambda: _restore_attribute(owner, attribute, value, before))

    def set_item(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set `mapping[key]`; undone by restoring, or deleting what was absent before."""
        before = mapping.get(key, _ABSENT)
        mapping[key] = value
        self._inverses.append(lambda: _restore_item(mapping, key, value, before))

    def keep(self, handle: Removable) -> None:
        """Remove a hook handle on undo."""
        self._inverses.append(handle.remove)

    def call(self, inverse: Callable[[], None]) -> None:
        """Call `inverse` on undo; for edits that have their own way back."""
        self._inverses.append(inverse)

    def run(self) -> None:
        """Undo everything, latest edit first; one failing inverse does not stop the others."""
        failures = []
        while self._inverses:
            try:
                self._inverses.pop()()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.run()


def _restore_attribute(owner: Any, attribute: str, ours: Any, before: Any) -> None:
    if vars(owner).get(attribute, _ABSENT) is not ours:
        _report_foreign(f"{_title(owner)}.{attribute}")
        return
    if before is _ABSENT:
        delattr(owner, attribute)
    else:
        setattr(owner, attribute, before)


def _restore_item(mapping: MutableMapping[Any, Any], key: Any, ours: Any, before: Any) -> None:
    if mapping.get(key, _ABSENT) is not ours:
        _report_foreign(f"{type(mapping).__name__}[{key!r}]")
    elif before is _ABSENT:
        del mapping[key]
    else:
        mapping[key] = before


def _report_foreign(place: str) -> None:
    warnings.warn(
        f"{place} was patched again after tensortap patched it, so tensortap left it alone. "
        "Remove the later patch first, then detach.",
        CaptureWarning,
        stacklevel=4,
    )


def _title(owner: Any) -> str:
    return str(getattr(owner, "__qualname__", getattr(owner, "__name__", type(owner).__name__)))


class SharedPatch:
    """One process-wide patch for any number of taps: the first installs, the last one removes.

    Two taps that each patched a library function could not be undone in any order but the
    reverse. `install` gets a fresh `Undo` and must record every edit in it.
    """

    def __init__(self, install: Callable[[Undo], None]) -> None:
        self._install = install
        self._undo = Undo()
        self._users = 0
        self._lock = threading.Lock()

    def acquire(self, undo: Undo) -> None:
        """Make sure the patch is in place until `undo` runs."""
        with self._lock:
            if self._users == 0:
                with self._undo:
                    self._install(self._undo)
            self._users += 1
        undo.call(self._release)

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo.run()
