"""Which forwards of an NxDI capture belong to which prompt, and where padding begins.

NxDI's hook counts forwards over all prompts of an application and calls only the first one `cte`.
A forward of several positions encodes a prompt, whatever it is called.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tensortap.records import Placement
from tensortap_neuron.layouts.importing import Findings
from tensortap_neuron.layouts.nxdi_metadata import METADATA, Told

_NO_LENGTH = (
    "the length of the prompt is not in the folder, so that the padding of the bucket is not cut: "
    f'add "lengths": [tokens of each row] to {METADATA}'
)
_UNEQUAL = (
    "the rows of the prompt have different lengths: padding is cut behind the longest, so that "
    "the pads of the others are compared"
)
_UNFIT = (
    "the lengths {lengths} do not fit forward {step}, of {rows} rows in a bucket of {bucket}: its "
    "padding is not cut"
)
_SEVERAL = "forwards {steps} have several positions: each is taken for the begin of a prompt"


@dataclass(frozen=True, slots=True)
class Prompt:
    """The forward that begins it, counted from 1, its bucket, and the tokens of its rows."""

    begin: int
    bucket: int
    lengths: tuple[int, ...]

    def placement(self, step: int, shape: tuple[int, ...]) -> Placement | None:
        """Where the prompt ends in a tensor of its forward; rows share the longest."""
        longest, axis = max(self.lengths, default=0), self._axis(shape)
        if step != self.begin or axis is None or not 0 < longest < self.bucket:
            return None
        return Placement(logical_shape=shape, valid={axis: longest})

    def _axis(self, shape: tuple[int, ...]) -> int | None:
        """That of the positions: the second, or the first where tokens are flattened."""
        rows = len(self.lengths)
        if len(shape) > 1 and shape[1] == self.bucket and (len(shape) > 2 or shape[0] == rows):
            return 1
        return 0 if rows == 1 and len(shape) > 1 and shape[0] == self.bucket else None


@dataclass(frozen=True, slots=True)
class Prompts:
    """All prompts of a folder, in order; what is before the first belongs to it."""

    all: tuple[Prompt, ...]

    def of(self, step: int) -> tuple[int, Prompt]:
        """The prompt of a forward, and its number."""
        number = max(0, bisect_right([prompt.begin for prompt in self.all], step) - 1)
        return number, self.all[number]


def prompts_of(
    streams: Iterable[tuple[int, Sequence[int]]], told: Told, findings: Findings
) -> Prompts:
    """From the forwards and shapes of all `[batch, sequence, hidden]` tensors."""
    sizes: dict[int, tuple[int, int]] = {1: (0, 0)}
    for step, shape in streams:
        sizes[step] = max(sizes.get(step, (0, 0)), (shape[1], shape[0]))
    begins = [step for step, (count, _) in sorted(sizes.items()) if step == 1 or count > 1]
    found = []
    for number, step in enumerate(begins):
        lengths = told.lengths[number] if number < len(told.lengths) else ()
        bucket, rows = sizes[step]
        if lengths and bucket and (max(lengths) > bucket or len(lengths) != rows):
            said = _UNFIT.format(lengths=list(lengths), step=step, rows=rows, bucket=bucket)
            findings.notes.append(("*", said))
            lengths = ()
        found.append(Prompt(step, bucket, lengths))
    if told.written and any(one.bucket > 1 and not one.lengths for one in found):
        findings.notes.append(("*", _NO_LENGTH))
    if any(len(set(one.lengths)) > 1 for one in found):
        findings.notes.append(("*", _UNEQUAL))
    if len(found) > 1:
        steps = ", ".join(map(str, begins[:6])) + (", …" if len(begins) > 6 else "")
        findings.notes.append(("*", _SEVERAL.format(steps=steps)))
    return Prompts(tuple(found))
