"""Why two tensors were not compared, and what that means for the verdict."""

from __future__ import annotations

from typing import Literal

from tensortap.errors import RunConflict, RunCorrupt

Kind = Literal["absent", "shape", "conflict", "damaged", "unwritten", "unknown"]
"""`absent`: one run has no such tensor. `shape`: both have it, in shapes that do not match.
`conflict`: the pieces that ranks have of it contradict each other. `damaged`: it was captured, and
cannot be read any more. `unwritten`: a run of the two is still being written, and it is not there
yet, or not whole. `unknown`: what was captured of it is not enough to tell."""


class NotComparable(Exception):
    """These two tensors cannot be compared; the message is the reason, as half a sentence."""

    def __init__(self, reason: str, kind: Kind = "unknown") -> None:
        super().__init__(reason)
        self.kind: Kind = kind


def kind_of(failure: Exception) -> Kind:
    """What an error that a run raised for one of its tensors says about it."""
    if isinstance(failure, RunCorrupt):
        return "damaged"
    return "conflict" if isinstance(failure, RunConflict) else "unknown"
