"""What hooks on a linear layer cannot see: the weight it used, its own share of `grad_input`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tensortap.hooks import Hook
from tensortap.integration import Call, Observer, Site
from tensortap.undo import Undo
from tensortap_megatron import operands

TENSORS = ("weight", "input_quantized")
BACKWARD = ("weight", "grad_output_quantized", "grad_input_local")

_PRODUCTS = (
    "LinearWithGradAccumulationAndAsyncCommunicationBackward",
    "LinearWithFrozenWeightBackward",
    "QuantizedLinearBackward",
    "_LinearBackward",
)
"""Autograd nodes of the product itself: Megatron's, ours, Transformer Engine's."""

_DEEPEST = 4
"""Between a layer's output and its product lie a bias, an all-reduce or a gather."""


def install(site: Site, observer: Observer, undo: Undo) -> None:
    """Report the products of one linear layer until `undo` runs."""
    products = operands.register(site, observer, undo)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        call, reported = products.leave()
        if call is not None:
            if not reported:
                call.capture({"weight": _weight(module, args, kwargs)})
            _watch(call, output, args[0] if args else None)

    undo.keep(site.module.register_forward_hook(Hook(after), with_kwargs=True))


def _weight(module: Any, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor | None:
    """The weight of this call: a tied output layer is given the embedding's."""
    given = kwargs.get("weight") if "weight" in kwargs else (args[1:2] or (None,))[0]
    weight = module.weight if given is None else given
    # Detached: what the parameter's gradient is, `grad/weight` tells.
    return weight.detach() if isinstance(weight, torch.Tensor) else None


def _watch(call: Call, output: Any, given: Any) -> None:
    """Record the gradient that this product sends to its input, when backward runs."""
    tensor = output[0] if isinstance(output, tuple) else output
    node = next(_products(getattr(tensor, "grad_fn", None)), None)
    if node is not None:
        node.register_hook(_Share(call, getattr(given, "shape", None)))


def _products(node: Any) -> Iterator[Any]:
    for _ in range(_DEEPEST):
        if node is None:
            return
        if node.name() in _PRODUCTS:
            yield node
        node = next((below for below, _ in node.next_functions if below is not None), None)


class _Share:
    """Called with the gradients that a product's backward computed; the first is its input's."""

    def __init__(self, call: Call, shape: torch.Size | None) -> None:
        self._call = call
        self._shape = shape

    def __call__(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        share = inputs[0]
        # With a frozen weight, sequence parallelism reduces it later, outside of the product.
        if share is not None and share.shape == self._shape:
            self._call.capture({"grad_input_local": share}, phase="backward")
