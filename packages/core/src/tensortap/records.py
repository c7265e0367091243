"""What is recorded: frozen data, no behaviour beyond reading and writing itself as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tensortap.names import TensorName

Values = Literal["stats", "full", "sample"]
Segment = tuple[int, int]
"""(start, length) on a logical axis."""


@dataclass(frozen=True, slots=True)
class Coordinates:
    """When and where a tensor was seen; `call` is the n-th call of its site in the microbatch.

    `recompute` marks forward code that ran inside backward (activation checkpointing), `eval`
    a forward without gradients during training. Both are kept apart from the plain forward.
    """

    step: int = 0
    microbatch: int = 0
    call: int = 0
    rank: int = 0
    recompute: bool = False
    eval: bool = False


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of one tensor; min to l2 are over its finite values, `None` where there are none.

    `std` is the population standard deviation; `first` holds the 10 leading values in logical
    order. Complex tensors are read as their real and imaginary parts, so `count` is twice
    `numel`. `exponents` maps a power-of-two exponent e to the number of finite non-zero values
    with 2**e <= |x| < 2**(e+1).
    """

    count: int
    nan: int
    posinf: int
    neginf: int
    zero: int
    min: float | None
    max: float | None
    absmax: float | None
    mean: float | None
    std: float | None
    rms: float | None
    l1: float | None
    l2: float | None
    first: tuple[float, ...] = ()
    exponents: Mapping[int, int] | None = None

    @property
    def finite(self) -> int:
        """How many values are neither NaN nor infinite."""
        return self.count - self.nan - self.posinf - self.neginf


@dataclass(frozen=True, slots=True)
class Part:
    """A named piece of a fused tensor (`layers.0.attn.q` of `attn.qkv`), on the assembled axis."""

    module: str
    axis: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """How this rank's piece lies in the logical tensor; derived by an integration, never typed.

    `segments[axis]` lists the stretches of that logical axis the piece holds, in order; an axis
    that is not a key is held whole. `valid[axis]` is the length to compare (the rest is
    padding). `partial` names the groups over which pieces must be summed first. `unknown` says
    that the piece cannot be placed at all.
    """

    logical_shape: tuple[int, ...] = ()
    segments: Mapping[int, tuple[Segment, ...]] = field(default_factory=dict)
    valid: Mapping[int, int] = field(default_factory=dict)
    partial: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    unknown: bool = False


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """The grid the values lie on: format name, block size and rounding, where they apply."""

    name: str
    block: int | None = None
    rounding: str | None = None


@dataclass(frozen=True, slots=True)
class PayloadRef:
    """Where a payload lies: byte range of a shard, and the xxh3-128 digest of those bytes."""

    shard: str
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One captured tensor. `dtype` is torch's word without the prefix (`bfloat16`).

    `values` says what the payload holds: nothing (`stats`), the tensor (`full`), or evenly
    strided elements of it in logical order (`sample`, every `stride`-th).
    """

    name: TensorName
    native: str
    at: Coordinates
    shape: tuple[int, ...]
    dtype: str
    device: str
    seq: int
    values: Values = "stats"
    stride: int = 1
    dims: str | None = None
    placement: Placement | None = None
    stats: Statistics | None = None
    payload: PayloadRef | None = None
    format: FormatInfo | None = None


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a run is: written first, before any record."""

    launch_id: str
    created: str
    rank: int = 0
    world_size: int = 1
    model_class: str = ""
    model_config: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    format: str | None = None
    parallel: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def encode_float(value: float | None) -> float | str | None:
    """JSON has no NaN or infinity: they become the strings `nan`, `inf`, `-inf`."""
    if value is None or math.isfinite(value):
        return value
    return repr(value)


def decode_float(value: float | str | None) -> float | None:
    """Inverse of `encode_float`."""
    return float(value) if isinstance(value, str) else value
