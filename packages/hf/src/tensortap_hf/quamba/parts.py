"""The parts of a `MambaForCausalLM` that Quamba changes, and which models it cannot change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tensortap.errors import NotSupported
from tensortap_hf import naming
from tensortap_hf.integration import pretrained
from tensortap_hf.quamba import hadamard


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One layer: its norm and its mixer, with their canonical names."""

    name: str
    """Of the mixer."""
    norm_name: str
    norm: Any
    mixer: Any


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A model taken apart; the modules are its own."""

    model: Any
    embed: Any
    blocks: tuple[Block, ...]
    final_norm: Any
    lm_head: Any

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def intermediate_size(self) -> int:
        """Channels of the scan."""
        return int(self.model.config.intermediate_size)


def parts(model: nn.Module) -> Parts:
    """Take a model apart; raises `NotSupported` with the reason where there is one."""
    reason = refusal(model)
    if reason is not None:
        raise NotSupported(reason)
    [found] = pretrained(model)
    for layer in found.backbone.layers:
        if "forward" in vars(layer.mixer):
            raise NotSupported(
                "something has replaced the forward of the mixers (accelerate does, for "
                "offloading). Load the model without device_map, or undo that first."
            )
    names = {one.module: one.name for one in naming.named(model, found.config)}
    blocks = tuple(
        Block(names[layer.mixer], names[layer.norm], layer.norm, layer.mixer)
        for layer in found.backbone.layers
    )
    backbone = found.backbone
    return Parts(found, backbone.embeddings, blocks, backbone.norm_f, found.lm_head)


def refusal(model: nn.Module) -> str | None:
    """Why Quamba's modes cannot serve a model, as a sentence; `None`: they can."""
    found = pretrained(model)
    if len(found) != 1 or "MambaForCausalLM" not in _classes(found[0]):
        held = ", ".join(type(one).__name__ for one in found) or type(model).__name__
        return (
            f"{held}: the modes of Quamba are for MambaForCausalLM. {_SCOPE.get(held, '')}".strip()
        )
    config = found[0].config
    for size in (config.hidden_size, config.intermediate_size):
        if (reason := hadamard.refusal(size)) is not None:
            return f"The weights cannot be rotated: {reason}"
    if config.use_bias:
        return "Quamba has no biases of in_proj and out_proj (use_bias=True)."
    if config.hidden_act not in ("silu", "swish"):
        return f"Quamba's convolution ends in SiLU, not in {config.hidden_act}."
    return None


def is_mamba(model: nn.Module) -> bool:
    """Is this a Mamba of some kind, of which one may think that Quamba has modes for it?"""
    kinds = {"MambaForCausalLM", *_SCOPE}
    return any(kinds.intersection(_classes(one)) for one in pretrained(model))


_SCOPE = {
    "Mamba2ForCausalLM": "Quamba2 reorders the heads of Mamba2 and has scales for groups of them; "
    "that is not emulated.",
    "FalconMambaForCausalLM": "Quamba has no norms of dt, B and C.",
}


def _classes(model: nn.Module) -> list[str]:
    return [kind.__name__ for kind in type(model).__mro__]
