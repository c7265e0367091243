"""One forward of a Hugging Face decoder, called so that a lazy device can run it as one graph.

What transformers does by itself (looked up in 5.20 to 5.23) reads values on the way, or does what
torch_xla has no operation for.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tensortap.errors import NotSupported, TensortapError
from tensortap_neuron.command.devices import first_line


def prepare(model: nn.Module) -> None:
    """Choose what a lazy device can run; once, before the model is moved there.

    Experts as batched products: torch_xla has no `histc` of integers, which grouped products
    begin with, and a loop over experts reads which of them have tokens.
    """
    can = getattr(model, "_can_set_experts_implementation", None)
    if can is not None and can():
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]


def forward(model: nn.Module, ids: torch.Tensor) -> None:
    """Run the prompt; a failure becomes `NotSupported` that names model and device.

    There is a cache and no attention mask: else transformers reads values to see whether anything
    is packed or padded.
    """
    try:
        model(input_ids=ids, use_cache=True, **_cache(model, ids.device))
    except TensortapError:
        raise
    except Exception as failure:
        raise NotSupported(
            f"The forward of {type(model).__name__} fails on {ids.device}: "
            f"{type(failure).__name__}: {first_line(failure)}"
        ) from failure


def _cache(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """A cache that keeps everything, for a model that would cut its own to a sliding window.

    torch_xla cannot slice from before the beginning, as the cut does for a short prompt. The
    attention mask still has the window.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None)
    plain = kinds <= {"full_attention", "sliding_attention"}
    taken = "past_key_values" in inspect.signature(model.forward).parameters
    if device.type != "xla" or not (window and plain and taken):
        return {}
    from transformers import DynamicCache

    return {"past_key_values": DynamicCache()}
