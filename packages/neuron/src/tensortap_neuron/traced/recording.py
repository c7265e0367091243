"""From a tensor that was fitted to the record of it; and what is remarked on a forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tensortap.capture import SAMPLE
from tensortap.config import Settings
from tensortap.errors import NotSupported
from tensortap.records import Coordinates, Statistics, TensorRecord
from tensortap.stats import statistics
from tensortap_neuron.traced.described import Facts
from tensortap_neuron.traced.fitting import Fitted
from tensortap_neuron.traced.forwards import Forward
from tensortap_neuron.traced.placing import lie_of, on_stream
from tensortap_neuron.traced.returned import Came

_UNKNOWN_LENGTH = (
    "the padding of prompts to their bucket is not cut: nothing said how long they are. "
    "Pass input_capture_hook=hook.inputs as well (generate(**hook.kwargs))"
)
_CHUNK = (
    "prompts are encoded in chunks, or after a cached prefix: each is a microbatch of the step "
    "before it, and the padding of its bucket is not cut. Call hook.step() between prompts"
)
_MIXED = (
    "requests are interleaved: a forward that makes tokens of several, or of an earlier one, is a "
    "microbatch of the last prompt's step. One request at a time compares best"
)
_LEFT = "prompts are padded on the left: the padding is not cut"


def record_of(
    one: Came, fitted: Fitted, forward: Forward, settings: Settings, seq: int
) -> tuple[TensorRecord, torch.Tensor | None]:
    """The record of one tensor, and its payload when values are wanted."""
    values, tensor = settings.values(str(fitted.name)), fitted.tensor
    stride = max(1, -(-tensor.numel() // SAMPLE)) if values == "sample" else 1
    record = TensorRecord(
        name=fitted.name,
        native=f"{one.path} ({where(forward)})" if one.path else where(forward),
        at=Coordinates(step=forward.step, microbatch=forward.microbatch),
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype)[6:],
        device=fitted.device,
        seq=seq,
        values=values,
        stride=stride,
        dims=fitted.dims,
        placement=fitted.placement,
        stats=_statistics(tensor, exponents=settings.exponents),
    )
    payload = tensor.reshape(-1)[::stride].contiguous() if values == "sample" else tensor
    return record, None if values == "stats" else payload


def _statistics(tensor: torch.Tensor, *, exponents: bool) -> Statistics | None:
    try:
        return statistics(tensor, exponents=exponents)
    except NotSupported:  # The values are there all the same.
        return None


def where(forward: Forward) -> str:
    """`cte, bucket 128`: which graph a tensor is of."""
    bucket = "" if forward.bucket is None else f", bucket {forward.bucket}"
    return f"{forward.kind}{bucket}"


def measured(came: Sequence[Came], facts: Facts) -> tuple[list[int], int | None]:
    """Lengths of the sequence axes of what came, and that of the bucket where it is told."""
    found = {
        one.path: int(one.value.shape[1])
        for one in came
        if one.cause is None and isinstance(one.value, torch.Tensor) and one.value.dim() == 3
        if one.name.tensor == "output"
    }
    stream = [
        length * (facts.tp if _split(path, length, facts) else 1)
        for path, length in found.items()
        if on_stream(path)
    ]
    return list(found.values()), max(stream, default=None)


def _split(path: str, length: int, facts: Facts) -> bool:
    return lie_of(path, "output", facts, prefill=length > 1)[0] == "sequence"


def remark(forward: Forward) -> str | None:
    """What could not be known of the padding of a forward, or cannot be cut."""
    inputs = forward.inputs
    if forward.mixed:
        return _MIXED
    if forward.kind != "cte":
        return None
    if inputs is None:
        return _UNKNOWN_LENGTH
    if not inputs.first:
        return _CHUNK
    if inputs.left_padded:
        return _LEFT
    if len(set(inputs.lengths or ())) < 2:
        return None
    rows = ", ".join(map(str, inputs.lengths or ()))
    return (
        f"step {forward.step}: rows of {rows} tokens; the shorter ones are padded to the longest. "
        "One prompt a forward compares best"
    )
