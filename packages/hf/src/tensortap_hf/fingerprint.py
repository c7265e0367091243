"""A digest of a model's weights: it tells whether two things were made of one model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from xxhash import xxh3_64


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of all parameters and buffers: names, dtypes, shapes and bytes.

    The same on every device. What has no bytes of its own to read (packed weights in subclasses of
    tensors, weights that accelerate has put elsewhere) counts by class and shape; extra state that
    is no tensor counts by its name. A gigabyte takes about 0.1 s on the CPU.
    """
    digest = xxh3_64()
    seen: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        # Tied weights are one tensor under several names.
        digest.update(f"{name} {seen.setdefault(id(value), name)} {_described(value)}\n".encode())
        if seen[id(value)] == name and _is_plain(value):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return ""
    kind = "" if type(value) in _PLAIN else type(value).__name__
    return f"{value.dtype} {tuple(value.shape)} {kind}"


def _is_plain(value: Any) -> bool:
    """Can the bytes of a tensor be read?"""
    return (
        type(value) in _PLAIN
        and type(value.data) is torch.Tensor
        and value.layout is torch.strided
        and not (value.is_meta or value.is_quantized)
    )


_PLAIN = (torch.Tensor, nn.Parameter)
