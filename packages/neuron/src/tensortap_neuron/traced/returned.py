"""What a compiled model hands out: which tensor is which, and which are only stand-ins.

NxDI returns a list: for each module its first output and, with inputs, its first input, then the
tensors registered by hand (`NeuronBaseModel._get_captured_tensors`). A module that was not called
is a `zeros(1)` there, a tensor that was not registered a single NaN; where prompts are encoded one
batch after the other, their tensors are put together along the first axis, these stand-ins as well
(`ModelWrapper.forward`). The first output of a dataclass is the first of its fields by the
alphabet (`register_tensor_object` goes by `dir`). NxD itself has a dictionary
(`TensorRegistry.get_captured_tensors_dict`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tensortap.errors import CaptureError
from tensortap.names import TensorName, escape
from tensortap_neuron.traced.capture import Capture
from tensortap_neuron.traced.described import Facts
from tensortap_neuron.traced.naming import expert_index, is_attention

_FIRST = {
    "outputs": frozenset({"", "0", "hidden_states"}),
    "inputs": frozenset({"", "0", "hidden_states", "input_ids", "inputs_embeds", "x", "input"}),
}
"""Keys of what is `output` or `input` on every framework: first places, the first parameters of
the modules there are, and what attention returns first."""
_MOE = "auto_moe_stats.expert_index"


@dataclass(frozen=True, slots=True)
class Came:
    """One tensor that was asked for: it came, or `cause` says why not.

    `path` is the NxD module it belongs to; empty for what the model's code registered.
    """

    path: str
    name: TensorName
    value: Any = None
    cause: str | None = None


def sort_out(
    capture: Capture, captured: Any, facts: Facts, wanted: Callable[[TensorName], bool]
) -> list[Came]:
    """Name everything in a list of NxDI or a dictionary of NxD.

    `facts` are those of the model that runs; `wanted` says which names are selected. Raises
    `CaptureError` when the list is not what this capture was compiled to: then no tensor of it
    can be trusted to be the one its place says.
    """
    if isinstance(captured, Mapping):
        return list(_from_registry(capture, captured, wanted))
    if not isinstance(captured, Sequence):
        raise CaptureError(f"captured tensors came as {type(captured).__name__}, not as a list.")
    return list(_from_list(capture, captured, facts))


def _from_list(capture: Capture, captured: Sequence[Any], facts: Facts) -> Iterator[Came]:
    words = ("output", "input") if capture.inputs else ("output",)
    names = capture.names
    slots = [(path, word) for path in capture.modules for word in words]
    room = capture.max_tensors or 0
    # With experts NxDI may make one place more, each time it reads its configuration from JSON.
    if not len(slots) <= len(captured) <= len(slots) + room + capture.moe:
        raise CaptureError(
            f"the model handed out {len(captured)} tensors where this capture asks for "
            f"{len(slots) + room}: it was compiled with another one. "
            "Compile it again, or load the capture it was compiled with (Capture.load)."
        )
    for (path, word), value in zip(slots, captured, strict=False):
        name = TensorName(names[path], "forward", word)
        yield Came(path, name, value, _why_not(path, word, value, facts))
    yield from _by_hand(capture, captured[len(slots) :])


_NOT_CALLED = (
    "missing: a stand-in came back, as the module was not called while this bucket was traced. A "
    "fused kernel may do its work, or the tensor registry was cleared after another bucket"
)
_NOT_REGISTERED = "missing: NaN came back, as register_tensor was not called in this bucket"


def _why_not(path: str, word: str, value: Any, facts: Facts) -> str | None:
    """Why a tensor of NxDI's list is not the first output or input of its module."""
    if not isinstance(value, torch.Tensor):
        return None
    if value.dim() <= 1:  # Batch and sequence are two axes: no module of a model has fewer.
        return _NOT_CALLED
    if word == "output" and is_attention(path) and not _may_be_output(value, facts):
        return (
            f"missing: a tensor of shape {tuple(value.shape)} came back for it. Attention returns "
            "several by name, and NxDI hands out the first by the alphabet, mostly cos_cache; "
            "nothing says that this is hidden_states. Capture the projection at its end, attn.out"
        )
    return None


def _may_be_output(value: torch.Tensor, facts: Facts) -> bool:
    """Is it as wide as the model? With context parallelism attention's input is, and comes first.

    (`attn_input_hidden_states` of chunked_attention_with_context_parallel_forward.)
    """
    return value.shape[-1] == facts.hidden and not facts.context_parallel


