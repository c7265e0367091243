"""The mixer of Quamba: int8 weights and activations with static scales, a float32 scan inside.

x, z = int8(in_proj)        dt, B, C = int8(x_proj(u))        dt = int8(dt_proj(dt))
u    = SiLU(conv(x) + bias)                                   float32, stored as the mode says
y    = fp16(scan(u, dt, B, C) SiLU(z))                        the state is int8 when stored
out  = fp16(out_proj(int8(y H_i)))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tensortap_hf.quamba import convolution, hadamard
from tensortap_hf.quamba.forward import MixerForward, by_channel, changed, masked, step_size
from tensortap_hf.quamba.integers import (
    Codes,
    OnGrid,
    Value,
    half_away,
    half_even,
    matmul,
    rescaled,
    single,
    values,
)
from tensortap_hf.quamba.scales import LayerScales
from tensortap_hf.quamba.scan import ScanInputs, scan
from tensortap_hf.quamba.states import States
from tensortap_hf.quamba.variants import Variant


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of one mixer as codes, by their native names: `in_proj.weight`, `A_log`, …"""

    codes: Mapping[str, Codes]

    @property
    def A(self) -> torch.Tensor:
        """-exp(A_log); float32 [channel, state]."""
        return -torch.exp(self.codes["A_log"].values())

    def conv(self) -> tuple[Codes, Codes | None]:
        """(weight [channel, width], bias) of the convolution."""
        weight = self.codes["conv1d.weight"]
        return weight.like(weight.codes[:, 0]), self.codes.get("conv1d.bias")


class CodesForward(MixerForward):
    """The arithmetic of one row of the table."""

    operands = ("weight",)

    def __init__(
        self, module: Any, variant: Variant, weights: Weights, scales: LayerScales
    ) -> None:
        self._variant = variant
        self._weights = weights
        self._scales = scales
        self.scaled = _scaled(variant)
        super().__init__(module)

    def run(
        self, hidden: torch.Tensor, *, states: States, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """See `MixerForward.run`; fp16, as Quamba's out_proj returns it."""
        scales = self._scales
        taken = half_even(masked(hidden, mask), scales.in_proj_input)
        projected = self._linear("in_proj", taken, scales.in_proj_output)
        x, z = (projected.like(part) for part in projected.codes.chunk(2, dim=-1))
        stored = self._convolve(x, states, mask)
        gated = self._scan(stored, z, states)
        turned = half_away(hadamard.transform(gated), scales.out_proj_input)
        return self._out_proj(turned)

    def _convolve(self, x: Codes, states: States, mask: torch.Tensor | None) -> Value:
        """Convolution and SiLU, in the form the mode stores them; [batch, seq, channel]."""
        weight, bias = self._weights.conv()
        window = x.like(states.window(x.codes, weight.codes.shape[1]))
        if self._variant.dynamic:
            window = convolution.dynamically_requantized(window)
            x = window.like(window.codes[:, -x.codes.shape[1] :])
        stored = self._stored(convolution.of_codes(window, weight, bias))
        self.report("conv", input=by_channel(x), output=by_channel(stored))
        return changed(stored, lambda tensor: masked(tensor, mask))

    def _stored(self, exact: torch.Tensor) -> Value:
        if self._variant.conv == "float":
            return exact
        codes = self._codes_of(exact)
        if self._variant.conv == "int8":
            return codes
        return OnGrid(codes.values(), codes.scale, codes.format)

    def _codes_of(self, u: Value) -> Codes:
        """As x_proj needs it. Float values round as the convolution would have rounded them."""
        return u if isinstance(u, Codes) else half_away(values(u), self._scales.x_proj_input)

    def _scan(self, stored: Value, z: Codes, states: States) -> torch.Tensor:
        """The scan of what the convolution stored, times SiLU(z); fp16 [batch, seq, channel]."""
        codes = self._codes_of(stored)
        u = codes if self._variant.u == "int8" else stored
        low, B, C = self._selected(codes)
        dt = self._linear("dt_proj", low, self._scales.dt_proj_output)
        y, last = scan(self._scan_inputs(u, dt, B, C, states), self._variant.order)
        state = half_away(last, self._scales.ssm_state)
        states.keep(state.codes)
        gate = z.values()
        gated = y.mul_(gate).div_(torch.exp(-gate).add_(1)).half()
        shown = {"u": u, "dt": dt, "B": B, "C": C, "output": gated}
        by_token = {name: by_channel(tensor) for name, tensor in shown.items()}
        self.report("scan", **by_token, state=state)
        return gated

    def _scan_inputs(self, u: Value, dt: Codes, B: Codes, C: Codes, states: States) -> ScanInputs:
        """Everything as float32; a state from the cache comes back from its codes."""
        codes = self._weights.codes
        step = step_size(dt.values(), codes["dt_proj.bias"].values())
        before = None if states.scan is None else states.scan.float() * self._scales.ssm_state
        skip = codes["D"].values()
        return ScanInputs(values(u), step, self._weights.A, B.values(), C.values(), skip, before)

    def _selected(self, u: Codes) -> tuple[Codes, Codes, Codes]:
        """What goes into dt_proj, B and C; all of one scale."""
        module = self.module
        sizes = [module.time_step_rank, module.ssm_state_size, module.ssm_state_size]
        projected = self._linear("x_proj", u, self._scales.x_proj_output)
        low, B, C = torch.split(projected.codes, sizes, dim=-1)
        return projected.like(low), projected.like(B), projected.like(C)

    def _linear(self, word: str, x: Codes, output_scale: float) -> Codes:
        """A product without bias, rounded to int8."""
        weight = self._weights.codes[f"{word}.weight"]
        product = matmul(x.codes, weight.codes)
        output = rescaled(product, x.scale * weight.scale, output_scale)
        self.report(word, input=x, weight=weight, output=output)
        return output

    def _out_proj(self, x: Codes) -> torch.Tensor:
        """The last product, which Quamba returns in fp16."""
        weight = self._weights.codes["out_proj.weight"]
        product = matmul(x.codes, weight.codes).float()
        output = product.mul_(single(x.scale * weight.scale)).half()
        self.report("out_proj", input=x, weight=weight, output=output)
        return output


def _scaled(variant: Variant) -> dict[str, tuple[str, ...]]:
    """Site -> its tensors that have scales, in a row of the table."""
    linear = ("input", "weight", "output")
    return {
        **dict.fromkeys(("in_proj", "x_proj", "dt_proj"), linear),
        "out_proj": ("input", "weight"),
        "conv": ("input",) if variant.conv == "float" else ("input", "output"),
        "scan": (*(("u",) if _u_has_scale(variant) else ()), "dt", "B", "C", "state"),
    }


def _u_has_scale(variant: Variant) -> bool:
    return variant.u == "int8" or variant.conv != "float"
