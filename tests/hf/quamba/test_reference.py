"""One layer of every mode against slow numpy, written from the published algorithm alone.

It takes the parameters of the model as it was loaded, the scales, and what the layer was given,
and computes sums, roundings and the scan with loops of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

F32 = np.float32
H12 = """
+-++++++++++ --+-+-+-+-+- +++-++----++ +---+--+-++- +++++-++---- +-+---+--+-+
++--+++-++-- +--++---+--+ ++----+++-++ +--+-++---+- ++++----+++- +-+--+-++---
"""


def hadamard(n: int) -> np.ndarray:
    """H12 times Sylvester's, by the parity of common bits."""
    rest = n // 12
    h12 = np.array([[1.0 if sign == "+" else -1.0 for sign in row] for row in H12.split()])
    parity = [[bin(i & j).count("1") % 2 for j in range(rest)] for i in range(rest)]
    return np.kron(h12, 1.0 - 2.0 * np.array(parity)) / np.sqrt(n)


def even(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), -128, 127)


def away(x: np.ndarray) -> np.ndarray:
    return np.clip(np.sign(x) * np.floor(np.abs(x.astype(np.float64)) + 0.5), -128, 127)


def quantised(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Per tensor: absmax / 127."""
    scale = F32(max(np.abs(weight).max(), 1e-5) / 127)
    return even(F32(weight) / scale), float(scale)


class Reference:
    """One mixer of a model; `run` goes through it for one sequence."""

    def __init__(self, model: Any, layer: int, scales: Any) -> None:
        block, self.scales = model.backbone.layers[layer], scales
        names = {name: p.detach().double().numpy() for name, p in block.named_parameters()}
        self.p = {name.removeprefix("mixer."): p for name, p in names.items()}
        self.epsilon = model.config.layer_norm_epsilon
        hidden, channels = self.p["out_proj.weight"].shape
        self.h, self.h_inner = hadamard(hidden), hadamard(channels)
        self.rank, self.states = model.config.time_step_rank, model.config.state_size
        self.folded = F32(self.p["in_proj.weight"] * self.p["norm.weight"] @ self.h)
        self.out = F32(self.h.T @ self.p["out_proj.weight"] @ self.h_inner)

    def norm(self, residual: np.ndarray) -> np.ndarray:
        mean = (residual**2).mean(-1, keepdims=True)
        return F32(residual / np.sqrt(mean + self.epsilon))

    def convolve(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """x [seq, channel], weight [channel, 1, width]."""
        width, out = weight.shape[2], np.zeros_like(x)
        for t in range(len(x)):
            for back in range(width):
                if t - back >= 0:
                    out[t] += weight[:, 0, width - 1 - back] * x[t - back]
        out += bias
        return out / (1 + np.exp(-out))

    def scan(
        self, u: np.ndarray, dt: np.ndarray, b: np.ndarray, c: np.ndarray, *, weights: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """One token after the other in float64; exact arithmetic has no order."""
        a, skip = -np.exp(weights("A_log")), weights("D")
        step = dt + weights("dt_proj.bias")
        step = np.where(step <= 20, np.log1p(np.exp(step)), step)
        h, y = np.zeros(a.shape), np.zeros_like(u)
        for t in range(len(u)):
            h = np.exp(step[t][:, None] * a) * h + (step[t] * u[t])[:, None] * b[t][None]
            y[t] = (h * c[t][None]).sum(1) + skip * u[t]
        return y, h

    def linear(self, codes: np.ndarray, scale: float, weight: np.ndarray, to: float) -> np.ndarray:
        """int8 products, summed as integers, rescaled to int8."""
        w, w_scale = quantised(weight)
        total = codes.astype(np.int64) @ w.T.astype(np.int64)
        return even(total * (scale * w_scale / to))

    def floats(self, residual: np.ndarray, check: Check) -> None:
        x, z = np.split(self.norm(residual) @ self.folded.T.astype(np.float64), 2, axis=-1)
        u = self.convolve(x, self.p["conv1d.weight"], self.p["conv1d.bias"])
        check("conv/output", u)
        check("scan/u", u)
        shared = u @ self.p["x_proj.weight"].T
        low, b, c = np.split(shared, [self.rank, self.rank + self.states], axis=-1)
        dt = low @ self.p["dt_proj.weight"].T
        check("scan/dt", dt)
        y, state = self.scan(u, dt, b, c, weights=self.p.__getitem__)
        check("scan/state", state)
        gated = y * z / (1 + np.exp(-z))
        check("scan/output", gated)
        check("output", gated @ self.h_inner @ self.out.T)

    def codes(self, residual: np.ndarray, mode: str, check: Check) -> None:
        """Each stage from what the stage before it was seen to give."""
        s = self.scales
        taken = check("in_proj/input", even(self.norm(residual) / F32(s.in_proj_input)))
        projected = self.linear(taken, s.in_proj_input, self.folded, s.in_proj_output)
        projected = check("in_proj/output", projected)
        x, z = np.split(projected * s.in_proj_output, 2, axis=-1)
        if mode == "3":
            own = np.abs(x).max() / 127
            x = check("conv/input", even(F32(x) / F32(own))) * own
        u = self.convolved(x, mode, check)
        codes = check("x_proj/input", away(F32(u) / F32(s.x_proj_input)))
        shared = self.linear(codes, s.x_proj_input, self.p["x_proj.weight"], s.x_proj_output)
        shared = check("x_proj/output", shared)
        low, b, c = np.split(shared, [self.rank, self.rank + self.states], axis=-1)
        dt = self.linear(low, s.x_proj_output, self.p["dt_proj.weight"], s.dt_proj_output)
        dt = check("scan/dt", dt) * s.dt_proj_output
        if mode not in ("2-4", "3"):
            u = codes * s.x_proj_input
        check("scan/u", codes if mode in ("0", "2-0", "2-1", "2-3") else u)
        y, state = self.scan(
            u, dt, b * s.x_proj_output, c * s.x_proj_output, weights=self.on_int8_grid
        )
        check("scan/state", away(state / s.ssm_state))
        gated = check("scan/output", np.float16(F32(y * z / (1 + np.exp(-z)))))
        turned = away(F32(gated @ self.h_inner) / F32(s.out_proj_input))
        turned = check("out_proj/input", turned)
        w, w_scale = quantised(self.out)
        check("output", np.float16(F32(turned @ w.T * (s.out_proj_input * w_scale))))

    def convolved(self, x: np.ndarray, mode: str, check: Check) -> np.ndarray:
        """The output of convolution and SiLU as the mode stores it, checked; its values."""
        scale = self.scales.x_proj_input
        weight, bias = self.on_int8_grid("conv1d.weight"), self.on_int8_grid("conv1d.bias")
        exact = self.convolve(x, weight, bias)
        rounded = away(F32(exact) / F32(scale))
        if mode in ("0", "2-1"):
            return check("conv/output", rounded) * scale
        if mode in ("2-0", "2-2"):
            return check("conv/output", rounded * scale, grid=scale)
        return check("conv/output", exact)

    def on_int8_grid(self, name: str) -> np.ndarray:
        codes, scale = quantised(self.p[name])
        return codes * scale


class Check:
    """Compares what the reference found with what the mode showed, and returns the latter."""

    def __init__(self, seen: Any, mixer: str) -> None:
        self.seen, self.mixer = seen, mixer
        self.checked: list[str] = []

    def __call__(self, name: str, theirs: np.ndarray, grid: float = 1) -> np.ndarray:
        site, _, tensor = name.rpartition("/")
        ours = self.seen(f"{self.mixer}{'.' + site if site else ''}/forward/{tensor}")[0].numpy()
        if site in ("conv", "scan") and tensor != "state":
            ours = ours.T  # [channel, seq] there.
        if ours.dtype == np.int8 or grid != 1:
            apart = np.abs(np.rint(ours / grid) - np.rint(theirs / grid))
            # A sum of floats may fall on the other side of a tie, and then by one step.
            assert apart.max() <= 1, name
            assert (apart > 0).mean() <= 1e-3, name
        else:
            error = np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs)
            assert error <= (1e-5 if ours.dtype == np.float32 else 1e-3), (name, error)
        self.checked.append(name)
        return ours.astype(np.float64)


@pytest.mark.parametrize("layer", range(4))
def test_a_layer_agrees_with_slow_numpy(mode: str, layer: int, shown: Any, calibrated: Any) -> None:
    model, scales, _ = calibrated
    residual = shown[mode](f"layers.{layer}/forward/input")[0].double().numpy()
    reference = Reference(model, layer, scales.layers[layer])
    check = Check(shown[mode], f"layers.{layer}.mixer")
    if mode == "fp32":
        reference.floats(residual, check)
    else:
        reference.codes(residual, mode, check)
    assert {"conv/output", "scan/u", "scan/dt", "scan/state", "output"} <= set(check.checked)


@pytest.mark.parametrize(("one", "other"), [("0", "2-4"), ("2-4", "0"), ("2-4", "3"), ("3", "2-4")])
def test_the_reference_of_a_mode_does_not_agree_with_another(
    one: str, other: str, shown: Any, calibrated: Any
) -> None:
    """What agrees with everything would show nothing."""
    model, scales, _ = calibrated
    residual = shown[one]("layers.0/forward/input")[0].double().numpy()
    reference = Reference(model, 0, scales.layers[0])
    with pytest.raises(AssertionError):
        reference.codes(residual, other, Check(shown[one], "layers.0.mixer"))
