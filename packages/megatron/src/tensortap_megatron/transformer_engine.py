"""What Transformer Engine's layers hide, and the sites of what they fuse.

A norm that is fused into a linear layer has its input and parameters, but its output, the input
of that linear layer, is never in memory. Grouped linear layers hold the weights of many experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from tensortap.integration import Observer, Site
from tensortap_megatron import activations, parameters, parts
from tensortap_megatron.facts import Facts
from tensortap_megatron.gradients import accumulated
from tensortap_megatron.naming import Named
from tensortap_megatron.placements import SitePlans
from tensortap_megatron.words import FUSED_NORMS

_NORM_PARAMETERS = {"layer_norm_weight": "weight", "layer_norm_bias": "bias"}
"""What Transformer Engine calls the parameters of a norm that it fused into a linear layer."""

_NOTHING_SEEN: Mapping[str, str | None] = dict.fromkeys(("input", "output", "output.1"))

_BLOCKS = ("attn", "mlp", "mixer")

_NO_OUTPUT = "normalised inside of a fused kernel, which keeps the result to itself"
_NO_PROBS = "attention is computed without its probabilities; use the local layer spec"
_NO_OPERAND = "the product used the weight in a narrower format that it does not show"


def norm_words() -> dict[str, str | None]:
    """A linear layer with a norm: what goes in belongs to the norm, and so do two parameters."""
    return {"input": None, "output.1": None, **dict.fromkeys(_NORM_PARAMETERS)}


def block_words(named: Named) -> dict[str, str | None]:
    """A block whose norm is fused into its first layer is given what precedes that norm.

    Elsewhere the input of `attn` or `mlp` is normalised; one name must not mean both.
    """
    return {"input": None} if named.word in _BLOCKS and _normalises(named.module) else {}


def _normalises(block: nn.Module) -> bool:
    return any(
        parts.has_norm(child) and not FUSED_NORMS.get(word, "attn.").startswith("attn.")
        for word, child in block.named_children()
    )


def norm_site(named: Named, facts: Facts) -> Site:
    """The norm that runs inside of a linear layer: its input is all of it that can be seen."""
    name = norm_name(named)
    hidden = activations.plans(Named(name, named.native, named.module), facts)
    plans = SitePlans(hidden, parameters.norm_plans(named, facts, _NORM_PARAMETERS))
    return Site(
        name,
        f"{named.native}:norm",
        named.module,
        tensors=("input",),
        dims=plans.dims,
        placement=plans.rule(spread=facts.parallel.spread),
        words={"output": None, "output.1": None, "weight": None, "bias": None, **_NORM_PARAMETERS},
        gradient=accumulated,
    )


def norm_name(named: Named) -> str:
    """What the norm that is fused into this layer is called where it is a module of its own."""
    block = named.name.rpartition(".")[0]
    native = named.native.rpartition(".")[2]
    word = FUSED_NORMS.get(native)
    return f"{block.rpartition('.')[0]}.{word}" if word else f"{named.name}.layer_norm"


def expert_sites(named: Named, facts: Facts) -> Iterator[Site]:
    """The weights of a grouped linear layer under the names of their experts."""
    count = parts.experts_of(named.module)
    first = facts.parallel["ep"].rank * count
    every = _numbered(named.module)
    for number in range(count):
        block, _, word = named.name.rpartition(".")
        one = Named(f"{block}.{first + number}.{word}", named.native, named.module)
        plans = SitePlans({}, parameters.expert_plans(one, facts))
        own = {f"weight{number}": "weight", f"bias{number}": "bias"}
        hidden = {f"output.1.{n}": None for n in range(count)}
        yield Site(
            one.name,
            f"{named.native}:{number}",
            named.module,
            tensors=(),
            dims=plans.dims,
            placement=plans.rule(spread=facts.parallel.spread),
            words={**_NOTHING_SEEN, **every, **hidden, **own},
            gradient=accumulated,
            silent="a grouped product: the tokens of all experts are at the layer itself",
        )


def grouped_words(module: nn.Module) -> dict[str, str | None]:
    """A grouped linear layer itself has the tokens of all its experts, and no weight."""
    biases = {f"output.1.{number}": None for number in range(parts.experts_of(module))}
    return {"output.1": None, **biases, **_numbered(module)}


def _numbered(module: nn.Module) -> dict[str, str | None]:
    return dict.fromkeys(name for name, _ in module.named_parameters(recurse=False))


def explain(site: Site, observer: Observer) -> None:
    """Say in the coverage report what cannot be seen at a site."""
    if site.native.endswith(":norm"):
        observer.note(f"{site.name}/forward/output", _NO_OUTPUT)
    elif site.kind == "module" and parts.has_norm(site.module):
        observer.note(f"{site.name}/forward/input", _NO_OUTPUT)
    elif site.kind == "module" and type(site.module).__name__ == "TEDotProductAttention":
        observer.note(f"{site.name}/forward/probs", _NO_PROBS)


def narrowed(module: nn.Module) -> bool:
    """Did its last product use other operands than its parameters (fp8 and fp4 autocast)?"""
    return bool(getattr(module, "fp8", False))


def explain_operand(site: Site, observer: Observer) -> None:
    """Say that the weight as used by a product is not to be had."""
    observer.note(f"{site.name}/forward/weight", _NO_OPERAND)
