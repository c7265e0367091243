"""attention_maps/: who looks at whom, by head; captured, or recomputed from query and key."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import PowerNorm

from tensortap.errors import RunError
from tensortap.store import Run
from tensortap_analysis.captured.moments import Captured
from tensortap_analysis.captured.words import axes_of
from tensortap_analysis.plots.style import figure, save

HEADS, TOKENS = 16, 256


@dataclass(frozen=True, slots=True)
class Maps:
    """Probabilities [head, query, key] of the first sequence, and where they come from."""

    probs: torch.Tensor
    source: str


def draw(maps: Maps, path: Path, title: str) -> Path:
    """A panel for each of the first heads."""
    heads, queries, keys = maps.probs.shape
    shown = min(heads, HEADS)
    columns = min(shown, 4 if shown <= 8 else 8)
    rows = -(-shown // columns)
    drawn = figure(1.5 * columns + 0.8, 1.6 * rows + 0.7)
    panels = np.atleast_1d(drawn.subplots(rows, columns, sharex=True, sharey=True)).reshape(-1)
    every = max(1, -(-max(queries, keys) // TOKENS))
    for head, axes in enumerate(panels):
        if head >= shown:
            axes.set_axis_off()
            continue
        picture = axes.imshow(
            maps.probs[head, ::every, ::every].numpy(), cmap="magma", norm=PowerNorm(0.5, 0, 1),
            interpolation="nearest", extent=(0, keys, queries, 0), aspect="auto",
        )  # fmt: skip
        axes.set_title(f"head {head}", fontsize=7)
        axes.grid(visible=False)
        axes.tick_params(labelsize=6)
        if head >= shown - columns:
            axes.set_xlabel("key", fontsize=7)
        if head % columns == 0:
            axes.set_ylabel("query", fontsize=7)
    drawn.colorbar(picture, ax=panels.tolist(), pad=0.01, aspect=30, label="probability")
    note = [maps.source, "first sequence"]
    if heads > shown:
        note.append(f"the first {shown} of {heads} heads")
    if every > 1:
        note.append(f"every {every}. token")
    return save(drawn, path, title, "; ".join(note))


def modules(names: Iterator[str]) -> list[str]:
    """Modules with probabilities, or with query and key."""
    found: dict[str, set[str]] = {}
    for name in names:
        module, phase, tensor = name.split("/")
        if phase == "forward" and tensor in ("probs", "query", "key"):
            found.setdefault(module, set()).add(tensor)
    return [module for module, held in found.items() if "probs" in held or len(held) == 2]


def maps(run: Run, module: str, held: Mapping[str, Captured], *, causal: bool) -> Maps | None:
    """What was captured of a module's attention; `None` where only statistics were."""
    probs = held.get(f"{module}/forward/probs")
    if probs is not None and probs.values == "full":
        whole = _first(probs, ("head", "seq", "key"))
        return Maps(whole, f"captured at {probs.moment.when}")
    query, key = (held.get(f"{module}/forward/{word}") for word in ("query", "key"))
    if query is None or key is None or not (query.values == key.values == "full"):
        return None
    return recomputed(
        _first(query, ("head", "seq", "dim")),
        _first(key, ("head", "seq", "dim")),
        run.info.model_config,
        causal=causal,
    )


def recomputed(
    query: torch.Tensor, key: torch.Tensor, config: Mapping[str, Any], *, causal: bool
) -> Maps:
    """softmax(scale query key^T) of [head, seq, dim] each, in float32.

    Heads of `key` are repeated under grouped-query attention. The causal mask lets the last query
    see all keys, as with a cache. Scale and soft cap are those of the model's configuration,
    where it has them, else 1 / sqrt(dim).
    """
    if query.shape[0] % key.shape[0]:
        raise RunError(f"{query.shape[0]} heads of query do not share {key.shape[0]} of key.")
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    scale, word = _scale(config, query.shape[-1])
    scores = query @ key.transpose(1, 2) * scale
    cap = config.get("attn_logit_softcapping")
    if cap:
        scores, word = torch.tanh(scores / cap) * cap, f"{word}, soft cap {cap:g}"
    if causal:
        ahead = torch.ones(scores.shape[1:], dtype=torch.bool).triu(
            1 + key.shape[1] - query.shape[1]
        )
        scores = scores.masked_fill(ahead, -math.inf)
    mask = "causal mask" if causal else "no mask"
    return Maps(scores.softmax(-1), f"recomputed from query and key: scale {word}, {mask}")


def _scale(config: Mapping[str, Any], dim: int) -> tuple[float, str]:
    if config.get("query_pre_attn_scalar"):
        size = float(config["query_pre_attn_scalar"])
        return size**-0.5, f"1/sqrt({size:g})"
    if config.get("attention_multiplier"):
        size = float(config["attention_multiplier"])
        return size, f"{size:g}"
    return dim**-0.5, f"1/sqrt({dim})"


def _first(tensor: Captured, order: tuple[str, ...]) -> torch.Tensor:
    """The first sequence in float32, its axes in this order."""
    logical = tensor.open()
    words = axes_of(logical.dims or f"batch {' '.join(order)}")
    if sorted(words) != sorted(("batch", *order)) or len(words) != len(logical.shape):
        raise RunError(f"{tensor.name}: its axes {' '.join(words)!r} are not those of attention.")
    batch = words.index("batch")
    box = [(0, min(size, 1) if axis == batch else size) for axis, size in enumerate(logical.shape)]
    first = logical.read(box).select(batch, 0)
    words.remove("batch")
    return first.permute([words.index(word) for word in order]).to(torch.float32)
