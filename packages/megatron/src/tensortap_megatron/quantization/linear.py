"""The linear layers of Megatron-core with quantised operands.

A layer computes three products, and each quantises its operands along the axis it sums over:

    Y  = Q(X, in)      Q(W, in)^T       forward
    dX = Q(dY, out)    Q(W, out)        gradient of the input
    dW = Q(dY, tokens)^T Q(X, tokens)   gradient of the weight

The products run in the dtype of their operands and accumulate as torch does there: in float32 for
float32, float16 and bfloat16 (on CUDA with the reduced-precision reductions that torch allows).
A value that the dtype cannot hold is rounded to it: int8, int4 and nvfp4 have scales that are no
powers of two. Bias and its gradient are no products and stay as they are. Formats that need no
axis (hifp8, fp16, bf16, int8 with one scale) are computed once for two products, so the weight on
the grid is kept from forward to backward; the others keep the tensors themselves.

Tokens lie in Megatron's order [seq, batch], as its own kernel sums them: a block of 32 along them
is 32 consecutive tokens of one sequence only for a microbatch of one sequence; for B sequences it
holds 32 / B positions of each. Sequence parallelism does not change the blocks, because the
sequence is gathered first. Under tensor parallelism a rank quantises its shard: the blocks are
those of the whole operand where the shard is a multiple of the block; a scale of the whole tensor
(int8, and the second scale of nvfp4) is the shard's own, no collective is added for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
from torch import distributed, nn
from torch.autograd.function import once_differentiable

from tensortap.errors import NotSupported
from tensortap.integration import Call
from tensortap_megatron import operands
from tensortap_megatron.quantization.operand import Quantizer, Replacement

FUSED = (
    "gradient_accumulation_fusion computes the weight gradient in a kernel of its own, which "
    "cannot be quantised; set it to False (--no-gradient-accumulation-fusion)"
)
DEFERRED = (
    "defer_embedding_wgrad_compute computes the weight gradient after backward, outside of the "
    "layer; set it to False"
)


class LinearForward(Replacement):
    """`_forward_impl` of a `ColumnParallelLinear` or `RowParallelLinear`; called every forward."""

    method = "_forward_impl"

    def __call__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: distributed.ProcessGroup | None = None,
        grad_output_buffer: list[torch.Tensor] | None = None,
        wgrad_deferral_limit: int | None = None,
        async_grad_allreduce: bool | None = None,
    ) -> torch.Tensor:
        """The signature of Megatron's `linear_with_…` functions; input [seq, batch, in]."""
        if gradient_accumulation_fusion or grad_output_buffer is not None:
            raise NotSupported(f"{FUSED if gradient_accumulation_fusion else DEFERRED}.")
        speaks = allreduce_dgrad or sequence_parallel
        exchange = _Exchange(
            _group(tp_group) if speaks else None, gather=sequence_parallel, reduce=allreduce_dgrad
        )
        call = operands.enter(self.module)
        apply = cast(Callable[..., torch.Tensor], QuantizedLinear.apply)
        return apply(input, weight, bias, self.quantizer, exchange, call)


