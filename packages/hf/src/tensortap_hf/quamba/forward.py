"""What the two forwards of a Mamba mixer share: the int8 one, and the one in floats.

Both compute what transformers' mixer computes, in the rotated basis: in_proj, convolution and
SiLU, x_proj, dt_proj, the scan, the gate, the Hadamard transform of the channels, out_proj. Their
parts are reported to the tap under the names they have in an unquantised model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F

from tensortap.errors import NotSupported
from tensortap_hf import mixer
from tensortap_hf.quamba.integers import Codes, OnGrid, Value
from tensortap_hf.quamba.states import States

_LAST = "batch seq channel"
_SITES: Mapping[str, Mapping[str, str]] = {
    "conv": {"input": "batch channel seq", "output": "batch channel seq"},
    "scan": {
        "u": "batch channel seq",
        "dt": "batch channel seq",
        "B": "batch state seq",
        "C": "batch state seq",
        "output": "batch channel seq",
        "state": "batch channel state",
    },
    "in_proj": {"input": "batch seq hidden", "output": _LAST, "weight": "out in"},
    "x_proj": {"input": _LAST, "output": _LAST, "weight": "out in"},
    "dt_proj": {"input": _LAST, "output": _LAST, "weight": "out in"},
    "out_proj": {"input": _LAST, "output": "batch seq hidden", "weight": "out in"},
}
"""Site -> its tensors and their axes, as in an unquantised mixer."""


class MixerForward(mixer.Replacement):
    """`forward` of a mixer in a mode of Quamba; called once a forward of its layer."""

    scaled: Mapping[str, tuple[str, ...]] = {}
    """Site -> those of its tensors that have a scale."""
    operands: tuple[str, ...] = ()
    """`("weight",)` where linears have an operand other than the parameter."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.tensors = {site: self._tensors(site, axes) for site, axes in _SITES.items()}

    def __call__(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The signature of transformers' mixer; hidden_states [batch, seq, hidden], normed."""
        states = States(cache_params, self.module.layer_idx)
        run = functools.partial(self.run, states=states, mask=attention_mask)
        apply = cast(Callable[..., torch.Tensor], _ForwardOnly.apply)
        return apply(hidden_states, run)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotSupported(
            "A model in a mode of Quamba has codes in place of its weights and cannot be copied or "
            "pickled; do so before modes.apply(), or after remove()."
        )

    def run(
        self, hidden: torch.Tensor, *, states: States, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """[batch, seq, hidden] -> the same, before the residual addition; without gradients."""
        raise NotImplementedError

    def report(self, site: str, **tensors: Value) -> None:
        """Show the tap some tensors of a site; scales go with what has one."""
        call = mixer.report(site)
        if call is None:
            return
        dims = _SITES[site]
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor):
                call.capture({name: tensor}, dims=dims)
                continue
            data = tensor.codes if isinstance(tensor, Codes) else tensor.data
            call.capture({name: data}, dims=dims, format=tensor.format)
            call.capture({f"{name}_scale": torch.tensor(tensor.scale)})

    def _tensors(self, site: str, axes: Mapping[str, str]) -> tuple[str, ...]:
        shown = [name for name in axes if name != "weight" or name in self.operands]
        scales = [f"{name}_scale" for name in self.scaled.get(site, ())]
        return (*shown, *scales)


class _ForwardOnly(torch.autograd.Function):
    """Rounding has no gradient, and the scan here is not made for one; backward says so."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        return run(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise NotSupported(
            "A model in a mode of Quamba has no backward: its modes are for inference. Use a "
            "generic mode (fp32, bf16, mxfp8, …) for gradients."
        )


def masked(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros where there is padding; `tensor` [batch, seq, …] of any dtype."""
    return tensor if mask is None else (tensor * mask[:, :, None]).to(tensor.dtype)


def by_channel(value: Value) -> Value:
    """[batch, seq, channel] as the names' [batch, channel, seq]."""
    return changed(value, lambda tensor: tensor.mT)


def changed(value: Value, change: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """The same kind of value of other data."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Codes):
        return value.like(change(value.codes))
    return OnGrid(change(value.data), value.scale, value.format)


def step_size(dt: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """softplus(dt + bias), the identity above 20; float32."""
    return F.softplus(dt + bias)
