"""The attention core of Megatron-core's local spec with quantised operands.

`DotProductAttention.forward` computes two batched products, baddbmm(query, key) and
bmm(probs, value). It runs unchanged, with these two replaced while it does. Each is one forward
and two backward products, and each of those quantises its operands along the axis it sums over:

    S  = Q(query, dim) Q(key, dim)^T        C  = Q(probs, keys) Q(value, keys)
    dq = Q(dS, keys) Q(key, keys)           dP = Q(dC, dim) Q(value, dim)^T
    dk = Q(dS, queries)^T Q(query, queries) dv = Q(probs, queries)^T Q(dC, queries)

The scale of the scores is applied after the product, as the kernel does. Under grouped-query
attention key and value are repeated for the heads that share them before they are quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from tensortap.errors import NotSupported
from tensortap.integration import Call
from tensortap_megatron import operands
from tensortap_megatron.quantization.operand import Quantizer, Replacement


class AttentionForward(Replacement):
    """`forward` of a `DotProductAttention`; called every forward, also of a recomputation."""

    method = "forward"

    def __call__(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The original forward; query [seq, batch, heads, dim]."""
        products = _Products(self.quantizer, operands.enter(self.module), batch=query.shape[1])
        with products:
            context = self.original(query, *args, **kwargs)
        products.check()
        return context


class _Products(TorchFunctionMode):
    """Replaces the two products of one forward."""

    def __init__(self, quantizer: Quantizer, call: Call | None, *, batch: int) -> None:
        super().__init__()
        self._quantizer = quantizer
        self._call = call
        self._batch = batch
        self._seen: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.baddbmm:
            return self._scores(*args, **kwargs)
        if func is torch.bmm:
            return self._context(*args, **kwargs)
        return func(*args, **kwargs)

    def check(self) -> None:
        """Raise unless exactly the two products were computed: none may go by unquantised."""
        if self._seen != ["baddbmm", "bmm"]:
            raise NotSupported(
                "The attention core was expected to compute one baddbmm and one bmm, but it "
                f"computed {' and '.join(self._seen) or 'neither'}, so its products cannot be "
                "quantised. megatron-core 0.14 to 0.16 is supported; leave attention out with "
                "select='*,!*.attn.core,!lm_head'."
            )

    def _scores(
        self,
        buffer: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        beta: float = 1.0,
        alpha: float = 1.0,
    ) -> torch.Tensor:
        """Query [batch head, queries, dim], key [batch head, dim, keys]."""
        if beta != 0:
            raise NotSupported(f"Attention adds {beta} times a tensor to its scores.")
        self._seen.append("baddbmm")
        return _product(query, key, buffer, alpha, self._quantizer, self._capture_scores)

    def _context(self, probs: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Probs [batch head, queries, keys], value [batch head, keys, dim]."""
        self._seen.append("bmm")
        return _product(probs, value, None, 1.0, self._quantizer, self._capture_context)

    def _capture_scores(self, query: torch.Tensor, key: torch.Tensor) -> None:
        if self._call is not None:
            query, key = self._by_token(query), self._by_token(key.transpose(1, 2))
            tensors = {"query_quantized": query, "key_quantized": key}
            self._call.capture(tensors, format=self._quantizer.info)

    def _capture_context(self, probs: torch.Tensor, value: torch.Tensor) -> None:
        if self._call is not None:
            by_head = torch.unflatten(probs, 0, (self._batch, -1))
            tensors = {"probs_quantized": by_head, "value_quantized": self._by_token(value)}
            self._call.capture(tensors, format=self._quantizer.info)

    def _by_token(self, x: torch.Tensor) -> torch.Tensor:
        """[batch head, seq, dim] as the core is given it: [seq, batch, head, dim]."""
        return torch.unflatten(x.transpose(0, 1), 1, (self._batch, -1))


class _BatchedProduct(torch.autograd.Function):
    """alpha A B for A [n, i, k] and B [n, k, j], with its two gradients."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any,
        left: torch.Tensor,
        right: torch.Tensor,
        buffer: torch.Tensor | None,
        alpha: float,
        quantizer: Quantizer,
        capture: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        """`buffer`, of the product's shape, is what baddbmm wants to be given; it is not read."""
        a, b = quantizer(left, 2), quantizer(right, 1)
        capture(a, b)
        ctx.alpha, ctx.quantizer = alpha, quantizer
        ctx.save_for_backward(*((a, b) if quantizer.once else (left, right)))
        if buffer is None:
            return torch.bmm(a, b)
        return torch.baddbmm(buffer, a, b, beta=0.0, alpha=alpha)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        left, right = ctx.saved_tensors
        quantizer: Quantizer = ctx.quantizer
        dz = quantizer(grad, 2)
        grad_left = torch.bmm(dz, quantizer.again(right, 2).transpose(1, 2))
        dz = dz if quantizer.once else quantizer(grad, 1)
        grad_right = torch.bmm(quantizer.again(left, 1).transpose(1, 2), dz)
        return _scaled(grad_left, ctx.alpha), _scaled(grad_right, ctx.alpha), None, None, None, None


_product = cast(Callable[..., torch.Tensor], _BatchedProduct.apply)


def _scaled(product: torch.Tensor, alpha: float) -> torch.Tensor:
    return product if alpha == 1.0 else product.mul_(alpha)
