"""How the tensor that comes back from rank 0 lies in the whole one."""

from __future__ import annotations

from typing import Literal

from tensortap.records import Placement
from tensortap_neuron.traced.described import Facts
from tensortap_neuron.traced.layers import Group, Lie, Lies, place
from tensortap_neuron.traced.naming import module_name

_STREAM = frozenset({"input_norm", "post_attn_norm", "pre_mlp_norm", "post_mlp_norm"})
"""Modules of a layer that see the residual stream as the layer does."""
_REDUCED = frozenset({"attn", "mlp"})
"""Modules of a layer that return what is summed over ranks, in the shape of the stream."""

Side = Literal["input", "output"]


def on_stream(path: str, side: Side = "output") -> bool:
    """Is this tensor `batch, sequence, hidden`, like the residual stream?"""
    name = module_name(path)
    words = name.split(".")
    if name in ("embed", "final_norm"):
        return True
    if words[2:] in (["attn", "out"], ["mlp", "down"]):
        return side == "output"  # The sum over ranks; what goes in is a rank's own piece.
    return words[0] == "layers" and (
        len(words) == 2 or (len(words) == 3 and words[2] in _STREAM | _REDUCED)
    )


def lie_of(path: str, side: Side, facts: Facts, *, prefill: bool) -> tuple[Lie, Lies]:
    """How input or output of a module lies: from its attributes, else from its place.

    The sequence is split while the context is encoded only: NxDI turns sequence parallelism off
    for token generation (`enable_token_generation`).
    """
    known = facts.lies.get(path)
    if known is not None:
        lie = known.output if side == "output" else known.input
        lie = lie if prefill or lie != "sequence" else "whole"
    elif facts.tp == 1:
        return "whole", Lies("whole", "whole")
    else:
        lie = _by_place(path, side, split=facts.sequence_parallel and prefill)
    if lie == "sequence" and facts.context_parallel:
        lie = "unknown"  # NxDI may reorder the sequence first (`chunk_and_reorder_tensor`).
    return lie, known or Lies()


def _by_place(path: str, side: Side, *, split: bool) -> Lie:
    stream: Lie = "sequence" if split else "whole"
    name = module_name(path)
    if name == "embed":
        return "whole" if side == "input" or not split else "unknown"
    if name == "lm_head":
        # NxDI gathers the logits behind the module when it samples on the device, as it must.
        return "last" if side == "output" else "whole"
    words = name.split(".")
    if on_stream(path, side) and not (split and words[-1] in _REDUCED and side == "input"):
        return stream
    return "unknown"


def placement(
    path: str, side: Side, shape: tuple[int, ...], facts: Facts, *, prefill: bool
) -> Placement | None:
    """The placement of what rank 0 returned of a module; `None`: it is the whole tensor."""
    lie, lies = lie_of(path, side, facts, prefill=prefill)
    pad = lies.output_pad if side == "output" else lies.input_pad
    stride = lies.stride if side == "output" else 1
    return place(lie, shape, Group(facts.tp, 0), lies, pad=pad, stride=stride)
