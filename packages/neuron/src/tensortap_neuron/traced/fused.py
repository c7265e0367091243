"""What fused kernels change of the tensors around them, and what those are called then.

Read off the decoder layers of NxDI (models/{llama,qwen3,qwen3_moe}/modeling_*.py, July 2026). The
projections' kernel may add the residual of the layer before; the kernels of projections and MLP
may take the norm in front of them into themselves. What goes into the module is then not what
goes into it on other frameworks, and has a name of its own.
"""

from __future__ import annotations

from tensortap.names import TensorName
from tensortap_neuron.traced.described import Facts
from tensortap_neuron.traced.forwards import Forward

WITHOUT_RESIDUAL = "without_residual"
BEFORE_NORM = "before_norm"
_NORMS_APART = frozenset({"qwen2", "qwen2_vl", "mistral", "mixtral"})
"""Model types whose layers call both norms whatever the flags; of an unknown type none is sure."""


def name_of(name: TensorName, forward: Forward, facts: Facts) -> TensorName:
    """`name`, or that of a tensor which fused kernels made another one."""
    lacks = _lacks(name, forward, facts)
    if lacks is None:
        return name
    return TensorName(name.module, name.phase, f"{name.tensor}_{lacks}")


def _lacks(name: TensorName, forward: Forward, facts: Facts) -> str | None:
    words = name.module.split(".")
    if words[0] != "layers" or len(words) not in (2, 3):
        return None
    module = words[2] if len(words) == 3 else ""
    carried = facts.residual_fused and forward.kind == "cte"
    if name.tensor == "output":
        return WITHOUT_RESIDUAL if carried and not module else None
    if name.tensor != "input":
        return None
    if carried and words[1] != "0" and module in ("", "input_norm", "attn"):
        return WITHOUT_RESIDUAL
    if module == "mlp" and facts.mlp_kernel and facts.mlp_residual_fused:
        return WITHOUT_RESIDUAL
    return BEFORE_NORM if _takes_norm(module, forward, facts) else None


def _takes_norm(module: str, forward: Forward, facts: Facts) -> bool:
    """Is the norm in front of this module computed inside of its kernel?

    Not where the sequence is split, which it is while the context is encoded only.
    """
    if module == "mlp" and facts.model_type == "qwen3_moe":
        return facts.moe_kernel
    kernel = {"attn": facts.qkv_kernel, "mlp": facts.mlp_kernel}.get(module, False)
    split = facts.sequence_parallel and forward.kind == "cte"
    return kernel and not split and facts.model_type not in _NORMS_APART
