"""The mixer in floats: unquantised weights, in the basis of the quantised model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tensortap_hf.quamba import convolution, hadamard
from tensortap_hf.quamba.forward import MixerForward, masked, step_size
from tensortap_hf.quamba.scan import SEQUENTIAL, ScanInputs, scan
from tensortap_hf.quamba.states import States

Observe = Callable[[str, torch.Tensor], None]
"""(name of a scale, the tensor it is for): how calibration watches."""


class FloatForward(MixerForward):
    """Products in the dtype of the weights; the scan in float32, one token after the other."""

    def __init__(self, module: Any, observe: Observe | None = None) -> None:
        super().__init__(module)
        self._observe = observe or _ignore

    def run(
        self, hidden: torch.Tensor, *, states: States, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """See `MixerForward.run`."""
        module = self.module
        x, z = self._linear("in_proj", masked(hidden, mask)).chunk(2, dim=-1)
        window = states.window(x, module.conv_kernel_size)
        conv = module.conv1d
        u = convolution.of_floats(window, conv.weight[:, 0], conv.bias)
        self.report("conv", input=x.mT, output=u.mT)
        gated = self._scan(masked(u, mask), z, states)
        return self._linear("out_proj", hadamard.transform(gated).to(hidden.dtype))

    def _scan(self, u: torch.Tensor, z: torch.Tensor, states: States) -> torch.Tensor:
        """The scan of u [batch, seq, channel], times SiLU(z)."""
        module = self.module
        sizes = [module.time_step_rank, module.ssm_state_size, module.ssm_state_size]
        low, B, C = torch.split(self._linear("x_proj", u), sizes, dim=-1)
        dt = self._linear("dt_proj", low)
        step = step_size(dt.float(), module.dt_proj.bias.float())
        inputs = ScanInputs(
            u.float(), step, -torch.exp(module.A_log.float()), B.float(), C.float(),
            module.D.float(), states.scan,
        )  # fmt: skip
        y, state = scan(inputs, SEQUENTIAL)
        self._observe("ssm_state", state)
        states.keep(state)
        gated = (y * F.silu(z.float())).to(u.dtype)
        self.report("scan", u=u.mT, dt=dt.mT, B=B.mT, C=C.mT, output=gated.mT, state=state)
        return gated

    def _linear(self, word: str, x: torch.Tensor) -> torch.Tensor:
        """A product without bias: dt_proj's is added inside of the scan, the others have none."""
        output = F.linear(x, getattr(self.module, word).weight)
        self._observe(f"{word}_input", x)
        self._observe(f"{word}_output", output)
        self.report(word, input=x, output=output)
        return output


def _ignore(name: str, tensor: torch.Tensor) -> None:
    """Nobody calibrates."""
