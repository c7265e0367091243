"""The cheapest number format that each layer bears, as a configuration for llm-compressor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tensortap.errors import ConfigError, nearest
from tensortap_analysis.weights.digits import below
from tensortap_analysis.weights.recommend.schemes import SCHEMES
from tensortap_analysis.weights.result import Facts, ScanResult
from tensortap_analysis.weights.saved import Metrics, encoded

SQNR_DB = 30.0
"""The least SQNR that is kept by default: errors of 3 % of a weight's root mean square."""
LAST = ("lm_head", "output_layer", "embed_out")
"""The last layer, whose errors nothing after it can average out; commonly left as it is."""
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Siblings that inference engines join into one matrix, which has one format."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What a layer is given: a format, and its SQNR there; or `None`, and why it is left alone.

    `reason` also names the sibling that a layer goes with, where alone it would bear another one.
    """

    layer: str
    format: str | None
    sqnr_db: float | None
    bits: float
    numel: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """A format for each layer that bears one; `bits` are those of a value on the average."""

    sqnr_db: float
    choices: tuple[Choice, ...]

    @property
    def bits(self) -> float | None:
        """Stored bits a value, over all layers that the plan knows."""
        count = sum(choice.numel for choice in self.choices)
        return sum(c.bits * c.numel for c in self.choices) / count if count else None

    def by_format(self) -> dict[str, list[str]]:
        """Layers of each format that is used, in the order of the checkpoint."""
        found: dict[str, list[str]] = {}
        for choice in self.choices:
            if choice.format is not None:
                found.setdefault(choice.format, []).append(choice.layer)
        return found

    @property
    def ignore(self) -> list[str]:
        """Linear layers that stay as they are."""
        return [c.layer for c in self.choices if c.format is None and c.reason != NO_MODULE]

    def config(self) -> dict[str, Any]:
        """`config_groups` and `ignore`, as `QuantizationModifier(**…)` of llm-compressor takes
        them, and `quantization_config` of a Hugging Face model (compressed-tensors).
        """
        groups = {
            name: {"targets": layers, "weights": dict(SCHEMES[name].weights)}
            for name, layers in self.by_format().items()
        }
        return {"config_groups": groups, "ignore": self.ignore}

    def to_json(self) -> dict[str, Any]:
        """The configuration, and what it was decided by."""
        return {
            "sqnr_db": self.sqnr_db,
            "bits": self.bits,
            **self.config(),
            "layers": {choice.layer: encoded(asdict(choice)) for choice in self.choices},
        }


NO_MODULE = "no linear module: targets cannot name it"


def quant_plan(
    result: ScanResult,
    *,
    sqnr_db: float = SQNR_DB,
    formats: Sequence[str] = tuple(SCHEMES),
    keep: Sequence[str] = LAST,
) -> QuantPlan:
    """For each linear layer of a scan the format of the fewest bits with at least `sqnr_db`.

    Siblings that are fused for inference get one format, that of the most sensitive of them.
    Layers whose last word is in `keep` are left alone, as are those that no format serves. `int8`
    is judged with one scale a row. Raises `ConfigError` for a format without a scheme, one that
    the scan lacks, or a scan without the method "quantization".
    """
    _check(result, formats)
    groups: dict[tuple[str, ...], list[str]] = {}
    for layer in result:
        groups.setdefault(_siblings(layer), []).append(layer)
    chosen = {}
    for layers in groups.values():
        together = _chosen(layers, result, sqnr_db, formats, keep)
        chosen.update({choice.layer: choice for choice in together})
    return QuantPlan(sqnr_db, tuple(chosen[layer] for layer in result))


def _check(result: ScanResult, formats: Sequence[str]) -> None:
    if "quantization" not in result.methods:
        raise ConfigError(
            "The scan has no quantization metrics; scan with --methods quantization, or all."
        )
    for name in formats:
        if name not in SCHEMES:
            raise ConfigError(
                f"llm-compressor has no scheme for {name!r}; it has {nearest(name, SCHEMES)}."
            )
        if name not in result.options.formats and name != "int8":
            raise ConfigError(f"The scan has no SQNR of {name}; scan with --formats {name},… .")


def _siblings(layer: str) -> tuple[str, ...]:
    """What layers that must share a format have in common; a layer by itself has its name."""
    parent, _, last = layer.rpartition(".")
    for names in _FUSED:
        if last in names:
            return (parent, *names)
    return (layer,)


def _chosen(
    layers: Sequence[str],
    result: ScanResult,
    wanted: float,
    formats: Sequence[str],
    keep: Sequence[str],
) -> list[Choice]:
    why = [_left_alone(layer, result.facts[layer], result[layer], keep) for layer in layers]
    if any(why):
        shared = _goes_with([layer for layer, reason in zip(layers, why, strict=True) if reason])
        return [
            _left(layer, result.facts[layer], reason or shared)
            for layer, reason in zip(layers, why, strict=True)
        ]
    cheapest = sorted(formats, key=lambda name: (SCHEMES[name].bits, name))
    borne = {layer: _borne(layer, result, wanted, cheapest) for layer in layers}
    shared_by_all = [name for name in cheapest if all(name in some for some in borne.values())]
    if shared_by_all:
        return [_given(layer, result, shared_by_all[0], borne) for layer in layers]
    bad = [layer for layer in layers if not borne[layer]]
    if not bad:
        reason = f"fused with {', '.join(_last(layer) for layer in layers)}: no format suits all"
        return [_left(layer, result.facts[layer], reason) for layer in layers]
    return [
        _left(
            layer, result.facts[layer],
            _closest(result[layer], wanted, formats) if layer in bad else _goes_with(bad),
        )
        for layer in layers
    ]  # fmt: skip


def _borne(
    layer: str, result: ScanResult, wanted: float, formats: Sequence[str]
) -> tuple[str, ...]:
    """The formats in which the layer alone keeps what is wanted."""
    columns = _columns(result.facts[layer])
    return tuple(
        name for name in formats
        if SCHEMES[name].fits(columns) and (_sqnr(result[layer], name) or -math.inf) >= wanted
    )  # fmt: skip


def _given(layer: str, result: ScanResult, name: str, borne: Mapping[str, Sequence[str]]) -> Choice:
    """The format that all siblings bear, and whose fault it is that it is not a cheaper one."""
    mine = borne[layer][0]
    others = [one for one, some in borne.items() if mine not in some]
    reason = _goes_with(others) if mine != name else None
    numel = result.facts[layer].numel
    return Choice(layer, name, _sqnr(result[layer], name), SCHEMES[name].bits, numel, reason)


def _goes_with(layers: Sequence[str]) -> str:
    return f"goes with {', '.join(map(_last, layers))}: engines join them into one matrix"


def _last(layer: str) -> str:
    return layer.rpartition(".")[2]


def _closest(stats: Mapping[str, Metrics], wanted: float, formats: Sequence[str]) -> str:
    """Why no format will do, and which comes nearest."""
    found = [(db, name) for name in formats if (db := _sqnr(stats, name)) is not None]
    best = f": {max(found)[1]} leaves {below(max(found)[0], wanted)} dB" if found else ""
    return f"no format keeps {wanted:g} dB{best}"


def _left_alone(
    layer: str, facts: Facts, stats: Mapping[str, Metrics], keep: Sequence[str]
) -> str | None:
    if facts.kind != "linear":
        return NO_MODULE
    if layer.rpartition(".")[2] in keep:
        return "the last layer is commonly left as it is"
    if _sqnr(stats, "int8") is None:
        reasons: Mapping[str, str] = stats.get("quantization", {}).get("unresolved", {})
        return reasons.get("sqnr_db_per_channel", "its quantization was not measured")
    return None


def _left(layer: str, facts: Facts, reason: str) -> Choice:
    return Choice(layer, None, None, _stored_bits(facts), facts.numel, reason)


def _stored_bits(facts: Facts) -> float:
    dtype = getattr(torch, facts.dtype, None)
    return 8.0 * dtype.itemsize if isinstance(dtype, torch.dtype) else 16.0


def _columns(facts: Facts) -> int:
    """How many inputs a linear layer has."""
    return facts.shape[0] if facts.stored == "in out" else facts.shape[-1]


def _sqnr(stats: Mapping[str, Metrics], name: str) -> float | None:
    metrics = stats.get("quantization", {})
    found: float | None
    if name == "int8":
        found = metrics.get("sqnr_db_per_channel")
    else:
        found = (metrics.get("formats") or {}).get(name)
    return found
