"""From a tensor that came back to what is recorded of it: on the host, without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tensortap.names import TensorName
from tensortap.records import Placement
from tensortap_neuron.traced.described import Facts
from tensortap_neuron.traced.forwards import Forward
from tensortap_neuron.traced.fused import name_of
from tensortap_neuron.traced.naming import module_name
from tensortap_neuron.traced.placing import Side, on_stream, placement
from tensortap_neuron.traced.returned import Came


@dataclass(frozen=True, slots=True)
class Fitted:
    """A tensor on the host, its name, axes and placement; `note` is a remark on it."""

    name: TensorName
    tensor: torch.Tensor
    device: str
    dims: str | None = None
    placement: Placement | None = None
    note: str | None = None


def fit(one: Came, forward: Forward, facts: Facts) -> Fitted | str:
    """What is to be recorded of a tensor that was asked for, or why it is missing."""
    if one.cause is not None:
        return one.cause
    if not isinstance(one.value, torch.Tensor):
        return f"it came back as {type(one.value).__name__}, not as a tensor"
    device = str(one.value.device)
    host = _to_host(one.value)
    if isinstance(host, str):
        return host
    if not one.path:
        unknown = Placement(unknown=True) if facts.tp > 1 else None
        return _cut_or_noted(Fitted(one.name, host, device, None, unknown), forward)
    plain = Fitted(name_of(one.name, forward, facts), host, device, _dims(one, host))
    return _placed(plain, one, forward, facts)


def _to_host(value: torch.Tensor) -> torch.Tensor | str:
    try:
        return value.detach().to("cpu").contiguous()
    except Exception as failure:  # Whatever the runtime raises becomes a gap that names it.
        return f"it could not be brought to the CPU: {type(failure).__name__}: {failure}"


def _dims(one: Came, value: torch.Tensor) -> str | None:
    if value.dim() != 3 or one.name.tensor not in ("input", "output"):
        return None
    side: Side = "input" if one.name.tensor == "input" else "output"
    if on_stream(one.path, side):
        return "batch seq hidden"
    head = module_name(one.path) == "lm_head"
    return "batch seq vocab" if head and side == "output" else None


def _placed(plain: Fitted, one: Came, forward: Forward, facts: Facts) -> Fitted:
    """Cut what lies behind the longest prompt; what is left is placed."""
    side: Side = "input" if one.name.tensor.startswith("input") else "output"
    prefill = forward.kind == "cte"
    shape = tuple(plain.tensor.shape)
    place = placement(one.path, side, shape, facts, prefill=prefill)
    fitted = replace(plain, placement=place)
    if forward.valid is not None and place is not None and 1 in place.segments and len(shape) == 3:
        return _cut_shard(fitted, place, forward.valid)
    return _cut_or_noted(fitted, forward)


def _cut_or_noted(fitted: Fitted, forward: Forward) -> Fitted:
    """Cut the padding, or say that there is some where nothing tells in which axis it is."""
    valid, bucket, place = forward.valid, forward.bucket, fitted.placement
    if valid is None or bucket == valid:
        return fitted
    if _is_padded(fitted, forward):
        return _cut(fitted, valid)
    rows = forward.inputs.rows if forward.inputs is not None else 1
    padded = bucket is not None and {bucket, bucket * rows} & set(fitted.tensor.shape)
    if padded and valid > 1 and (place is None or place.unknown):
        return replace(fitted, note=_PADDED, placement=Placement(unknown=True))
    return fitted


_PADDED = "padded to the bucket: nothing says which of its axes is the sequence"


def _is_padded(plain: Fitted, forward: Forward) -> bool:
    """Is the second axis the padded sequence? Three axes, or token ids, as long as the bucket."""
    shape = plain.tensor.shape
    rows = forward.inputs.rows if forward.inputs is not None else None
    known = plain.dims is not None or forward.bucket is None or shape[1:2] == (forward.bucket,)
    return len(shape) in (2, 3) and shape[0] == rows and known and shape[1] > (forward.valid or 0)


def _cut(fitted: Fitted, valid: int) -> Fitted:
    """Leave the padding out; the placement says how long the rest is."""
    tensor = fitted.tensor.narrow(1, 0, valid).contiguous()
    old = fitted.placement or Placement(tuple(fitted.tensor.shape))
    if old.unknown:
        return replace(fitted, tensor=tensor)
    logical = (old.logical_shape[0], valid, *old.logical_shape[2:])
    return replace(
        fitted,
        tensor=tensor,
        placement=replace(old, logical_shape=logical, valid={**old.valid, 1: valid}),
    )


def _cut_shard(fitted: Fitted, place: Placement, valid: int) -> Fitted:
    """Rank 0 has the first positions: all that are no padding, or what it has of them."""
    held = fitted.tensor.shape[1]
    if valid > held:
        return replace(fitted, placement=replace(place, valid={**place.valid, 1: valid}))
    whole = Placement(tuple(fitted.tensor.shape), valid=place.valid)
    return _cut(replace(fitted, placement=whole), valid)
