"""Fake quantisation: every linear layer with its operands on the grid of a number format.

A layer computes three products, and each quantises its operands along the axis it sums over:

    Y  = Q(X, in)      Q(W, in)^T       forward
    dX = Q(dY, out)    Q(W, out)        gradient of the input
    dW = Q(dY, tokens)^T Q(X, tokens)   gradient of the weight

The products run in the dtype of the model and accumulate as torch does there. With `int8` the
scales of channels are those of W8A8: one per output channel of the weight, one per token of the
activation. Bias, norms, attention products, convolutions and scans stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tensortap.errors import NotSupported, SelectionError
from tensortap.formats import Codec
from tensortap.integration import Call
from tensortap.selection import Selection, closest
from tensortap.undo import Undo
from tensortap_hf import integration, mixer, naming
from tensortap_hf.modes import operands
from tensortap_hf.modes.registry import Changes

EXCLUDED = {
    "embed": "an embedding",
    "lm_head": "the output layer stays in the precision of the model",
    "router": "a router decides which experts run; it stays in the precision of the model",
}
"""Last words of canonical names that are never quantised -> why."""

_PRODUCTS: Mapping[str, str] = {
    "transformers.pytorch_utils.Conv1D": "in out",
    "transformers.models.falcon.modeling_falcon.FalconLinear": "out in",
}
"""Classes with a forward of their own that computes the same -> the axes of their weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A module that multiplies a weight, and why it is not quantised, if so."""

    name: str
    module: nn.Module
    kept: str | None = None


def quantize(model: nn.Module, undo: Undo, codec: Codec, exclude: tuple[str, ...]) -> Changes:
    """Quantise the linear layers of a model until `undo` runs.

    Raises `NotSupported` where nothing can be quantised, or a layer's forward is not its own.
    """
    found = list(targets(model, exclude))
    _refuse_dead(exclude, found)
    chosen = [target for target in found if target.kept is None]
    if not chosen:
        raise NotSupported(f"{type(model).__name__} has no linear layer to quantise: {_why(found)}")
    for target in chosen:
        _refuse_replaced(target)
        undo.replace(target.module, "forward", QuantizedForward(target.module, codec))
    kept = {target.name: target.kept for target in found if target.kept is not None}
    return Changes(tuple(target.name for target in chosen), kept)


def targets(model: nn.Module, exclude: tuple[str, ...] = ()) -> Iterator[Target]:
    """Every module that multiplies a weight of its own, in the order of `named_modules`."""
    config = integration.pretrained(model)[0].config
    named = naming.named(model, config)
    excluded = Selection.parse(",".join(exclude)) if exclude else None
    uncalled = _uncalled(found.module for found in named)
    for found in named:
        why = _unfit(found.module)
        if why is None:
            continue
        asked = excluded is not None and excluded.matches_module(found.name)
        reasons = (
            _by_name(found.name), "excluded" if asked else None, uncalled.get(found.module), why
        )  # fmt: skip
        yield Target(found.name, found.module, next((r for r in reasons if r), None))


def is_linear(module: nn.Module) -> bool:
    """Does the module compute x W^T + b, and nothing else?"""
    return _product_of(module) is not None


class QuantizedForward(operands.Replacement):
    """`forward` of a linear layer, called every forward; x [..., in]."""

    def __init__(self, module: nn.Module, codec: Codec) -> None:
        super().__init__(module)
        self.codec = codec

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        """The product of what lies on the grid, plus the bias; the argument is called as it is."""
        [input] = *args, *kwargs.values()
        module: Any = self.module
        call = operands.enter(module)
        apply = cast(Callable[..., torch.Tensor], QuantizedProduct.apply)
        transposed = _product_of(module) == "in out"
        return apply(input, module.weight, module.bias, transposed, self.codec, call)


class QuantizedProduct(torch.autograd.Function):
    """The three products of one layer; `weight` is [out, in], or [in, out] if `transposed`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transposed: bool,
        codec: Codec,
        call: Call | None,
    ) -> torch.Tensor:
        x = codec.fake_quantize(input, -1)
        w = codec.fake_quantize(weight, 0 if transposed else 1)
        if call is not None:
            call.capture({"input_quantized": x, "weight": w}, format=codec.info)
        ctx.save_for_backward(input, weight)
        ctx.transposed, ctx.codec, ctx.call, ctx.has_bias = (
            transposed,
            codec,
            call,
            bias is not None,
        )
        return functional.linear(x, w.t() if transposed else w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        codec: Codec = ctx.codec
        # Autocast computes the forward in another dtype; backward runs without it.
        gradient = grad_output.to(weight.dtype)
        dy = codec.fake_quantize(gradient, -1)
        w = codec.fake_quantize(weight, 1 if ctx.transposed else 0)
        if ctx.call is not None:
            captured = {"grad_output_quantized": dy, "weight": w}
            ctx.call.capture(captured, phase="backward", format=codec.info)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = dy.matmul(w.t() if ctx.transposed else w).to(input.dtype)
        if ctx.needs_input_grad[1]:
            rows = codec.fake_quantize(_rows(gradient), 0)
            product = rows.t().matmul(codec.fake_quantize(_rows(input).to(weight.dtype), 0))
            grad_weight = product.t() if ctx.transposed else product
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = _rows(gradient).sum(dim=0)
        return grad_input, grad_weight, grad_bias, None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., features] as [tokens, features]."""
    return x.reshape(-1, x.shape[-1])


def _product_of(module: nn.Module) -> str | None:
    """The axes of the weight of a plain linear layer; `None` for any other module."""
    kind = type(module)
    if isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
        return "out in"
    return _PRODUCTS.get(f"{kind.__module__}.{kind.__name__}")


def _unfit(module: nn.Module) -> str | None:
    """`""` for a linear layer, a reason for what multiplies in other ways, else `None`."""
    if is_linear(module):
        return "" if type(module.weight) is nn.Parameter else _QUANTISED
    sizes = {key: p.dim() for key, p in module.named_parameters(recurse=False)}
    matrices = sorted(key for key, dims in sizes.items() if dims >= 2)
    if isinstance(module, nn.Embedding):
        return EXCLUDED["embed"]
    if not matrices:
        return None
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution, not a linear layer"
    stacked = [key for key in matrices if sizes[key] == 3]
    if stacked:
        return (
            f"the weights of its experts are stacked ({', '.join(stacked)}) and multiplied inside"
        )
    return f"{type(module).__name__} uses {', '.join(matrices)} itself, not in a linear layer"


_QUANTISED = "its weight is no plain parameter: a quantised checkpoint, or a wrapper, made it"


def _by_name(name: str) -> str | None:
    words = name.split(".")
    found = "lm_head" if words[0] == "lm_head" else words[-1]
    return EXCLUDED.get(found) or (EXCLUDED["embed"] if words[0] == "embed" else None)


def _uncalled(modules: Iterator[nn.Module]) -> Mapping[nn.Module, str]:
    """Layers whose weights are handed to functions, so that their forward never runs."""
    reason = "it is never called: its weight is handed to a function"
    return {
        child: reason
        for module in modules
        for key, child in module.named_children()
        if mixer.superseded(module, key) is not None
    }


def _refuse_dead(exclude: tuple[str, ...], found: Sequence[Target]) -> None:
    """An exclusion that matches nothing is most likely a typo."""
    names = [target.name for target in found]
    dead = (
        Selection.parse(",".join(exclude)).dead([f"{name}/" for name in names], ())
        if exclude
        else []
    )
    if dead:
        near = ", ".join(closest(dead[0], names))
        raise SelectionError(f"exclude: {dead[0]!r} matches no linear layer; nearest: {near}.")


def _refuse_replaced(target: Target) -> None:
    if "forward" in vars(target.module):
        raise NotSupported(
            f"{target.name} cannot be quantised: something replaced its forward (accelerate does, "
            "for offloading). Load the model without device_map, or exclude the module."
        )


def _why(found: list[Target]) -> str:
    reasons = dict.fromkeys(f"{target.name}: {target.kept}" for target in found)
    return "; ".join(list(reasons)[:3]) or "it has none."
