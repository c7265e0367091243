"""`track`: every weight followed through checkpoints, two matrices in memory at a time."""

from __future__ import annotations

import itertools
import math
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
from tensortap_analysis.weights.saved import encoded
from tensortap_analysis.weights.scope import Progress, Scope
from tensortap_analysis.weights.sources import CheckpointError, Skipped
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
    `condition_growth`, `effective_rank_ratio` and what those are made of. `size_before` and
    `size_after` are root mean squares of the values of a vector, of a matrix those of its outputs
    for independent inputs of 1. Of a stack of experts each metric is that of the expert that is
    worst off. Raises `CheckpointError` and `SelectionError`.
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
    before, after = labels[step : step + 2]
    if not layers:
        more = f" (and {len(skipped) - 1:,} more)" if len(skipped) > 1 else ""
        raise CheckpointError(
            f"Nothing of {before} can be compared with {after}: {skipped[0].name} "
            f"{skipped[0].reason}{more}; are they of one model?"
        )
    return Drift(before, after, layers, tuple(skipped))


def _steps(one: Series, spectral: bool) -> Iterator[tuple[int, Comparison | str]]:
    """Each weight is read once as what was and once as what became of it: no two are held."""
    known: list[Spectra] = []
    for at, (before, after) in enumerate(itertools.pairwise(one.weights)):
        if before is None or after is None:
            known = []
            continue
        found, known = _compared(before, after, known, spectral and after.has_spectrum)
        yield at, found


def _compared(
    before: Weight, after: Weight, known: Sequence[Spectra], spectral: bool
) -> tuple[Comparison | str, list[Spectra]]:
    """Metrics, or why there are none, and the spectra after; `known` are those before, if any."""
    parts: list[Comparison] = []
    spectra_after: list[Spectra] = []
    both = itertools.zip_longest(before.matrices(), after.matrices())
    for index, (old, new) in enumerate(both):
        if old is None or new is None or old.shape != new.shape:
            return _reshaped(before, after), []
        part = change(old, new)
        part |= _sizes(part, old.shape, after.has_spectrum)
        if spectral:
            was = known[index] if known else spectra(old, before.dtype)
            spectra_after.append(spectra(new, after.dtype))
            part |= growth(was, spectra_after[-1])
        parts.append(part)
    if not parts:
        return "the stack has no matrix", []
    found = worst_change(parts) if after.kind == "experts" else parts[0]
    dtypes = {"dtype_before": before.dtype, "dtype_after": after.dtype}
    names = {key: dtype_name(dtype) for key, dtype in dtypes.items()}
    about = {"shape": list(after.shape), "kind": after.kind, **names}
    return about | found, spectra_after


def _sizes(part: Comparison, shape: Sequence[int], is_matrix: bool) -> Comparison:
    """Root mean squares: of a matrix's outputs for independent inputs of 1, or of the values."""
    count = shape[0] if is_matrix else shape[0] * shape[1]
    norms = {"size_before": part["l2_before"], "size_after": part["l2_after"]}
    return {
        name: None if norm is None or not count else norm / math.sqrt(count)
        for name, norm in norms.items()
    }


def _reshaped(before: Weight, after: Weight) -> str:
    old, new = ("x".join(map(str, weight.shape)) for weight in (before, after))
    return f"was {old} and is {new}"
