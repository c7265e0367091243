"""What the layouts take from a run: the tensors of its mode, sample by sample."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from tensortap.errors import RunError
from tensortap.layouts import Progress
from tensortap.store import Run

BARE = "statistics only; capture with values='full'"


@dataclass(frozen=True, slots=True)
class Told:
    """What a run says of its mode."""

    mode: str
    family: str
    basis: str
    format: str | None
    model: str
    created: str

    @classmethod
    def by(cls, run: Run) -> Told:
        """Read from run.json; a run that was not captured in a mode is called by its format."""
        info = run.info
        said = info.metadata.get("mode")
        fields: dict[str, Any] = said if isinstance(said, dict) else {}
        mode = info.mode or info.format or (said if isinstance(said, str) else run.path.name)
        model = info.metadata.get("model", info.model_class)
        family, basis = str(fields.get("family", "")), str(fields.get("basis", "native"))
        return cls(str(mode), family, basis, info.format, str(model), info.created)


def samples(
    run: Run, name: str, progress: Progress, done: int
) -> tuple[list[torch.Tensor], list[str]]:
    """The values of a tensor, one a sample, in order; and why there are none of some."""
    found, skipped, seen = [], [], set()
    for record in run.records(["re:" + re.escape(name)]):
        at = record.at
        when = (at.step, at.microbatch, at.call)
        if record.values != "full":
            skipped.append(f"{name}: {BARE}")
        elif when not in seen and not at.recompute:
            seen.add(when)
            found.append(
                run.tensor(name, step=at.step, microbatch=at.microbatch, call=at.call, eval=at.eval)
            )
        progress(done + len(seen))
    return found, skipped


def require(found: Iterable[object], run: Run, what: str) -> None:
    """Raise `RunError` when nothing of the layout was in the run."""
    if not any(True for _ in found):
        raise RunError(f"{run.path} has no values of {what}, so there is nothing to export.")
