"""Fakes of the Transformer Engine layers of Megatron-core, which need CUDA to be installed.

Each mirrors a class of `megatron/core/extensions/transformer_engine.py` (0.16.1) and what it
inherits from `transformer_engine/pytorch/module` (2.x): parameters and their attributes, the
order of arguments of the autograd functions, collectives, and what `forward` returns. The
classes of Megatron's names are made below as subclasses, as Megatron makes them of TE's.

As a script it runs the step of `spread.py` with these layers instead of Megatron's own.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


class FakeFP8GlobalStateManager:
    """`transformer_engine.pytorch.fp8.FP8GlobalStateManager`: is an autocast on?"""

    enabled = False


@contextlib.contextmanager
def fake_fp8_autocast() -> Iterator[None]:
    """`transformer_engine.pytorch.fp8_autocast(enabled=True)`."""
    FakeFP8GlobalStateManager.enabled = True
    try:
        yield
    finally:
        FakeFP8GlobalStateManager.enabled = False


def _cast(tensor: torch.Tensor, fp8: bool) -> torch.Tensor:
    """To E4M3 and back with one scale for the tensor, as `Float8CurrentScaling` does."""
    if not fp8:
        return tensor
    scale = 448.0 / tensor.abs().max().clamp(min=1e-12)
    return (tensor * scale).to(torch.float8_e4m3fn).to(tensor.dtype) / scale


class _Group:
    """The collectives of a tensor-parallel group that TE issues inside of its functions."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.size = 1 if group is None else group.size()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            tensor = tensor.contiguous()
            torch.distributed.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """`gather_along_first_dim`."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        torch.distributed.all_gather_into_tensor(out, tensor.contiguous(), group=self._group)
        return out

    def scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """`reduce_scatter_along_first_dim`."""
        if self.size == 1:
            return tensor
        out = tensor.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
        torch.distributed.reduce_scatter_tensor(out, tensor.contiguous(), group=self._group)
        return out


class _Product:
    """Forward and backward of one GEMM with the communication of its parallel mode."""

    def __init__(self, mode: str | None, group: Any, *, sequence: bool, fp8: bool) -> None:
        self.mode, self.group, self.fp8 = mode, _Group(group), fp8
        self.sequence = sequence and self.group.size > 1

    def forward(self, given: Any, weight: Any, bias: Any) -> tuple[torch.Tensor, torch.Tensor]:
        gathered = self.mode == "column" and self.sequence
        used = _cast(self.group.gather(given) if gathered else given, self.fp8)
        out = F.linear(used, _cast(weight, self.fp8))
        if self.mode == "row":
            out = self.group.scatter(out) if self.sequence else self.group.all_reduce(out)
        return out if bias is None else out + bias, used

    def backward(self, grad: Any, used: Any, weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of weight and input."""
        if self.mode == "row" and self.sequence:
            grad = self.group.gather(grad)
        to_input = _cast(grad, self.fp8) @ _cast(weight, self.fp8)
        if self.mode == "column":
            share = self.group.scatter if self.sequence else self.group.all_reduce
            to_input = share(to_input)
        to_weight = grad.flatten(0, -2).t() @ used.flatten(0, -2)
        return to_weight, to_input


class _Linear(torch.autograd.Function):
    """`pytorch/module/linear.py::_Linear`: the weight is the first argument, then the input."""

    @staticmethod
    def forward(ctx: Any, weight: Any, inp: Any, bias: Any, product: _Product) -> torch.Tensor:
        out, used = product.forward(inp, weight, bias)
        ctx.save_for_backward(weight, used)
        ctx.product, ctx.biased = product, bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        weight, used = ctx.saved_tensors
        wgrad, dgrad = ctx.product.backward(grad_output, used, weight)
        bgrad = grad_output.flatten(0, -2).sum(0) if ctx.biased else None
        return wgrad, dgrad, bgrad, None


class _LayerNormLinear(torch.autograd.Function):
    """`pytorch/module/layernorm_linear.py::_LayerNormLinear`: the input is the first argument."""

    @staticmethod
    def forward(
        ctx: Any, inp: Any, ln_weight: Any, ln_bias: Any, weight: Any, bias: Any, options: Any
    ) -> torch.Tensor:
        product, eps = options
        normed = _normed(inp, ln_weight, ln_bias, eps)
        out, used = product.forward(normed, weight, bias)
        ctx.save_for_backward(inp, ln_weight, ln_bias, weight, used)
        ctx.product, ctx.eps, ctx.biased = product, eps, bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        inp, ln_weight, ln_bias, weight, used = ctx.saved_tensors
        wgrad, dgrad = ctx.product.backward(grad_output, used, weight)
        bgrad = grad_output.flatten(0, -2).sum(0) if ctx.biased else None
        with torch.enable_grad():
            given = [
                t if t is None else t.detach().requires_grad_() for t in (inp, ln_weight, ln_bias)
            ]
            normed = _normed(given[0], given[1], given[2], ctx.eps)
        there = [t for t in given if t is not None]
        found = [*torch.autograd.grad(normed, there, dgrad), None]
        return found[0], found[1], found[2], wgrad, bgrad, None


