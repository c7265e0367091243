"""How the inputs, outputs and weights of NxD's parallel layers lie over ranks.

Read off the attributes of `neuronx_distributed/parallel_layers/layers.py` (NxD 0.9 to 0.16 have
them); no group is ever called for a collective.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import nn

from tensortap.records import Placement, Segment

Lie = Literal["whole", "last", "sequence", "first", "sum", "unknown"]
"""Every rank has all of it; a piece of the last axis, of the sequence, of the first axis; a
summand; or nobody knows."""

LAYERS = "neuronx_distributed.parallel_layers.layers"


@dataclass(frozen=True, slots=True)
class Lies:
    """How the tensors of one module lie over the ranks of tensor parallelism.

    `sequence` is the axis of the sequence. `output_pad` and `input_pad` are how many elements of
    the whole last axis are padding; `stride` is how many blocks are fused in the output axis,
    each of them cut for itself.
    """

    output: Lie = "unknown"
    input: Lie = "unknown"
    sequence: int = 1
    output_pad: int = 0
    input_pad: int = 0
    stride: int = 1

    def to_json(self) -> dict[str, Any]:
        """As it is kept beside a compiled model."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Lies:
        """Inverse of `to_json`; raises `ValueError` for what no version wrote."""
        known = cls(**fields)
        numbers = (known.sequence, known.output_pad, known.input_pad, known.stride)
        fine = all(type(number) is int and number >= 0 for number in numbers) and known.stride
        if not fine or not {known.output, known.input} <= set(get_args(Lie)):
            raise ValueError(f"{dict(fields)} does not say how a tensor lies")
        return known


@dataclass(frozen=True, slots=True)
class Group:
    """Size of the group of tensor parallelism, and this rank's place in it."""

    size: int = 1
    rank: int = 0


def kind(module: nn.Module) -> str | None:
    """`ColumnParallelLinear`, `RowParallelLinear`, `ParallelEmbedding`, or `None` for others."""
    library = sys.modules.get(LAYERS)
    for word in ("ColumnParallelLinear", "RowParallelLinear", "ParallelEmbedding"):
        if isinstance(module, getattr(library, word, ())):
            return word
    return None


def group_of(module: nn.Module) -> Group:
    """The group a parallel layer was built with; that of a single rank where it has none."""
    for word in ("tensor_parallel_group", "tensor_model_parallel_group"):
        found = getattr(module, word, None)
        if found is not None:
            return Group(found.size(), found.rank())
    return Group()


def lies_of(module: nn.Module) -> Lies | None:
    """How the tensors of a parallel layer lie; `None` for any other module."""
    rule = {
        "ColumnParallelLinear": _column,
        "RowParallelLinear": _row,
        "ParallelEmbedding": _embedding,
    }.get(kind(module) or "")
    if rule is None:
        return None
    if getattr(module, "rank_ordering", None) is not None:
        return Lies()  # Ranks hold their pieces in an order of the user's own.
    return rule(module)


def all_lies(model: nn.Module) -> dict[nn.Module, Lies]:
    """How the tensors of every parallel layer lie, and of the modules right next to one.

    An activation sits between a column and a row; a module that holds an `o_proj` or a `q_proj`
    (GroupQueryAttention_O and _QKV) passes on what that is given and returns.
    """
    found = {m: lies for m in model.modules() if (lies := lies_of(m)) is not None}
    for holder in model.modules():
        near = {word: found[child] for word, child in holder._modules.items() if child in found}
        gate, act = near.get("gate_proj"), holder._modules.get("act_fn")
        if gate is not None and act is not None:
            pad = gate.output_pad
            found[act] = Lies(gate.output, gate.output, gate.sequence, pad, pad, gate.stride)
        for word in ("o_proj", "q_proj"):
            if holder not in found and word in near:
                found[holder] = near[word]
    return found


def _column(module: Any) -> Lies:
    """`_cpl_maybe_gather_output`: gathered, and padding cut unless it is to be kept."""
    pad = _pad(module)
    kept = pad if getattr(module, "keep_padded_output", False) else 0
    split = bool(getattr(module, "sequence_parallel_enabled", False))
    return Lies(
        output="whole" if module.gather_output else "last",
        input="sequence" if split else "whole",
        sequence=_sequence(module),
        output_pad=kept if module.gather_output else pad,
        stride=getattr(module, "stride", 1) or 1,
    )