def _all_nan(value: Any) -> bool:
    """What NxDI fills the room for tensors registered by hand with; one NaN a batch."""
    if not isinstance(value, torch.Tensor) or value.dim() > 1 or not value.is_floating_point():
        return False
    try:
        return bool(value.isnan().all())
    except (RuntimeError, NotImplementedError):  # It cannot be read: `fit` says so.
        return False


def _by_hand(capture: Capture, values: Sequence[Any]) -> Iterator[Came]:
    """Tensors registered by hand, in their order; they close ranks when one is missing."""
    came = [value for value in values if not _all_nan(value)]
    expected = [Came("", TensorName.parse(name)) for name in capture.manual]
    asked = len(expected) + capture.moe
    if len(came) < asked:
        cause = _NOT_REGISTERED
        if came:
            cause = f"missing: {len(came)} of {asked} registered tensors came: nothing says which"
        for one in (*expected, *([Came("", expert_index())] if capture.moe else [])):
            yield Came("", one.name, None, cause)
        return
    for one, value in zip(expected, came, strict=False):
        yield Came("", one.name, value)
    if capture.moe:
        yield from _experts(capture, came[len(expected)])
    for number, value in enumerate(came[asked:]):
        yield Came("", TensorName("manual", "forward", f"tensor.{number}"), value)


def _experts(capture: Capture, stacked: Any) -> Iterator[Came]:
    """The experts' indices, layer by layer where each layer has some; else as they came."""
    if isinstance(stacked, torch.Tensor) and stacked.shape[0] == capture.facts.layers:
        for layer, value in enumerate(stacked):
            yield Came("", expert_index(layer), value)
    else:
        yield Came("", expert_index(), stacked)


def _from_registry(
    capture: Capture, captured: Mapping[str, Any], wanted: Callable[[TensorName], bool]
) -> Iterator[Came]:
    used: set[str] = set()
    for path in capture.modules:
        for side in ("outputs", "inputs") if capture.inputs else ("outputs",):
            found = {key: word for key in captured if (word := _word(key, path, side)) is not None}
            used |= set(found)
            first = TensorName(capture.names[path], "forward", side[:-1])
            yield from _of_module(captured, path, first, found, wanted)
    rest = {key: value for key, value in captured.items() if key not in used}
    if _MOE in rest:
        yield from _experts(capture, rest.pop(_MOE))
    by_hand = dict(zip(rest, capture.manual, strict=False))
    for key, value in rest.items():
        name = by_hand.get(key) or f"manual/forward/{escape(key.removeprefix('manual_'))}"
        yield Came("", TensorName.parse(name), value, _NOT_REGISTERED if _all_nan(value) else None)
    for name in capture.manual[len(rest) :]:
        yield Came(
            "", TensorName.parse(name), None, "missing: register_tensor was not called for it"
        )


def _of_module(
    captured: Mapping[str, Any],
    path: str,
    first: TensorName,
    found: Mapping[str, str],
    wanted: Callable[[TensorName], bool],
) -> Iterator[Came]:
    """What the registry has of one side of a module; a gap where nothing selected is in it."""
    names = {key: replace(first, tensor=word) for key, word in found.items()}
    if not any(wanted(name) for name in names.values()):
        cause = _NOT_CALLED
        if found:
            there = ", ".join(found.values())
            cause = f"missing: NxD has {there} of the module, and no {first.tensor}"
        yield Came(path, first, None, cause)
    for key, name in names.items():
        yield Came(path, name, captured[key], _NOT_CALLED if _single(captured[key]) else None)


def _single(value: Any) -> bool:
    """One element in one axis, whatever it holds: no activation of a model is that."""
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.dim() <= 1


def _word(key: str, path: str, side: str) -> str | None:
    """`output`, `output.1`, `input.attention_mask`: what a key of the registry is called here."""
    if side == "outputs" and key == path:
        return "output"
    prefix = f"{path}.{side}"
    if key != prefix and not key.startswith(f"{prefix}."):
        return None
    rest = key[len(prefix) + 1 :].removeprefix("kwargs.")
    if rest in _FIRST[side]:
        return side[:-1]
    return f"{side[:-1]}.{escape(rest)}"
