"""Rules about values one by one: NaN, zeros, dead rows, values at the end of their dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from tensortap_analysis.weights.health.issue import Issue, Layer, Limits, Rule, Severity, over
from tensortap_analysis.weights.health.places import ONE_VALUE, largest, where

LIMITS: Mapping[str, float] = {"dead": 0.1, "range": 0.5, "value": 300.0}
_BEGINS_AT_ZERO = re.compile(r"pos|wpe|codebook", re.IGNORECASE)
_NARROW = ("float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


def not_finite(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """NaN and infinities are critical, in vectors too."""
    for layer in layers:
        nan, inf = layer.get("norms", "nan"), layer.get("norms", "inf")
        if not nan and not inf:
            continue
        cause = f"It holds {nan or 0:,} NaN and {inf or 0:,} infinities: every output is lost."
        remedy = "Go back to the checkpoint before; find the step where its gradient overflowed."
        yield Issue(layer.name, "not finite", "critical", cause, remedy, nan + inf, 0.0, math.inf)


def zero(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """Matrices of zeros are critical, but for a LoRA that has not begun, and tables like that."""
    for layer in layers:
        if layer.vector or not layer.zero or not layer.facts.numel:
            continue
        if "lora_b" in layer.name.lower():
            cause = "All its values are 0, as before the first step of a LoRA."
            yield Issue(layer.name, "zero", "info", cause, "Was the adapter trained at all?")
        elif layer.facts.kind == "embedding" and _BEGINS_AT_ZERO.search(layer.name):
            cause = "All its values are 0, as before the first step."
            yield Issue(layer.name, "zero", "info", cause, "Was the model trained at all?")
        else:
            cause = "All its values are 0: nothing passes through it."
            remedy = "Was it loaded, and initialised? Compare names with those of the model."
            yield Issue(layer.name, "zero", "critical", cause, remedy, 0.0, 0.0, math.inf)


def dead_experts(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """Matrices of zeros among those of a stack are critical."""
    for layer in layers:
        count = layer.get("sparsity", "dead_experts")
        if count and not layer.zero:
            cause = f"{count:,} of its {layer.count:,} experts are all 0: nothing passes through."
            remedy = "Were all loaded? Else prune them, and their rows of the router."
            yield Issue(layer.name, "dead experts", "critical", cause, remedy, count, 0.0, math.inf)


def dead(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """Rows and columns of zeros; a warning where they are more than a share `dead` of all."""
    for layer in layers:
        if layer.vector or layer.zero:
            continue
        for what, axis in (("dead_rows", "rows"), ("dead_columns", "columns")):
            count, of = layer.get("sparsity", what), layer.get("sparsity", axis)
            # Those of dead experts are told with them.
            count = (count or 0) - (layer.get("sparsity", "dead_experts") or 0) * (of or 0)
            if count > 0 and of:
                yield _dead_issue(layer, what, count, of * layer.count, limits["dead"])


def _dead_issue(layer: Layer, what: str, count: int, of: int, limit: float) -> Issue:
    share, rule = count / of, what.replace("_", " ")
    embedding = layer.facts.kind == "embedding"
    severity: Severity = "warning" if share > limit and not embedding else "info"
    if what == "dead_columns":
        means = "inputs that it never looks at"
        remedy = "Prune them here, and the rows that make them in the layer before."
    elif embedding:
        means = "tokens without a vector"
        remedy = "Padding of the vocabulary is fine; tokens in use are not."
    else:
        means = "outputs that are always the bias"
        remedy = "Prune them with the columns that read them, or lower the learning rate earlier."
    at = "" if layer.get("sparsity", "dead_experts") else where(layer, "sparsity", what, count)
    verb = "is" if count == 1 else "are"
    cause = f"{count:,} of {of:,} {what.removeprefix('dead_')} {verb} all 0{at}: {means}."
    return Issue(layer.name, rule, severity, cause, remedy, share, limit, over(share, limit))


def _faint(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """Rows that are not 0, and so short that nothing comes of them: as dead ones."""
    for layer in layers:
        count = layer.get("norms", "faint_rows")
        if layer.vector or not count:
            continue
        of, embedding = layer.outputs * layer.count, layer.facts.kind == "embedding"
        at, share = where(layer, "norms", "faint_rows", count), count / of
        verb = "is" if count == 1 else "are"
        cause = f"{count:,} of {of:,} rows {verb} shorter than 1/10,000 of the median row{at}: "
        cause += "tokens without a vector." if embedding else "outputs that are the bias, nearly."
        remedy = (
            "Tokens never seen in training; those in use are lost."
            if embedding
            else "Decayed, or cut off from their gradients? Prune them, or begin them anew."
        )
        severity: Severity = "warning" if share > limits["dead"] and not embedding else "info"
        yield Issue(layer.name, "faint rows", severity, cause, remedy, share, limits["dead"],
                    over(share, limits["dead"]))  # fmt: skip


def _extreme(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """One value that is many times all others; a whole column of them is told by its length."""
    limit = limits["value"]
    for layer in layers:
        top = largest(layer)
        if layer.facts.kind != "linear" or top is None or top.times <= limit:
            continue
        remedy = ONE_VALUE
        yield Issue(layer.name, "value", "warning", f"{top}.", remedy, top.times, limit,
                    over(top.times, limit))  # fmt: skip


def _copied(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for layer in layers:
        count, rows = layer.get("sparsity", "duplicated_rows"), layer.get("sparsity", "rows")
        if layer.vector or layer.zero or not count or not rows:
            continue
        at = where(layer, "sparsity", "duplicated_rows", count)
        verb = "equals" if count == 1 else "equal"
        cause = f"{count:,} of {rows * layer.count:,} rows {verb} another one, bit for bit{at}."
        remedy = "Tokens never seen in training, or units that were copied; they can be merged."
        share = count / (rows * layer.count)
        yield Issue(layer.name, "copied rows", "info", cause, remedy, share, 0.0, 1 + share)


def _same(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for layer in layers:
        if layer.facts.copy_of is not None:
            cause = f"It has the very values of {layer.facts.copy_of}."
            remedy = (
                "Tied weights are stored once by safetensors; layers that began as copies of each "
                "other have not been trained since."
            )
            yield Issue(layer.name, "copy", "info", cause, remedy)


def _range(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """Values near the largest that the stored dtype has: some may have been cut off there."""
    for layer in layers:
        value = layer.get("norms", "max")
        if value is None or layer.facts.dtype not in _NARROW or layer.facts.note is not None:
            continue
        largest = torch.finfo(getattr(torch, layer.facts.dtype)).max
        limit = limits["range"] * largest
        if value > limit:
            cause = (
                f"Its largest value is {value:.3g}, and {layer.facts.dtype} ends at {largest:g}."
            )
            remedy = "Look whether values were clipped when it was converted; bfloat16 has room."
            yield Issue(layer.name, "range", "warning", cause, remedy, value, limit,
                        over(value, limit))  # fmt: skip


RULES: Mapping[str, Rule] = {
    "not finite": not_finite,
    "zero": zero,
    "dead experts": dead_experts,
    "dead": dead,
    "faint rows": _faint,
    "copied rows": _copied,
    "value": _extreme,
    "copy": _same,
    "range": _range,
}
