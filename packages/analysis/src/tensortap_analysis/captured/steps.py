"""The steps of a run: whether it has the one that is asked for, and how they are listed."""

from __future__ import annotations

from collections.abc import Sequence

from tensortap.errors import RunError
from tensortap.store import Run


def require_step(run: Run, path: str, step: int | None) -> None:
    """Raise `RunError`, with the steps there are, where a run has none of this number."""
    if step is not None and step not in run.steps:
        raise RunError(f"{path} has no step {step}; it has {spelled(run.steps)}.")


def spelled(steps: Sequence[int]) -> str:
    """`steps 0, 1, 2, …`, or that there are none."""
    if not steps:
        return "no steps"
    words = ", ".join(map(str, steps[:8])) + (", …" if len(steps) > 8 else "")
    return f"step {words}" if len(steps) == 1 else f"steps {words}"