def _row(module: Any) -> Lies:
    """`_rpl_maybe_reduce_output`: summed, and scattered along the sequence where that is split.

    Without that each rank adds the whole bias to its summand: the sum would have it many times.
    """
    scattered = bool(getattr(module, "sequence_parallel_enabled", False))
    output: Lie = "sequence" if scattered else "whole"
    if not getattr(module, "reduce_output", True):
        biased = module.bias is not None and not getattr(module, "skip_bias_add", False)
        output = "unknown" if biased else "sum"
    return Lies(
        output=output,
        input="last" if module.input_is_parallel else "whole",
        sequence=_sequence(module),
        input_pad=_pad(module) if module.input_is_parallel else 0,
    )


def _embedding(module: Any) -> Lies:
    """`_forward_shard_across_embed` gathers; `_forward_shard_across_vocab` sums.

    The latter leaves the sum to its caller where a sequence dimension other than 0 is split, and
    scatters along the first axis, after transposing, where it is 0.
    """
    collects = getattr(module, "collect_output", True)
    if module.shard_across_embedding:
        if collects:
            return Lies(output="whole", input="whole")
        return Lies(output="last", input="whole", output_pad=_pad(module))
    split = getattr(module, "sequence_parallel_enabled", False)
    if not collects or (split and getattr(module, "sequence_dim", None)):
        return Lies(output="sum", input="whole")
    return Lies(output="first" if split else "whole", input="whole")


def _pad(module: Any) -> int:
    return int(getattr(module, "pad_size", 0) or 0) if getattr(module, "pad", False) else 0


def _sequence(module: Any) -> int:
    """NxD takes an axis that is not given for the first one."""
    return int(getattr(module, "sequence_dimension", None) or 0)


def weight_placement(
    module: nn.Module, tensor: str, shape: tuple[int, ...], group: Group
) -> Placement | None:
    """Where a parameter of a parallel layer, or its gradient, lies; `None`: it is whole."""
    axis = _weight_axis(module, tensor)
    if axis is None or group.size == 1:
        return None
    lies = lies_of(module)
    if lies == Lies():
        return Placement(unknown=True)
    stride = int(getattr(module, "stride", 1) or 1)
    return cut(shape, axis, group, pad=_pad(module), stride=stride)


def _weight_axis(module: Any, tensor: str) -> int | None:
    if tensor == "weight":
        return int(module.weight_partition_dim)
    column = kind(module) == "ColumnParallelLinear"
    return 0 if tensor == "bias" and column and not module.gather_output else None


def cut(
    shape: tuple[int, ...], axis: int, group: Group, *, pad: int = 0, stride: int = 1
) -> Placement:
    """An axis cut over the group, in `stride` blocks; `pad` elements at its end are padding."""
    length = shape[axis] * group.size
    block = length // stride
    piece = shape[axis] // stride
    held: tuple[Segment, ...] = tuple(
        (number * block + group.rank * piece, piece) for number in range(stride)
    )
    logical = (*shape[:axis], length, *shape[axis + 1 :])
    return Placement(logical, {axis: held}, {axis: length - pad} if pad else {})


def place(
    lie: Lie, shape: tuple[int, ...], group: Group, lies: Lies, *, pad: int, stride: int = 1
) -> Placement | None:
    """The placement of a tensor of this shape that lies so; `None`: it is whole.

    `pad` is of the last axis. A tensor without the axis that is cut cannot be placed.
    """
    axis = {"last": len(shape) - 1, "sequence": lies.sequence, "first": 0}.get(lie)
    if group.size == 1 or lie == "whole":
        last = len(shape) - 1
        return Placement(shape, valid={last: shape[last] - pad}) if pad and shape else None
    if lie == "sum":
        return Placement(shape, partial=("tp",))
    if axis is None or not 0 <= axis < len(shape):
        return Placement(unknown=True)
    if lie == "last":
        return cut(shape, axis, group, pad=pad, stride=stride)
    return cut(shape, axis, group)
