"""Fakes of what Megatron's Mamba layers import from mamba_ssm and einops, in plain torch.

mamba_ssm needs CUDA and Triton. The functions here have the arguments of
`mamba_ssm/ops/triton/ssd_combined.py` and `layernorm_gated.py` (2.2) and compute what the
references in those files and the Mamba-2 paper (Dao and Gu 2024, equation 1) say, one token
after the other.

As a script it runs the step of `spread.py` with a hybrid `MambaModel` instead of a `GPTModel`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PATTERN = "M*-M"
"""Two Mamba layers, around an attention layer and an MLP layer."""
HYBRID: dict[str, Any] = {
    "mamba_state_dim": 8,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "is_hybrid_model": True,
}

_INFERENCE = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"


def fake_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:
    """`mamba_chunk_scan_combined`: x [b, l, h, p], dt [b, l, h], A [h], B and C [b, l, g, n]."""
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    per_group = x.shape[2] // B.shape[2]
    B, C = (t.float().repeat_interleave(per_group, 2) for t in (B, C))
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1], dtype=torch.float32)
    state = state if initial_states is None else initial_states.float()
    steps = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        write = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t].float(), B[:, t])
        state = decay * state + write
        steps.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    out = torch.stack(steps, 1)
    if D is not None:
        out = out + x.float() * (D[:, None] if D.dim() == 1 else D)
    out = (out if z is None else out * F.silu(z.float())).to(x.dtype)
    return (out, state) if return_final_states else out


def fake_split_conv1d_scan(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """`mamba_split_conv1d_scan_combined`, as `mamba_split_conv1d_scan_ref` computes it."""
    assert rmsnorm_weight is None
    assert outproj_weight is None
    heads = D.shape[0]
    dim = heads * (headdim if D.dim() == 1 else D.shape[1])
    states = (conv1d_weight.shape[0] - dim) // 2
    z, xBC, dt = zxbcdt.split([dim, dim + 2 * states, heads], dim=-1)
    width = conv1d_weight.shape[1]
    mixed = F.conv1d(
        F.pad(xBC.transpose(1, 2), (width - 1, 0)),
        conv1d_weight[:, None],
        conv1d_bias,
        groups=conv1d_weight.shape[0],
    )
    x, B, C = F.silu(mixed).transpose(1, 2).split([dim, states, states], dim=-1)
    y = fake_scan(
        x.unflatten(-1, (heads, -1)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, -1)),
        dt_bias=dt_bias,
        dt_softplus=True,
        dt_limit=dt_limit,
    )
    return y.flatten(-2)


class FakeRMSNormGated(nn.Module):
    """`layernorm_gated.RMSNorm`, as `rms_norm_ref` computes it."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size or hidden_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        given = x.float()
        if z is not None and not self.norm_before_gate:
            given = given * F.silu(z.float())
        grouped = given.unflatten(-1, (-1, self.group_size))
        rstd = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        out = (grouped * rstd).flatten(-2) * self.weight
        if z is not None and self.norm_before_gate:
            out = out * F.silu(z.float())
        return out.to(x.dtype)


def fake_rearrange(tensor: torch.Tensor, pattern: str, **sizes: int) -> torch.Tensor:
    """`einops.rearrange` without an ellipsis: split, permute, join."""
    left, right = (
        [words.strip("()").split() for words in re.findall(r"\([^)]*\)|\S+", side)]
        for side in pattern.split("->")
    )
    for axis in reversed(range(len(left))):
        known = [1 if word == "1" else sizes.get(word, -1) for word in left[axis]]
        tensor = tensor.unflatten(axis, known) if len(known) > 1 else tensor
    names = [word for words in left for word in words]
    tensor = tensor.squeeze(names.index("1")) if "1" in names else tensor
    names = [word for word in names if word != "1"]
    tensor = tensor.permute([names.index(word) for words in right for word in words])
    for axis, words in enumerate(right):
        tensor = tensor.flatten(axis, axis + len(words) - 1) if len(words) > 1 else tensor
    return tensor