def _normed(inp: Any, weight: Any, bias: Any, eps: float) -> torch.Tensor:
    if bias is None:
        return F.rms_norm(inp, weight.shape, weight, eps)
    return F.layer_norm(inp, weight.shape, weight, bias, eps)


class FakeTELinear(nn.Module):
    """`TELinear` over `te.pytorch.Linear`."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: Any,
        init_method: Any = None,
        bias: bool = True,
        skip_bias_add: bool = False,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        is_expert: bool = False,
        symmetric_ar_type: str | None = None,
        tp_group: Any = None,
    ) -> None:
        super().__init__()
        self.config, self.te_return_bias = config, skip_bias_add and bias
        self.parallel_mode, self.tp_group = parallel_mode, tp_group
        size = 1 if tp_group is None or parallel_mode is None else tp_group.size()
        self.tp_size = size
        self.sequence_parallel = size > 1 and config.sequence_parallel
        self.fp8 = False
        out = output_size // size if parallel_mode == "column" else output_size
        inner = input_size // size if parallel_mode == "row" else input_size
        self.weight = nn.Parameter(torch.zeros(out, inner))
        # `Linear.reset_parameters` sets these after it has initialised.
        _mark(self.weight, self.parallel_mode, 0 if parallel_mode == "column" else 1)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        if self.bias is not None:
            if parallel_mode == "column":
                _mark(self.bias, self.parallel_mode, 0)
            elif parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
        if is_expert and (size > 1 or config.expert_model_parallel_size > 1):
            # Megatron's dispatcher communicates instead.
            self.parallel_mode, self.tp_group, self.sequence_parallel = None, None, False

    def _product(self) -> _Product:
        # `TransformerEngineBaseModule.prepare_forward` asks at every forward.
        self.fp8 = FakeFP8GlobalStateManager.enabled
        return _Product(
            self.parallel_mode, self.tp_group, sequence=self.sequence_parallel, fp8=self.fp8
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        given = None if self.te_return_bias else self.bias
        out = _Linear.apply(self.weight, x, given, self._product())
        return out, self.bias if self.te_return_bias else None


def _mark(parameter: Any, mode: str | None, dim: int) -> None:
    """`set_tensor_model_parallel_attributes`."""
    parameter.tensor_model_parallel = mode is not None
    parameter.partition_dim = dim
    parameter.partition_stride = 1


class FakeTEColumnLinear(FakeTELinear):
    """`TEColumnParallelLinear`."""

    def __init__(self, *sizes: int, gather_output: bool = False, stride: int = 1, **more: Any):
        if gather_output:
            raise ValueError("Transformer Engine linear layers do not support gather_output = True")
        super().__init__(*sizes, parallel_mode="column", **more)


class FakeTERowLinear(FakeTELinear):
    """`TERowParallelLinear`."""

    def __init__(self, *sizes: int, input_is_parallel: bool = True, **more: Any) -> None:
        super().__init__(*sizes, parallel_mode="row", **more)


class FakeTELayerNormLinear(FakeTEColumnLinear):
    """`TELayerNormColumnParallelLinear` over `te.pytorch.LayerNormLinear`."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **more: Any) -> None:
        super().__init__(input_size, output_size, config=config, **more)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(input_size))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        given = None if self.te_return_bias else self.bias
        out = _LayerNormLinear.apply(
            x,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.weight,
            given,
            (self._product(), self.eps),
        )
        return out, self.bias if self.te_return_bias else None


