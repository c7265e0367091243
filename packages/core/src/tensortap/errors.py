"""Every error tensortap raises on purpose: each message says what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TensortapError(Exception):
    """Base of all errors a user can act on; the CLI prints it as one line."""


class ConfigError(TensortapError):
    """A keyword argument, environment variable or command-line value that cannot be used."""


class SelectionError(ConfigError):
    """A selection that is malformed or matches nothing in the model or the run."""


class NotSupported(TensortapError):
    """Something that was asked for by name and cannot be served here."""


class AlreadyAttached(TensortapError):
    """The model, or a part of it, has a tap already."""


class CaptureError(TensortapError):
    """Capturing failed; raised under `on_error="raise"`, else reported as one warning."""


class RunExists(TensortapError):
    """The run directory is there already; a tap never mixes two runs."""


class RunError(TensortapError):
    """A run directory cannot be opened or a record in it cannot be served."""


class RunCorrupt(RunError):
    """Stored bytes contradict their checksum or the layout; names file and line."""


class RunConflict(RunError):
    """The pieces that ranks captured of one tensor contradict each other."""


class PluginError(TensortapError):
    """An installed plugin fails to load or contradicts the core's version."""


class CaptureWarning(UserWarning):
    """The capture is incomplete, or something on the way deserves a look; training goes on."""


def nearest(wanted: str, known: Iterable[str], limit: int = 5) -> str:
    """`'a', 'b'`: the known words closest to `wanted`, for an error message."""
    words = list(known)
    close = difflib.get_close_matches(wanted, words, n=limit, cutoff=0.4) or words[:limit]
    return ", ".join(repr(word) for word in close) or "nothing"
