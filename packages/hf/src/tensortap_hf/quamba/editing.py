"""Put the weights of a mode into a live model; every edit is undone bitwise."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from tensortap.undo import Undo
from tensortap_hf.quamba import rotation
from tensortap_hf.quamba.integers import Codes, quantize_weight
from tensortap_hf.quamba.parts import Parts


def to_floats(parts: Parts, undo: Undo, dtype: torch.dtype) -> None:
    """Every parameter in `dtype`, those that rotation changes rotated."""
    for edit in rotation.edits(parts, dtype):
        _put(edit.module, edit.key, edit.value, undo)
    _cast_the_rest(parts, undo, dtype)


def to_codes(
    parts: Parts, undo: Undo, mixers: Collection[nn.Module]
) -> Mapping[nn.Module, Mapping[str, Codes]]:
    """The parameters of `mixers` as int8 codes with one scale each, all others in float32.

    Returns mixer -> native name of a parameter (`in_proj.weight`, `A_log`) -> its codes. The
    unquantised weights are not kept: what goes in again on undo is the model's own.
    """
    owners = {child: (mixer, word) for mixer in mixers for word, child in mixer.named_children()}
    found: dict[nn.Module, dict[str, Codes]] = {mixer: {} for mixer in mixers}
    for edit in rotation.edits(parts, torch.float32):
        if edit.module not in owners:
            _put(edit.module, edit.key, edit.value, undo)
            continue
        mixer, word = owners[edit.module]
        found[mixer][f"{word}.{edit.key}"] = _quantize(edit.module, edit.key, edit.value, undo)
    for mixer, codes in found.items():
        for name, module, key in _parameters(mixer):
            if name not in codes:
                codes[name] = _quantize(module, key, module.get_parameter(key), undo)
    _cast_the_rest(parts, undo, torch.float32)
    return found


def _quantize(module: nn.Module, key: str, value: torch.Tensor, undo: Undo) -> Codes:
    codes = quantize_weight(value)
    _put(module, key, codes.codes, undo)
    return codes


def _put(module: nn.Module, key: str, value: torch.Tensor, undo: Undo) -> None:
    """Put a new parameter in the place of one; undone by the very object that was there.

    A tied output layer gets a weight of its own, and shares the embedding's again afterwards.
    """
    learns = module.get_parameter(key).requires_grad and value.is_floating_point()
    undo.set_item(module._parameters, key, nn.Parameter(value, requires_grad=learns))


def _cast_the_rest(parts: Parts, undo: Undo, dtype: torch.dtype) -> None:
    for _, module, key in _parameters(parts.model):
        parameter = module.get_parameter(key)
        if parameter.is_floating_point() and parameter.dtype != dtype:
            _put(module, key, parameter.detach().to(dtype), undo)


def _parameters(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(native name, the module that has it, its name there) of every parameter."""
    for path, module in root.named_modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield f"{path}.{key}" if path else key, module, key
