"""The compiled kernel of statistics and formats: in the wheel, else compiled once, else absent.

`TENSORTAP_NATIVE=0` keeps to torch; `status()` says which is used and why.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from tensortap.errors import ConfigError
from tensortap.native import cache
from tensortap.native.binding import Library, StaleLibrary
from tensortap.native.build import HERE, LIBRARY

__all__ = ["Library", "Status", "library", "load", "status"]


@dataclass(frozen=True, slots=True)
class Status:
    """What computes statistics and formats of CPU tensors; `reason` is a phrase for people."""

    native: bool
    reason: str
    threads: bool = False
    """Whether large tensors are shared among torch's threads."""

    def __str__(self) -> str:
        means = "compiled" if self.native else "torch operations"
        threads = ", on torch's threads" if self.threads else ""
        return f"{means}{threads} ({self.reason})"


class _Chosen:
    """What `load` found, once per process."""

    lock = threading.Lock()
    found: tuple[Library | None, Status] | None = None


def _renew_lock() -> None:
    """Another thread may have held the lock when the process forked."""
    _Chosen.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def library() -> Library | None:
    """The kernel, or `None` when torch has to do; decided at the first call."""
    if _Chosen.found is None:
        with _Chosen.lock:
            if _Chosen.found is None:
                _Chosen.found = load()
    return _Chosen.found[0]


def status() -> Status:
    """Which implementation is used and why; `tensortap doctor` prints it."""
    library()
    assert _Chosen.found is not None
    return _Chosen.found[1]


def load() -> tuple[Library | None, Status]:
    """Look for the kernel afresh; raises `ConfigError` for an unknown `TENSORTAP_NATIVE`."""
    wanted = os.environ.get("TENSORTAP_NATIVE", "1")
    if wanted not in ("0", "1"):
        raise ConfigError(f"TENSORTAP_NATIVE={wanted!r} cannot be read; it is 1 (default) or 0.")
    if wanted == "0":
        return None, Status(False, "TENSORTAP_NATIVE=0")
    prebuilt = HERE / LIBRARY
    try:
        found = Library(prebuilt)
        return found, Status(True, f"built with the package, {prebuilt}", found.threaded)
    except (OSError, StaleLibrary) as missing:
        why = str(missing) if prebuilt.exists() else "the package holds no compiled kernel"
    return _compiled(why)


def _compiled(why: str) -> tuple[Library | None, Status]:
    try:
        found = cache.library()
    except cache.Unavailable as problem:
        return None, Status(False, f"{why}, and it could not be compiled: {problem}")
    return found, Status(True, f"compiled on this machine, {found.path}", found.threaded)
