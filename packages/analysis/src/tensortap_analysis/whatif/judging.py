"""`expected`: what each format would do to each tensor of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from tensortap.errors import NotSupported, RunCorrupt, RunError
from tensortap.formats import Codec
from tensortap.records import Statistics, TensorRecord
from tensortap.stats import statistics
from tensortap.store import Run
from tensortap.store.logical import LogicalTensor
from tensortap_analysis.captured.moments import Captured, captured
from tensortap_analysis.captured.sources import Source, label, opened
from tensortap_analysis.captured.steps import require_step
from tensortap_analysis.captured.words import axes_of
from tensortap_analysis.judging.rounding import is_mask
from tensortap_analysis.measuring.boxes import boxes
from tensortap_analysis.measuring.merging import merged
from tensortap_analysis.pairs.reasons import NotComparable
from tensortap_analysis.progress import unmatched
from tensortap_analysis.whatif.estimate import estimate
from tensortap_analysis.whatif.rounding import Tally, Values, codec_of, scaled_as_a_whole, tally

FORMATS = ("hifp8", "mxfp8", "mxfp4", "nvfp4", "int8")
Basis = Literal["values", "exponents"]
_BOX = 1 << 18
"""Values that are rounded at once."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a format would do to a tensor, over all moments at which it was captured.

    `sqnr_db` is `None` where all values are 0, infinite where none changes, minus infinite where
    a NaN or infinity in the tensor makes finite values NaN. `underflow` and `overflow` are shares
    of the `nonzero` finite values: those that become 0, and those beyond the largest value of
    their scale (which the SQNR counts as that value). `basis` is "values" where this is exact,
    "exponents" where it is an estimate from statistics or a sample.
    """

    name: str
    format: str
    sqnr_db: float | None
    underflow: float
    overflow: float
    nonzero: int
    moments: int
    basis: Basis


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Rows by tensor, then format; `skipped` says of what there is none, and why.

    `problems` are those of the run, and patterns of the selection that match nothing.
    """

    rows: tuple[Expected, ...]
    skipped: tuple[str, ...]
    problems: tuple[str, ...] = ()


def expected(
    run: Source,
    *,
    formats: Sequence[str] = FORMATS,
    select: str | Iterable[str] = "*",
    step: int | None = None,
) -> list[Expected]:
    """The rows of `what_if`."""
    return list(what_if(run, formats=formats, select=select, step=step).rows)


