"""Names that sites of other ranks have: other layers, other stages, other experts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tensortap.integration import Site
from tensortap_megatron.facts import Facts

_EDGES = {
    "embed": ("output",),
    "final_norm": ("input", "output"),
    "lm_head": ("input", "weight", "output"),
}
"""What only the first or the last stage has."""

_LAYER = re.compile(r"\blayers\.\d+")
_EXPERT = re.compile(r"\bexperts\.\d+")


def names(sites: Sequence[Site], facts: Facts) -> list[str]:
    """Every name of any rank that follows from this rank's sites; empty when it has them all."""
    if facts.parallel["pp"].size == 1 and facts.parallel["ep"].size == 1:
        return []
    modules = [(site.name, tuple(site.tensors), _parameters(site)) for site in sites]
    modules += [(name, tensors, ("weight",)) for name, tensors in _EDGES.items()]
    found: dict[str, None] = {}
    for name, tensors, parameters in modules:
        for everywhere in _spread(name, facts):
            found |= dict.fromkeys(_names(everywhere, tensors, parameters))
    return list(found)


def _parameters(site: Site) -> tuple[str, ...]:
    if site.kind == "function":
        return ()
    natives = (name for name, _ in site.module.named_parameters(recurse=False))
    return tuple(word for name in natives if (word := site.words.get(name, name)) is not None)


def _spread(name: str, facts: Facts) -> list[str]:
    """The name with every layer and expert number of the whole model."""
    layers = int(getattr(facts.config, "num_layers", 0) or 0)
    experts = int(getattr(facts.config, "num_moe_experts", 0) or 0)
    spread = [name]
    if _LAYER.search(name):
        spread = [_LAYER.sub(f"layers.{n}", one) for one in spread for n in range(layers)]
    if _EXPERT.search(name):
        spread = [_EXPERT.sub(f"experts.{n}", one) for one in spread for n in range(experts)]
    return spread


def _names(module: str, tensors: Sequence[str], parameters: Sequence[str]) -> list[str]:
    return [
        *(f"{module}/forward/{tensor}" for tensor in tensors),
        *(f"{module}/backward/grad_{tensor}" for tensor in tensors),
        *(f"{module}/{phase}/{name}" for phase in ("param", "grad") for name in parameters),
    ]
