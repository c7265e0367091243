"""Which weights of several checkpoints are the same one, at different times."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tensortap_analysis.weights.scope import Scope
from tensortap_analysis.weights.sources import CheckpointError, Skipped
from tensortap_analysis.weights.weight import Weight

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.")
"""What wrapping a model, or saving it from inside another, puts before every name."""


@dataclass(frozen=True, slots=True)
class Series:
    """One weight in each checkpoint; `None` where it is not there. `layer` is its first name."""

    layer: str
    weights: tuple[Weight | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(weight.nbytes for weight in self.weights if weight is not None)


def series(scopes: Sequence[Scope], select: str | Iterable[str] = "*") -> list[Series]:
    """Weights with one name, in the order of the first checkpoint that has them.

    Where wrappers around the model named them differently, their names without those count.
    Raises `CheckpointError` where two checkpoints that follow each other have none in common.
    """
    chosen = [scope.weights(select) for scope in scopes]
    bare = all(len({_bare(w.name) for w in some}) == len(some) for some in chosen)
    tables = [{_bare(w.name) if bare else w.name: w for w in some} for some in chosen]
    keys = dict.fromkeys(key for table in tables for key in table)
    found = [_series(tuple(table.get(key) for table in tables)) for key in keys]
    for step, pair in enumerate(itertools.pairwise(scopes)):
        if not any(one.weights[step] and one.weights[step + 1] for one in found):
            first = (f"{s.source.label} ({some[0].name}, …)" for s, some in
                     zip(pair, chosen[step:], strict=False))  # fmt: skip
            raise CheckpointError(
                f"No weight is in both of {' and '.join(first)}; are they of one model?"
            )
    return found


def missing(one: Series, step: int, labels: Sequence[str]) -> Skipped | None:
    """Why a weight cannot be followed from checkpoint `step` to the next."""
    for at in (step, step + 1):
        if one.weights[at] is None:
            return Skipped(one.layer, f"is not in {labels[at]}")
    return None


def _series(weights: tuple[Weight | None, ...]) -> Series:
    return Series(next(weight.layer for weight in weights if weight is not None), weights)


def _bare(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name
