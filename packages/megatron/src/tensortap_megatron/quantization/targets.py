"""Which modules of a model are quantised, which of those asked for cannot be, and why."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tensortap.errors import AlreadyAttached, CaptureWarning, NotSupported
from tensortap.selection import Selection
from tensortap_megatron import elsewhere, naming
from tensortap_megatron.facts import Facts
from tensortap_megatron.quantization import linear
from tensortap_megatron.quantization.attention import AttentionForward
from tensortap_megatron.quantization.linear import LinearForward
from tensortap_megatron.quantization.operand import Replacement, replacement

EVERYTHING = "*,!embed,!embed.*,!lm_head,!lm_head.*"
"""What is quantised unless the user says otherwise."""

_LINEARS = frozenset(
    f"megatron.core.tensor_parallel.layers.{name}"
    for name in ("ColumnParallelLinear", "RowParallelLinear")
)
_ATTENTION = "megatron.core.transformer.dot_product_attention.DotProductAttention"
_GROUPED = "megatron.core.transformer.moe.experts.GroupedMLP"
_TRANSFORMER_ENGINE = re.compile(
    r"(transformer_engine|megatron\.core\.extensions\.transformer_engine)\..*"
    r"(Linear|Attention|MLP)"
)
_LOCAL = "build the model with the local layer spec (get_gpt_layer_local_spec)"


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A module that computes matrix products, and how it is quantised, or why it cannot be."""

    name: str
    module: nn.Module
    kind: type[Replacement] | None
    refusal: str | None = None


def choose(models: Sequence[nn.Module], selection: Selection) -> list[Target]:
    """The selected modules of all chunks of a model; raises when one cannot be quantised.

    Empty only on a rank where none of what is selected is: another pipeline stage's, say.
    """
    found = [target for model in models for target in _targets(model)]
    chosen = [target for target in found if selection.matches_module(target.name)]
    if not chosen:
        everywhere = _on_all_ranks([target.name for target in found], models)
        if not any(selection.matches_module(name) for name in everywhere):
            where = f"{type(models[0]).__name__}: of its modules, these compute matrix products"
            hint = " Select modules, without `/`; what is inside of one is `module.*`."
            raise selection.nothing_in(everywhere, where, hint=hint)
    _warn_of_dead(selection, [target.name for target in found], models)
    _refuse_twice(chosen)
    _refuse([target for target in chosen if target.refusal])
    return chosen


def _warn_of_dead(selection: Selection, names: Sequence[str], models: Sequence[nn.Module]) -> None:
    """A pattern that matches no product is most likely a typo; those of the default may."""
    if selection.text == EVERYTHING:
        return
    everywhere = [f"{name}/" for name in (*names, *_on_all_ranks(names, models), "embed")]
    for pattern in selection.dead(everywhere, ()):
        warnings.warn(
            f"quantize(select={selection.text!r}): {pattern!r} matches no matrix product of this "
            "model; what is inside of a module is `module.*`.",
            CaptureWarning,
            stacklevel=4,
        )


def _targets(model: nn.Module) -> Iterable[Target]:
    for named in naming.modules(model):
        lineage = {f"{base.__module__}.{base.__qualname__}" for base in type(named.module).__mro__}
        if lineage & _LINEARS:
            why = _configured(named.module) or linear.refusal(named.module)
            yield Target(named.name, named.module, LinearForward, why)
        elif _ATTENTION in lineage:
            yield Target(named.name, named.module, AttentionForward, _configured(named.module))
        else:
            why = _foreign(named.native, named.module, lineage)
            if why is not None:
                yield Target(named.name, named.module, None, why)


def _foreign(native: str, module: nn.Module, lineage: Iterable[str]) -> str | None:
    """Why a module that is not one of ours cannot be quantised; `None`: it needs not be."""
    if any(_TRANSFORMER_ENGINE.fullmatch(name) for name in lineage):
        return f"Transformer Engine computes its products in kernels of its own; {_LOCAL}"
    if _GROUPED in lineage:
        return (
            "it computes all experts in one grouped kernel; build the experts as SequentialMLP "
            "(moe_grouped_gemm=False)"
        )
    if isinstance(module, nn.Linear):
        return "it is a torch.nn.Linear, not one of Megatron's parallel linear layers"
    last = native.rpartition(".")[2]
    if last == "core_attention":
        return f"only Megatron's DotProductAttention can be quantised; {_LOCAL}"
    return None


def _configured(module: nn.Module) -> str | None:
    """Why the configuration of a module rules its quantisation out."""
    config = getattr(module, "config", None)
    for word in ("fp8", "fp4"):
        if getattr(config, word, None):
            return (
                f"config.{word}={getattr(config, word)!r} asks Transformer Engine to quantise, "
                f"which does nothing for this module; set {word} to None"
            )
    graphs = ("enable_cuda_graph", "external_cuda_graph")
    implementation = getattr(config, "cuda_graph_impl", None)
    if implementation not in (None, "none") or any(getattr(config, w, False) for w in graphs):
        return "a CUDA graph replays kernels without asking the module; turn CUDA graphs off"
    return None


def _refuse(refused: Sequence[Target]) -> None:
    if refused:
        first, rest = refused[0], len(refused) - 1
        more = f" The same or the like holds for {rest} more." if rest else ""
        names = ",".join(f"!{name}" for name in _generic(refused))
        raise NotSupported(
            f"{first.name} ({type(first.module).__name__}) cannot be quantised: {first.refusal}."
            f"{more} To quantise the rest only, exclude: select='*,!lm_head,{names}'."
        )


def _refuse_twice(chosen: Sequence[Target]) -> None:
    for target in chosen:
        earlier = replacement(target.module)
        if earlier is not None:
            raise AlreadyAttached(
                f"{target.name} is quantised to {earlier.quantizer.info.name} already. Call "
                "remove() on that first, or let the two selections not overlap."
            )


def _generic(targets: Iterable[Target]) -> list[str]:
    """Names with `*` for their numbers, each once."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", target.name) for target in targets))


def _on_all_ranks(names: Iterable[str], models: Sequence[nn.Module]) -> list[str]:
    """Names of products on any pipeline stage or expert rank."""
    everywhere = elsewhere.modules(Facts.of(models[0]))
    products = [name for name, kind in everywhere.items() if kind.product]
    return list(dict.fromkeys([*names, *products]))