class FakeTENorm:
    """`TENorm`: makes TE's LayerNorm or RMSNorm, whose parameters know of sequence parallelism."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5) -> Any:
        kind = FakeRMSNorm if config.normalization == "RMSNorm" else FakeLayerNorm
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class FakeLayerNorm(nn.LayerNorm):
    """`te.pytorch.LayerNorm`."""


class FakeRMSNorm(nn.RMSNorm):
    """`te.pytorch.RMSNorm`."""


class FakeTEAttention(nn.Module):
    """`TEDotProductAttention`: flash attention, which never holds the probabilities."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = "p2p",
        pg_collection: Any = None,
        model_comm_pgs: Any = None,  # Its name in 0.14.
    ) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        num_splits: int | None = None,
    ) -> torch.Tensor:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class FakeTEGrouped(nn.Module):
    """`TEGroupedLinear` over `te.pytorch.GroupedLinear`: weight0, weight1, …, one GEMM each."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str,
        config: Any,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        assert is_expert, "TEGroupedLinear only supports expert parallelism"
        self.config, self.num_gemms, self.use_bias = config, num_gemms, bias
        self.te_return_bias = skip_bias_add and bias
        size = pg_collection.expt_tp.size()
        out = output_size // size if parallel_mode == "column" else output_size
        inner = input_size // size if parallel_mode == "row" else input_size
        split = size == 1 and config.expert_model_parallel_size == 1
        for number in range(num_gemms):
            weight = nn.Parameter(torch.zeros(out, inner))
            # Under explicit expert communication Megatron takes the mode away from TE.
            _mark(weight, parallel_mode if split else None, 0 if parallel_mode == "column" else 1)
            self.register_parameter(f"weight{number}", weight)
            if bias:
                self.register_parameter(f"bias{number}", nn.Parameter(torch.zeros(out)))
        for parameter in self.parameters():
            parameter.allreduce = config.expert_model_parallel_size == 1

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, Any]:
        biases = [getattr(self, f"bias{n}", None) for n in range(self.num_gemms)]
        given = [None] * self.num_gemms if self.te_return_bias else biases
        rows = x.split(m_splits)
        product = _Product(None, None, sequence=False, fp8=False)
        found = [
            _Linear.apply(getattr(self, f"weight{n}"), rows[n], given[n], product)
            for n in range(self.num_gemms)
        ]
        return torch.cat(found), biases if self.te_return_bias else None


class FakeTEColumnGrouped(FakeTEGrouped):
    """`TEColumnParallelGroupedLinear`."""

    def __init__(self, *sizes: int, **more: Any) -> None:
        super().__init__(*sizes, parallel_mode="column", **more)


class FakeTERowGrouped(FakeTEGrouped):
    """`TERowParallelGroupedLinear`."""

    def __init__(self, *sizes: int, **more: Any) -> None:
        super().__init__(*sizes, parallel_mode="row", **more)


TELinear = type("TELinear", (FakeTELinear,), {})
TEColumnParallelLinear = type("TEColumnParallelLinear", (FakeTEColumnLinear,), {})
TERowParallelLinear = type("TERowParallelLinear", (FakeTERowLinear,), {})
TELayerNormColumnParallelLinear = type(
    "TELayerNormColumnParallelLinear", (FakeTELayerNormLinear,), {}
)
TENorm = type("TENorm", (FakeTENorm,), {})
TEDotProductAttention = type("TEDotProductAttention", (FakeTEAttention,), {})
TEColumnParallelGroupedLinear = type("TEColumnParallelGroupedLinear", (FakeTEColumnGrouped,), {})
TERowParallelGroupedLinear = type("TERowParallelGroupedLinear", (FakeTERowGrouped,), {})


def layer_spec(*, grouped_experts: int | None = None, qk_layernorm: bool = False) -> Any:
    """What `get_gpt_layer_with_transformer_engine_spec` returns, of the fakes."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    norm = TENorm if qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=TELayerNormColumnParallelLinear,
            core_attention=TEDotProductAttention,
            linear_proj=TERowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    dense = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TENorm if grouped_experts else IdentityOp,
            mlp=_experts() if grouped_experts else dense,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _experts() -> Any:
    """`get_moe_module_spec_for_backend` with `TESpecProvider.grouped_mlp_modules`."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    grouped = MLPSubmodules(
        linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
    )
    experts = ModuleSpec(module=TEGroupedMLP, submodules=grouped)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))


EXPERTS = 4
_FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def unfused(name: str) -> str:
    """The name that a parameter of these layers has in Megatron's local spec."""
    from megatron.core import parallel_state

    for fused, own in _FUSED.items():
        name = name.replace(fused, own)
    expert = re.search(r"experts\.(linear_fc\d)\.weight(\d+)", name)
    if expert is not None:
        ranks = parallel_state.get_expert_model_parallel_world_size()
        first = EXPERTS // ranks * parallel_state.get_expert_model_parallel_rank()
        own = f"experts.experts.{first + int(expert[2])}.{expert[1]}.weight"
        name = name.replace(expert[0], own)
    return name


def main() -> None:
    """The step of `spread.py`, its layers of the fakes and with the same weights."""
    from megatron.core.models.gpt import gpt_layer_specs
    from tests.megatron import spread

    def spec(num_experts: int | None = None, **options: Any) -> Any:
        return layer_spec(grouped_experts=num_experts, qk_layernorm=options["qk_layernorm"])

    gpt_layer_specs.get_gpt_layer_local_spec = spec
    original = spread._global
    spread._global = lambda model, name: unfused(original(model, name))
    spread.main()


if __name__ == "__main__":
    main()
