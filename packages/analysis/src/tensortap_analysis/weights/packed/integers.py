"""Codes that are integers, packed into words of 32 bits.

X.weight_packed + X.weight_scale [+ X.weight_zero_point] + X.weight_shape    compressed-tensors
X.qweight + X.qzeros + X.scales [+ X.g_idx]                                  GPTQ, AWQ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tensortap_analysis.weights.packed.codes import Found, bit_fields
from tensortap_analysis.weights.sources.source import Config, Entry

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where AWQ has put the first, second, … of eight columns in a word."""


def compressed(name: str, entries: Mapping[str, Entry], config: Config) -> Found | None:
    """[out, in / codes in a word]: unsigned codes with half their range as zero."""
    base = name.removesuffix("_packed")
    codes, scale = entries[name], entries.get(f"{base}_scale")
    if base == name or codes.dtype != torch.int32 or scale is None or len(codes.shape) != 2:
        return None
    zero, order = entries.get(f"{base}_zero_point"), entries.get(f"{base}_g_idx")
    size = entries.get(f"{base}_shape")
    beside = tuple(one.name for one in (scale, zero, order, size) if one is not None)
    bits = _bits(config) or 4
    if zero is not None or order is not None or bits not in (4, 8):
        why = f"{bits} bits, zero points or permuted columns of compressed-tensors"
        return Found(base, beside, reason=f"{why} are not decoded")
    rows, words = codes.shape
    columns = words * (32 // bits) if size is None else int(size.load()[1])
    if not 0 < columns <= words * (32 // bits) or columns % max(scale.shape[-1], 1):
        return Found(base, beside, reason="codes and scales do not fit as compressed-tensors")

    def load() -> torch.Tensor:
        fields = bit_fields(codes.load(), bits).flatten(1)[:, :columns]
        values = (fields - (1 << (bits - 1))).float()
        groups = scale.load().float().reshape(rows, -1)
        return values.view(rows, groups.shape[1], -1).mul_(groups.unsqueeze(-1)).flatten(1)

    entry = replace(
        codes, name=base, shape=(rows, columns), load=load, decoded=True,
        note=f"codes of {bits} bits times scales",
    )  # fmt: skip
    return Found(base, beside, entry)


def gptq_or_awq(name: str, entries: Mapping[str, Entry], config: Config) -> Found | None:
    """Zeros and scales by groups of inputs; the values come as [out, in]."""
    layer = name.removesuffix(".qweight")
    if layer == name or entries[name].dtype != torch.int32 or len(entries[name].shape) != 2:
        return None
    words = ("qzeros", "scales", "g_idx")
    parts = {word: entries[f"{layer}.{word}"] for word in words if f"{layer}.{word}" in entries}
    beside = tuple(part.name for part in parts.values())
    if not {"qzeros", "scales"} <= set(parts):
        return Found(f"{layer}.weight", beside, reason="qweight without qzeros and scales")
    _, out = parts["scales"].shape
    bits = _bits(config) or 4
    if bits not in (4, 8):
        return Found(f"{layer}.weight", beside, reason=f"codes of {bits} bits are not decoded")
    awq = entries[name].shape[1] * (32 // bits) == out and _method(config) == "awq"
    if not awq and entries[name].shape[1] != out:
        return Found(f"{layer}.weight", beside, reason="codes and scales fit neither GPTQ nor AWQ")
    read = _awq if awq else _gptq
    inputs = entries[name].shape[0] * (1 if awq else 32 // bits)

    def load() -> torch.Tensor:
        return read(entries[name], parts, bits, config)

    entry = replace(
        entries[name], name=f"{layer}.weight", shape=(out, inputs), load=load, decoded=True,
        note=f"codes of {bits} bits ({'AWQ' if awq else 'GPTQ'}) times scales",
    )  # fmt: skip
    return Found(f"{layer}.weight", beside, entry)


def _gptq(codes: Entry, parts: Mapping[str, Entry], bits: int, config: Config) -> torch.Tensor:
    """Words run down the inputs. The first version of the format stores zeros less one."""
    fields = bit_fields(codes.load(), bits).permute(0, 2, 1).flatten(0, 1)
    zeros = bit_fields(parts["qzeros"].load(), bits).flatten(1)
    if _checkpoint_format(config) != "gptq_v2":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    scales = parts["scales"].load().float()
    order = parts.get("g_idx")
    group = _groups(len(fields), len(scales)) if order is None else order.load().long()
    return ((fields - zeros[group]).float() * scales[group]).T


def _awq(codes: Entry, parts: Mapping[str, Entry], bits: int, config: Config) -> torch.Tensor:
    """Words run along the outputs, eight columns of them out of order."""
    fields = bit_fields(codes.load(), bits)[..., _AWQ_ORDER].flatten(1)
    zeros = bit_fields(parts["qzeros"].load(), bits)[..., _AWQ_ORDER].flatten(1)
    scales = parts["scales"].load().float()
    group = _groups(len(fields), len(scales))
    return ((fields - zeros[group]).float() * scales[group]).T


def _groups(inputs: int, groups: int) -> torch.Tensor:
    """Which group each input belongs to, in order."""
    return torch.arange(inputs) // -(-inputs // groups)


def _quantization(config: Config) -> dict[str, Any]:
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _bits(config: Config) -> int | None:
    """How many bits a code has, as the configuration says it in one of several places."""
    quantization = _quantization(config)
    groups = quantization.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    known = weights.get("num_bits") if isinstance(weights, dict) else quantization.get("bits")
    return known if type(known) is int and known > 0 else None


def _method(config: Config) -> str:
    return str(_quantization(config).get("quant_method", ""))


def _checkpoint_format(config: Config) -> str:
    return str(_quantization(config).get("checkpoint_format", ""))