def install() -> None:
    """Give this process the modules that `megatron.core.ssm` imports; call before importing it."""
    scans = {
        "mamba_chunk_scan_combined": fake_scan,
        "mamba_split_conv1d_scan_combined": fake_split_conv1d_scan,
    }
    contents: dict[str, dict[str, Any]] = {
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": None},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": FakeRMSNormGated},
        "mamba_ssm.ops.triton.ssd_combined": scans,
    }
    # Kernels of dynamic inference, which are written in Triton.
    inference = ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")
    contents[_INFERENCE] = dict.fromkeys(inference)
    if importlib.util.find_spec("einops") is None:
        contents["einops"] = {"rearrange": fake_rearrange, "repeat": None}
    for name, content in contents.items():
        module = sys.modules.setdefault(name, types.ModuleType(name))
        vars(module).update(content)
    from megatron.core.ssm import mamba_block
    from tests.megatron.fake_transformer_engine import TENorm

    # Its last norm is Transformer Engine's whatever the specification says.
    mamba_block.TENorm = TENorm


def stack_spec(*, engine: bool = False) -> Any:
    """`mamba_stack_spec` of the faked Transformer Engine, or the same of Megatron's own layers."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )
    from tests.megatron import fake_transformer_engine as fake

    into = fake.TELayerNormColumnParallelLinear if engine else ColumnParallelLinear
    outof = fake.TERowParallelLinear if engine else RowParallelLinear
    norm = IdentityOp if engine else WrappedTorchNorm
    whole = (
        fake.layer_spec() if engine else get_gpt_layer_local_spec(normalization="RMSNorm")
    ).submodules
    mixer = ModuleSpec(
        module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=into, out_proj=outof)
    )
    mamba = MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=get_bias_dropout_add)
    attention = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=whole.self_attention,
        self_attn_bda=get_bias_dropout_add,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm, mlp=whole.mlp, mlp_bda=get_bias_dropout_add
    )
    return ModuleSpec(
        module=MambaStack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def fused_share(logical: torch.Tensor, sizes: Sequence[int], count: int, rank: int) -> torch.Tensor:
    """A rank's piece of tensors that lie one after the other, each of them split."""
    return torch.cat([piece.chunk(count)[rank] for piece in logical.split(list(sizes))])


def main() -> None:
    """The step of `spread.py` with a hybrid model."""
    install()
    import json

    from megatron.core.models.gpt import gpt_layer_specs, gpt_model
    from megatron.core.models.mamba.mamba_model import MambaModel
    from tests.megatron import spread
    from tests.megatron.fake_transformer_engine import unfused

    engine = json.loads(sys.argv[2]).get("kind") == "engine"
    inner, state, heads = 2 * spread.HIDDEN, 2 * HYBRID["mamba_state_dim"], 8
    fused = {"in_proj": (inner, inner, state, state, heads), "conv1d": (inner, state, state)}
    plain_share, plain_global = spread._share, spread._global

    def share(
        key: str, name: str, parameter: Any, size: int, rank: int, *, gated: bool
    ) -> torch.Tensor:
        if ".mixer." not in name or "layer_norm" in name or "out_proj" in name:
            return plain_share(key, name, parameter, size, rank, gated=gated)
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        shape = (parameter.shape[0] * size, *parameter.shape[1:])
        logical = torch.randn(shape, generator=generator) * 0.3
        module = name.split(".mixer.")[1].split(".")[0]
        return fused_share(logical, fused.get(module, shape[:1]), size, rank)

    def model(config: Any, spec: Any, **options: Any) -> Any:
        return MambaModel(config, spec, hybrid_override_pattern=PATTERN, **options)

    def global_name(model: Any, name: str) -> str:
        return unfused(plain_global(model, name)).replace("mixer.in_proj.layer_norm_", "norm.")

    spread.KINDS |= {"hybrid": {**spread.DENSE, **HYBRID}, "engine": {**spread.DENSE, **HYBRID}}
    spread._share, spread._global = share, global_name
    gpt_model.GPTModel = model
    spec = stack_spec(engine=engine)  # Itself of parts of the specification that is replaced.
    gpt_layer_specs.get_gpt_layer_local_spec = lambda **options: spec
    spread.main()


if __name__ == "__main__":
    main()
