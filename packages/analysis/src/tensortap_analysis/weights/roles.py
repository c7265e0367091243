"""What weights of different depths have in common, and which of them to look at beside others."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tensortap_analysis.weights.weight import Weight

FEWEST = 4
"""Weights of one role, below which there is no saying what is usual."""
_ENOUGH = 8
"""So many of one role tell what is usual; of a selection more are not read."""
_AFTER_LAYER = re.compile(r"^.*\.\d+\.(?=\D)")


def role_of(name: str) -> str:
    """`self_attn.q_proj` of `model.layers.3.self_attn.q_proj`; a name without depth is its own."""
    return _AFTER_LAYER.sub("", name)


def beside(chosen: Sequence[Weight], all_: Sequence[Weight]) -> list[Weight]:
    """Weights that were not chosen, of the roles of those that were: their peers, evenly apart."""
    names = {weight.name for weight in chosen}
    roles: dict[tuple[str, str], int] = {}
    for weight in chosen:
        if role_of(weight.layer) != weight.layer:
            key = role_of(weight.layer), weight.kind
            roles[key] = roles.get(key, 0) + 1
    others: dict[tuple[str, str], list[Weight]] = {}
    for weight in all_:
        key = role_of(weight.layer), weight.kind
        if weight.name not in names and key in roles and weight.numel:
            others.setdefault(key, []).append(weight)
    return [one for key, some in others.items() for one in _spread(some, _ENOUGH - roles[key])]


def _spread(some: Sequence[Weight], wanted: int) -> list[Weight]:
    """So many of them, from the first to the last; all where there are no more."""
    if wanted >= len(some):
        return list(some)
    return [some[(2 * n + 1) * len(some) // (2 * wanted)] for n in range(wanted)]