class QuantizedLinear(torch.autograd.Function):
    """The three products; communication is that of Megatron's own function, in its order."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        quantizer: Quantizer,
        exchange: _Exchange,
        call: Call | None,
    ) -> torch.Tensor:
        x = quantizer(exchange.gathered(input), -1)
        w = quantizer(weight, -1)
        if call is not None:
            call.capture({"weight": w, "input_quantized": x}, format=quantizer.info)
        output = torch.matmul(x, w.t())
        ctx.quantizer, ctx.exchange, ctx.call = quantizer, exchange, call
        ctx.has_bias = bias is not None
        # A frozen weight needs no input; a gathered input would hold the whole sequence.
        kept = x if quantizer.once and not exchange.gather else input
        ctx.save_for_backward(
            kept if ctx.needs_input_grad[1] else None, w if quantizer.once else weight
        )
        return output if bias is None else output + bias

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        gathered = ctx.exchange.gathering(input) if ctx.needs_input_grad[1] else None
        dy = ctx.quantizer(grad_output, -1)
        w = ctx.quantizer.again(weight, 0)
        if ctx.call is not None:
            captured = {"weight": w, "grad_output_quantized": dy}
            ctx.call.capture(captured, phase="backward", format=ctx.quantizer.info)
        grad_input = dy.matmul(w)
        x = gathered.wait() if gathered is not None else None
        summed = ctx.exchange.reducing(grad_input)
        grad_weight = grad_bias = None
        if x is not None:  # With a frozen weight Megatron leaves the bias without gradient, too.
            dy = dy if ctx.quantizer.once else grad_output
            grad_weight = _weight_gradient(ctx.quantizer, ctx.exchange, dy, x)
            grad_bias = _rows(grad_output).sum(dim=0) if ctx.has_bias else None
        return summed.wait(), grad_weight, grad_bias, None, None, None


def _weight_gradient(
    quantizer: Quantizer, exchange: _Exchange, dy: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """dY^T X, summed over tokens; what comes quantised already is taken as it is."""
    dy = quantizer.again(_rows(dy), 0)
    x = quantizer(_rows(x), 0) if exchange.gather else quantizer.again(_rows(x), 0)
    return dy.t().matmul(x)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[seq, batch, features] as [tokens, features]; the experts' input is so already."""
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True, slots=True)
class _Pending:
    """A tensor that is complete once `wait` returns it."""

    tensor: torch.Tensor
    work: distributed.Work | None = None

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            self.work.wait()
        return self.tensor


@dataclass(frozen=True, slots=True)
class _Exchange:
    """What the ranks of a tensor-parallel group tell each other about one layer.

    `gather`: the input is a piece of the sequence (sequence parallelism), its gradient is
    reduce-scattered. `reduce`: the gradient of the input is all-reduced. Never both.
    """

    group: distributed.ProcessGroup | None
    gather: bool
    reduce: bool

    def gathered(self, piece: torch.Tensor) -> torch.Tensor:
        """The whole sequence; waits for the other ranks."""
        return self.gathering(piece).wait()

    def gathering(self, piece: torch.Tensor) -> _Pending:
        """The whole sequence, on its way from the other ranks."""
        if not self.gather:
            return _Pending(piece)
        whole = piece.new_empty((piece.shape[0] * self._size(), *piece.shape[1:]))
        work = distributed.all_gather_into_tensor(
            whole, piece.contiguous(), group=self.group, async_op=True
        )
        return _Pending(whole, work)

    def reducing(self, grad_input: torch.Tensor) -> _Pending:
        """The gradient of the input, summed over the ranks; this rank's piece of the sequence."""
        if self.gather:
            piece = grad_input.new_empty(
                (grad_input.shape[0] // self._size(), *grad_input.shape[1:])
            )
            work = distributed.reduce_scatter_tensor(
                piece, grad_input, group=self.group, async_op=True
            )
            return _Pending(piece, work)
        if self.reduce:
            work = distributed.all_reduce(grad_input, group=self.group, async_op=True)
            return _Pending(grad_input, work)
        return _Pending(grad_input)

    def _size(self) -> int:
        return distributed.get_world_size(self.group)


def _group(given: distributed.ProcessGroup | None) -> distributed.ProcessGroup | None:
    """The group of a layer; one that names none means Megatron's default one."""
    default = import_module("megatron.core.utils").get_tensor_model_parallel_group_if_none
    return cast("distributed.ProcessGroup | None", default(given))


def refusal(module: nn.Module) -> str | None:
    """Why a Megatron linear layer cannot be quantised, as half a sentence; `None`: it can."""
    config = getattr(module, "config", None)
    fused = "gradient_accumulation_fusion"
    if getattr(module, fused, False) or getattr(config, fused, False):
        return FUSED
    if getattr(config, "defer_embedding_wgrad_compute", False):
        return DEFERRED
    changed = next(base for base in type(module).__mro__ if "_forward_impl" in vars(base))
    if "_forward_impl" in vars(module) or not changed.__module__.startswith("megatron.core."):
        return "something else has replaced its _forward_impl; undo that first"
    return None
