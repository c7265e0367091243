"""What hooks on a linear layer cannot see: the weight it used, its own share of `grad_input`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tensortap.hooks import Hook
from tensortap.integration import Call, Observer, Site
from tensortap.undo import Undo
from tensortap_megatron import operands, transformer_engine

TENSORS = ("weight", "input_quantized")
BACKWARD = ("weight", "grad_output_quantized", "grad_input_local")

_PRODUCTS = {
    "LinearWithGradAccumulationAndAsyncCommunicationBackward": slice(0, 1),
    "LinearWithFrozenWeightBackward": slice(0, 1),
    "QuantizedLinearBackward": slice(0, 1),
    "_LinearBackward": slice(1, None),
    "_LayerNormLinearBackward": slice(0, 0),
}
"""Autograd nodes of the product itself, and which of their gradients may be the input's.

Megatron's and ours begin with the input, Transformer Engine's with the weight, whose gradient
may have the same shape; with a norm in front, none is that of the product's own input.
"""

_DEEPEST = 4
"""Between a layer's output and its product lie a bias, an all-reduce or a gather."""


def install(site: Site, observer: Observer, undo: Undo) -> None:
    """Report the products of one linear layer until `undo` runs."""
    products = operands.register(site, observer, undo)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        call, reported = products.leave()
        if call is not None:
            hidden = transformer_engine.narrowed(module)
            if hidden:
                transformer_engine.explain_operand(site, observer)
            weight = None if reported or hidden else _weight(module, args, kwargs)
            call.capture({"weight": weight})
            given = next(iter((*args, *kwargs.values())), None)
            product = _Product(call, getattr(given, "shape", None), weight)
            _watch(product, output, observer)

    hook = Hook(observer.guard(after))
    undo.keep(site.module.register_forward_hook(hook, with_kwargs=True))


def _weight(module: Any, args: tuple[Any, ...], kwargs: Any) -> torch.Tensor | None:
    """The weight of this call: a tied output layer is given the embedding's."""
    given = kwargs.get("weight") if "weight" in kwargs else (args[1:2] or (None,))[0]
    weight = module.weight if given is None else given
    # Detached: what the parameter's gradient is, `grad/weight` tells.
    return weight.detach() if isinstance(weight, torch.Tensor) else None


def _watch(product: _Product, output: Any, observer: Observer) -> None:
    """Report what the product does in backward, when that runs."""
    tensor = output[0] if isinstance(output, tuple) else output
    node = next(_products(getattr(tensor, "grad_fn", None)), None)
    if node is not None:
        product.candidates = _PRODUCTS[node.name()]
        node.register_hook(observer.guard(product))


def _products(node: Any) -> Iterator[Any]:
    for _ in range(_DEEPEST):
        if node is None:
            return
        if node.name() in _PRODUCTS:
            yield node
        node = next((below for below, _ in node.next_functions if below is not None), None)


class _Product:
    """Called with the gradients that a product's backward computed."""

    candidates = slice(0)
    """Which of the gradients may be the input's."""

    def __init__(self, call: Call, shape: torch.Size | None, weight: torch.Tensor | None) -> None:
        """`shape` is that of the input; `weight` is `None` where others report the operand."""
        self._call = call
        self._shape = shape
        self._weight = weight

    def __call__(self, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        # None fits where sequence parallelism reduces it outside of the product (frozen weights).
        shares = (g for g in inputs[self.candidates] if g is not None and g.shape == self._shape)
        found = {"weight": self._weight, "grad_input_local": next(shares, None)}
        self._call.capture(found, phase="backward")