def what_if(
    run: Source,
    *,
    formats: Sequence[str] = FORMATS,
    select: str | Iterable[str] = "*",
    step: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> WhatIf:
    """Round every tensor of a run to every format; exactly, box by box, where there are values.

    Blocks lie along the contraction axis: `in` of a weight, the sequence of attention's value,
    the last axis of anything else. Where only statistics with exponents or a sample were
    captured, it is an estimate. `progress` gets the number of tensors done. Raises `ConfigError`
    for an unknown format, `SelectionError` when nothing is selected, `RunError` for no run or no
    such step.
    """
    codecs = {name: codec_of(name) for name in formats}
    with opened(run) as readable:
        require_step(readable, label(run), step)
        survey = _Survey(codecs)
        for done, tensor in enumerate(captured(readable, select, step=step), start=1):
            survey.add(tensor)
            progress(done)
        problems = (*readable.problems, *unmatched(readable, select))
        return replace(survey.result(), problems=problems)


class _Survey:
    """Sums over the moments of every tensor."""

    def __init__(self, codecs: Mapping[str, Codec]) -> None:
        self._codecs = codecs
        self._sums: dict[tuple[str, Basis], dict[str, Tally]] = {}
        self._moments: dict[tuple[str, Basis], int] = {}
        self._skipped: dict[str, str] = {}
        self._step = -1
        self._known: dict[Hashable, dict[str, Tally]] = {}

    def add(self, tensor: Captured) -> None:
        """Count one tensor at one moment, or note why it cannot be."""
        try:
            basis, found = self._judged(tensor)
        except RunCorrupt:
            raise
        except (RunError, NotSupported) as failure:
            self._skipped.setdefault(tensor.name, str(failure))
            return
        key = (tensor.name, basis)
        sums = self._sums.setdefault(key, {name: Tally() for name in self._codecs})
        self._moments[key] = self._moments.get(key, 0) + 1
        for name, more in found.items():
            sums[name].add(more)

    def _judged(self, tensor: Captured) -> tuple[Basis, dict[str, Tally]]:
        """A layer's output is the next one's input: what has the same payload is rounded once."""
        if tensor.moment.step != self._step:
            self._step, self._known = tensor.moment.step, {}
        key = _payload_of(tensor)
        if key is not None and key in self._known:
            return "values", self._known[key]
        basis, found = _judge(tensor, self._codecs)
        if key is not None and basis == "values":
            self._known[key] = found
        return basis, found

    def result(self) -> WhatIf:
        rows = (
            _row(key, name, sums, self._moments[key])
            for key, by_format in self._sums.items()
            for name, sums in by_format.items()
        )
        skipped = (f"{name}: {reason}" for name, reason in self._skipped.items())
        return WhatIf(tuple(rows), tuple(skipped))


def _row(key: tuple[str, Basis], name: str, sums: Tally, moments: int) -> Expected:
    whole = max(sums.nonzero, 1.0)
    return Expected(
        name=key[0],
        format=name,
        sqnr_db=sums.sqnr_db,
        underflow=sums.underflow / whole,
        overflow=sums.overflow / whole,
        nonzero=round(sums.nonzero),
        moments=moments,
        basis=key[1],
    )


def _payload_of(tensor: Captured) -> Hashable:
    """What two tensors share that are the same values in the same blocks; `None` for shards."""
    records = tensor.records()
    payload = records[0].payload
    if len(records) > 1 or payload is None or tensor.part is not None:
        return None
    axis = contraction_axis(records[0], len(records[0].shape))
    return payload.digest, records[0].dtype, records[0].shape, axis


def _judge(tensor: Captured, codecs: Mapping[str, Codec]) -> tuple[Basis, dict[str, Tally]]:
    record = tensor.first()
    dtype = getattr(torch, record.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or "x2" in record.dtype:
        raise NotSupported(f"{record.dtype} is not rounded to a format")
    if is_mask(tensor.name, record.dtype, record.stats.min if record.stats else None):
        raise NotSupported("a mask is not rounded to a format")
    if tensor.values == "full":
        return "values", _from_values(tensor.open(), record, codecs)
    if tensor.part is not None:
        raise NotSupported("only the whole of a fused tensor has statistics; capture its values")
    stats = _statistics(tensor)
    return "exponents", {name: estimate(codec, stats, dtype) for name, codec in codecs.items()}


def _statistics(tensor: Captured) -> Statistics:
    """Those of the logical tensor, with the exponents of all its pieces."""
    try:
        whole = merged(tensor, tensor.records()).statistics
    except NotComparable as reason:
        raise NotSupported(str(reason)) from reason
    exponents: Counter[int] = Counter()
    for piece in tensor.pieces():
        exponents.update(_exponents(tensor.run, piece))
    return replace(whole, exponents=dict(exponents))


def _exponents(run: Run, record: TensorRecord) -> Mapping[int, int]:
    """Of one piece; of a sample scaled up, together with that of the largest value of all."""
    stats = record.stats
    if stats is not None and stats.exponents is not None:
        return stats.exponents
    if record.values != "sample" or stats is None:
        raise NotSupported("statistics without exponents; capture with exponents=True or values")
    seen = statistics(run.sample(record), exponents=True).exponents or {}
    every = (stats.finite - stats.zero) / max(sum(seen.values()), 1)
    found = Counter({exponent: round(count * every) for exponent, count in seen.items()})
    if stats.absmax:
        found[math.frexp(stats.absmax)[1] - 1] += 1
    return found


def _from_values(
    tensor: LogicalTensor, record: TensorRecord, codecs: Mapping[str, Codec]
) -> dict[str, Tally]:
    axis = contraction_axis(record, len(tensor.shape))
    cuts = list(boxes(tensor.shape, _BOX, keep=axis))
    largest = None
    if len(cuts) > 1 and any(map(scaled_as_a_whole, codecs.values())):
        largest = torch.stack([_values(tensor.read(box), axis).abs().amax() for box in cuts]).amax()
    sums = {name: Tally() for name in codecs}
    for box in cuts:
        values = Values(_values(tensor.read(box), axis), largest)
        for name, codec in codecs.items() if values.x.numel() else ():
            sums[name].add(tally(codec, values))
    return sums


def _values(box: torch.Tensor, axis: int) -> torch.Tensor:
    """[rows, contraction axis], in float32 or, for float64, as it is."""
    wide = box if box.dtype is torch.float64 else box.to(torch.float32)
    if not wide.ndim:
        return wide.reshape(1, 1)
    return wide.movedim(axis, -1).reshape(-1, wide.shape[axis])


def contraction_axis(record: TensorRecord, axes: int) -> int:
    """The axis that the product sums over which the tensor goes into next."""
    words = axes_of(record.dims)
    wanted = "seq" if record.name.tensor == "value" else "in"
    if len(words) == axes and wanted in words:
        return words.index(wanted)
    return max(axes - 1, 0)
