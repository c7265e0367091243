"""`track`: every weight followed through checkpoints, two of them in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tensortap.errors import ConfigError
from tensortap.store.dtypes import dtype_name
from tensortap_analysis.weights.drift.changes import change
from tensortap_analysis.weights.drift.pairing import Series, missing, series
from tensortap_analysis.weights.drift.spectra import Spectra, growth, spectra
from tensortap_analysis.weights.drift.stacks import worst_change
from tensortap_analysis.weights.pool import in_workers
from tensortap_analysis.weights.result import encoded
from tensortap_analysis.weights.scope import Progress, Scope
from tensortap_analysis.weights.sources import Skipped
from tensortap_analysis.weights.weight import Weight

Comparison = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Drift:
    """From one checkpoint to the next: metrics by layer, and what could not be compared."""

    before: str
    after: str
    layers: Mapping[str, Comparison]
    skipped: tuple[Skipped, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """`layer_comparisons` and the rest, as plain values."""
        return {
            "before": self.before,
            "after": self.after,
            "layer_comparisons": {layer: dict(found) for layer, found in self.layers.items()},
            "skipped": [asdict(one) for one in self.skipped],
        }

    def to_json(self) -> dict[str, Any]:
        """The same with infinities as strings, which JSON does not have."""
        found: dict[str, Any] = encoded(self.as_dict())
        return found


@torch.no_grad()
def track(
    scopes: Sequence[Scope],
    *,
    select: str | Iterable[str] = "*",
    parallel: bool | int = False,
    spectral: bool = True,
    progress: Progress = lambda done, total: None,
) -> tuple[Drift, ...]:
    """Compare each checkpoint with the one before it; the metrics are those of `change`.

    With `spectral`, which takes most of the time, matrices also have `spectral_norm_ratio`,
    `condition_growth`, `effective_rank_ratio` and what those are made of. Of a stack of experts
    each metric is that of the expert that is worst off. Raises `CheckpointError` and
    `SelectionError`.
    """
    if len(scopes) < 2:
        raise ConfigError("Drift needs two checkpoints at least.")
    everything = series(scopes, select)
    found = _followed(everything, parallel, spectral, progress)
    labels = [scope.source.label for scope in scopes]
    return tuple(_drift(step, everything, found, labels) for step in range(len(scopes) - 1))


def _followed(
    everything: Sequence[Series], parallel: bool | int, spectral: bool, progress: Progress
) -> dict[str, dict[int, Comparison | str]]:
    """By layer and step: metrics, or why there are none."""
    total, read = sum(one.nbytes for one in everything), 0
    found: dict[str, dict[int, Comparison | str]] = {}
    progress(0, total)

    def done(one: Series, steps: dict[int, Comparison | str]) -> None:
        nonlocal read
        found[one.layer] = steps
        read += one.nbytes
        progress(read, total)

    def work(one: Series) -> dict[int, Comparison | str]:
        return dict(_steps(one, spectral))

    largest_first = sorted(everything, key=lambda one: -one.nbytes)
    in_workers(largest_first, work, parallel=parallel, done=done)
    return found


def _drift(
    step: int,
    everything: Sequence[Series],
    found: Mapping[str, Mapping[int, Comparison | str]],
    labels: Sequence[str],
) -> Drift:
    layers, skipped = {}, []
    for one in everything:
        gone = missing(one, step, labels)
        if gone is not None:
            if one.weights[step] is not None or one.weights[step + 1] is not None:
                skipped.append(gone)
            continue
        result = found[one.layer][step]
        if isinstance(result, str):
            skipped.append(Skipped(one.layer, result))
        else:
            layers[one.layer] = result
    return Drift(labels[step], labels[step + 1], layers, tuple(skipped))


@dataclass(frozen=True, slots=True)
class _State:
    """A weight at one time: its matrices, and their spectra if they are wanted."""

    weight: Weight
    matrices: list[torch.Tensor]
    spectra: list[Spectra] | None


def _steps(one: Series, spectral: bool) -> Iterator[tuple[int, Comparison | str]]:
    before: _State | None = None
    for at, weight in enumerate(one.weights):
        after = None if weight is None else _state(weight, spectral)
        if before is not None and after is not None:
            yield at - 1, _compared(before, after)
        before = after


def _state(weight: Weight, spectral: bool) -> _State:
    matrices = list(weight.matrices())
    if not spectral or weight.kind == "vector":
        return _State(weight, matrices, None)
    return _State(weight, matrices, [spectra(matrix, weight.dtype) for matrix in matrices])


def _compared(before: _State, after: _State) -> Comparison | str:
    shapes = [[tuple(m.shape) for m in state.matrices] for state in (before, after)]
    if shapes[0] != shapes[1]:
        old, new = ("x".join(map(str, state.weight.shape)) for state in (before, after))
        return f"was {old} and is {new}"
    parts = [change(old, new) for old, new in zip(before.matrices, after.matrices, strict=True)]
    if before.spectra is not None and after.spectra is not None:
        grown = map(growth, before.spectra, after.spectra)
        parts = [part | more for part, more in zip(parts, grown, strict=True)]
    if not parts:
        return "the stack has no matrix"
    found = parts[0] if after.weight.kind != "experts" else worst_change(parts)
    dtypes = {"dtype_before": before.weight.dtype, "dtype_after": after.weight.dtype}
    names = {key: dtype_name(dtype) for key, dtype in dtypes.items()}
    return {"shape": list(after.weight.shape), "kind": after.weight.kind, **names, **found}
