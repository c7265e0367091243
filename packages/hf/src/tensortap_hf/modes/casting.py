"""Modes that are dtypes: every parameter cast as `from_pretrained(dtype=…)` would load it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tensortap.undo import Undo
from tensortap_hf import integration, naming
from tensortap_hf.modes.registry import Changes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""The modes of floats, in every family that has them."""

KEPT = "transformers keeps it in float32"


def cast(model: nn.Module, undo: Undo, dtype: torch.dtype) -> Changes:
    """Cast the floating-point parameters and saved buffers of a model; undone bitwise.

    Buffers that are not saved (rotary frequencies, …) and what a family keeps in float32 stay,
    as transformers loads them. Gradients are put away until the undo, they have the old dtype.
    """
    changed, kept, names = [], {}, _names(model)
    done: set[int] = set()
    stay = _stay(model, dtype)
    for path, module in model.named_modules():
        name = names.get(module, path)
        for key, tensor in _saved(module):
            wanted = torch.float32 if stay.search(f"{path}.{key}") else dtype
            if wanted is not dtype:
                kept[name] = KEPT
            if tensor.dtype is not wanted:
                _cast(tensor, undo, wanted)
                done.add(id(tensor))
            if id(tensor) in done:  # Also where a tied weight is met again.
                changed.append(name)
    for outermost in integration.pretrained(model):
        # Caches, masks and casts inside of some models follow it.
        undo.replace(outermost.config, "dtype", dtype)
    return Changes(tuple(dict.fromkeys(changed)), kept)


def _saved(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Floating-point tensors of a module itself that a checkpoint holds."""
    own: Mapping[str, torch.Tensor | None] = {
        **module._parameters,
        **{k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set},
    }
    for key, tensor in own.items():
        if tensor is not None and tensor.is_floating_point():
            yield key, tensor


def _cast(tensor: torch.Tensor, undo: Undo, dtype: torch.dtype) -> None:
    # The old memory is kept rather than a copy: views and shared storage come back as they were.
    data, grad = tensor.data, tensor.grad

    def restore() -> None:
        tensor.grad = None
        tensor.data = data
        tensor.grad = grad

    undo.call(restore)
    tensor.grad = None
    tensor.data = data.to(dtype)


def _stay(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str]:
    """Matches the native names of what stays in float32; as `PreTrainedModel` plans it."""
    plan: set[str] = set()
    for outermost in integration.pretrained(model):
        found: Any = outermost
        if dtype is torch.float16:
            plan.update(found._keep_in_fp32_modules or ())
        if dtype in (torch.float16, torch.bfloat16):
            plan.update(found._keep_in_fp32_modules_strict or ())
    words = (word.replace("*", ".*") for word in sorted(plan))
    return re.compile("|".join(words) or r"(?!)")


def _names(model: nn.Module) -> Mapping[nn.Module, str]:
    """Canonical names by module."""
    config = integration.pretrained(model)[0].config
    return {found.module: found.name for found in naming.named(model, config)}
