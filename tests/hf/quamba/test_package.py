"""The int8 model of the package quamba, which needs a GPU: here its outline, on the CPU.

The fakes have the classes' attributes and call each other as W8A8QMamba, QCausalConv1D, QSScan,
W8A8B8O8Linear and mamba_ssm's Block do (github.com/enyac-group/Quamba: quamba/qMambaLayer.py,
qConvLayer.py, qSelectiveScan.py, qLinearLayer.py; github.com/state-spaces/mamba: block.py).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tensortap
from tensortap import discovery
from tensortap_hf import modes, quamba_model

HIDDEN, CHANNELS, STATES, RANK = 8, 16, 4, 2


def codes(x: torch.Tensor) -> torch.Tensor:
    return x.round().clamp(-128, 127).to(torch.int8)


class FakeLinear(nn.Module):
    """W8A8B8O8Linear: [batch, seq, in] to int8, also with the sequence last."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.register_buffer("weight", codes(torch.randn(inside, outside) * 40))

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return codes(x.float() @ self.weight.float() / 100)

    @torch.no_grad()
    def to_seqlen_last(self, x: torch.Tensor) -> torch.Tensor:
        return codes(self.weight.float().T @ x.float().transpose(1, 2) / 100)


class FakeConv(nn.Module):
    """QCausalConv1D: codes in, codes out; `update` shifts the state in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", codes(torch.randn(CHANNELS, 4) * 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = nn.functional.pad(x.float(), (3, 0))
        kernel = self.weight.float()[:, None]
        return codes(nn.functional.conv1d(padded, kernel, groups=CHANNELS) / 80)

    def update(self, x: torch.Tensor, conv_state: torch.Tensor) -> torch.Tensor:
        conv_state.copy_(torch.cat([conv_state[..., 1:], x[..., None]], dim=-1))
        return codes((conv_state.float() * self.weight.float()).sum(-1) / 80)


class FakeScan(nn.Module):
    """QSScan: fp16 [batch, seq, channel] from codes [batch, channel, seq]; an int8 state."""

    def __init__(self) -> None:
        super().__init__()
        for at, name in enumerate(("u", "dt", "B", "C", "z", "ssm_state")):
            self.register_buffer(f"{name}_scale", torch.tensor(0.01 * (at + 1)))

    def forward(
        self, u: Any, dt: Any, B: Any, C: Any, z: Any = None, return_last_state: bool = False
    ) -> Any:
        gate = (B.float() * C.float()).sum(1, keepdim=True) / 1000
        y = (u.float() * 0.01 + dt.float() * 0.02 * gate) * z.float() * 0.05
        state = codes(u[..., -1:].float() * B[:, None, :, -1].float() / 100)
        y = y.half().transpose(1, 2)
        return (y, state) if return_last_state else y

    def update(self, ssm_state: Any, u: Any, dt: Any, B: Any, C: Any, z: Any = None) -> Any:
        ssm_state.copy_(codes(u[..., None].float() * B[:, None].float() / 100))
        y = (u.float() + dt.float() * (B.float() * C.float()).sum(1, keepdim=True)) * z.float()
        return (y / 1000).half(), ssm_state


class FakeHadamard(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return codes(x.float() * 10)


class FakeOut(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ torch.ones(CHANNELS, HIDDEN) / 500).half()


class FakeMixer(nn.Module):
    """W8A8QMamba: `forward` and, with one token and a cache, `step`."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = FakeLinear(HIDDEN, 2 * CHANNELS)
        self.conv1d = FakeConv()
        self.act = nn.SiLU()
        self.x_proj = FakeLinear(CHANNELS, RANK + 2 * STATES)
        self.dt_proj = FakeLinear(RANK, CHANNELS)
        self.selective_scan = FakeScan()
        self.had = FakeHadamard()
        self.out_proj = FakeOut()

    def forward(self, hidden_states: torch.Tensor, inference_params: Any = None) -> torch.Tensor:
        if inference_params:
            return self.step(hidden_states, *inference_params)
        x, z = self.in_proj.to_seqlen_last(hidden_states).chunk(2, dim=1)
        x = self.conv1d.forward(x)
        dt, b, c = torch.split(self.x_proj(x.transpose(1, 2)), [RANK, STATES, STATES], dim=-1)
        dt = self.dt_proj.to_seqlen_last(dt.contiguous())
        b, c = b.transpose(1, 2), c.transpose(1, 2)
        want = inference_params is not None
        y = self.selective_scan.forward(x, dt, b, c, z=z, return_last_state=want)
        if want:
            y, last = y
            inference_params += [torch.zeros(*x.shape[:2], 4, dtype=torch.int8), last]
        return self.out_proj(self.had(y))

    def step(self, hidden: torch.Tensor, conv_state: Any, ssm_state: Any) -> torch.Tensor:
        x, z = self.in_proj(hidden.squeeze(1)).chunk(2, dim=-1)
        x = self.conv1d.update(x, conv_state)
        dt, b, c = torch.split(self.x_proj(x), [RANK, STATES, STATES], dim=-1)
        y, _ = self.selective_scan.update(ssm_state, x, self.dt_proj(dt), b, c, z=z)
        return self.out_proj(self.had(y)).unsqueeze(1)


class FakeNorm(nn.Module):
    """QRMSNorm: int8 of the sum of what it is given, and that sum."""

    def forward(self, x: torch.Tensor, residual: Any = None, prenorm: bool = False) -> Any:
        total = x.float() if residual is None else x.float() + residual
        return (codes(total * 20), total) if prenorm else codes(total * 20)


class FakeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = FakeNorm()
        self.mixer = FakeMixer()

    def forward(
        self, hidden_states: Any, residual: Any = None, inference_params: Any = None
    ) -> Any:
        hidden, residual = self.norm(hidden_states, residual=residual, prenorm=True)
        return self.mixer(hidden, inference_params=inference_params), residual


class FakeBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, HIDDEN)
        self.layers = nn.ModuleList(FakeBlock() for _ in range(2))
        self.norm_f = FakeNorm()

    def forward(self, ids: torch.Tensor, caches: Any) -> torch.Tensor:
        hidden, residual = self.embedding(ids), None
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, residual = layer(hidden, residual, inference_params=cache)
        return self.norm_f(hidden, residual=residual)


class FakeQuamba(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = type("QuambaConfig", (), {})()
        self.config.d_model, self.config.n_layer = HIDDEN, 2
        self.backbone = FakeBackbone()
        self.lm_head = nn.Linear(HIDDEN, 20)

    def forward(self, input_ids: torch.Tensor, caches: Any = (None, None)) -> torch.Tensor:
        return self.lm_head(self.backbone(input_ids, caches).float())


FakeQuamba.__name__ = "QuambaLMHeadModel"
IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture
def model() -> Any:
    return FakeQuamba().eval()


def tapped(model: Any, *args: Any, **options: Any) -> tuple[tensortap.MemorySink, torch.Tensor]:
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise", **options), torch.no_grad():
        return sink, model(*args)


def payload(sink: tensortap.MemorySink, name: str, index: int = 0) -> torch.Tensor:
    found = sink.find(name)[index][1]
    assert found is not None
    return found


def test_the_model_is_recognised_and_named(model: Any) -> None:
    assert discovery.discover(model, None).name == "hf"
    sink, _ = tapped(model, IDS)
    names = set(sink.names())
    for part in ("in_proj", "x_proj", "dt_proj", "conv"):
        for tensor in ("input", "output", "output_scale"):
            assert f"layers.1.mixer.{part}/forward/{tensor}" in names
    for tensor in ("u", "dt", "B", "C", "output", "state", "u_scale", "state_scale"):
        assert f"layers.1.mixer.scan/forward/{tensor}" in names
    assert {"embed/forward/output", "final_norm/forward/input", "lm_head/forward/output",
            "layers.0.mixer.out_proj/forward/input",
            "layers.1.norm/forward/output"} <= names  # fmt: skip
    assert sink.coverage is not None
    assert sink.coverage["complete"]


def test_codes_have_their_format_and_scale(model: Any) -> None:
    sink, _ = tapped(model, IDS)
    scan = model.backbone.layers[0].mixer.selective_scan
    for name, scale in (("scan/forward/u", scan.u_scale), ("scan/forward/dt", scan.dt_scale),
                        ("scan/forward/state", scan.ssm_state_scale),
                        ("conv/forward/output", scan.u_scale),
                        ("in_proj/forward/output", scan.z_scale),
                        ("x_proj/forward/output", scan.B_scale)):  # fmt: skip
        [(record, _)] = sink.find(f"layers.0.mixer.{name}")
        assert record.dtype == "int8"
        assert record.format is not None
        assert record.format.name == "int8"
        assert torch.equal(payload(sink, f"layers.0.mixer.{name}_scale"), scale)
    [(record, _)] = sink.find("layers.0.mixer.scan/forward/output")
    assert (record.dtype, record.format) == ("float16", None)


def test_tensors_have_the_axes_of_the_emulated_modes(model: Any) -> None:
    sink, _ = tapped(model, IDS)
    shapes = {str(record.name): record.shape for record in sink.records}
    assert shapes["layers.0.mixer.in_proj/forward/output"] == (1, 5, 2 * CHANNELS)
    assert shapes["layers.0.mixer.scan/forward/u"] == (1, CHANNELS, 5)
    assert shapes["layers.0.mixer.scan/forward/output"] == (1, CHANNELS, 5)
    assert shapes["layers.0.mixer.scan/forward/B"] == (1, STATES, 5)
    assert shapes["layers.0.mixer.scan/forward/state"] == (1, CHANNELS, STATES)


def test_a_layer_is_the_residual_sum_and_the_mixer_without_it(model: Any) -> None:
    sink, _ = tapped(model, IDS)
    embedded = payload(sink, "embed/forward/output")
    first, second = (payload(sink, f"layers.{n}.mixer/forward/output").float() for n in (0, 1))
    assert torch.equal(payload(sink, "layers.0/forward/input"), embedded)
    assert torch.equal(payload(sink, "layers.0/forward/output"), embedded + first)
    assert torch.equal(payload(sink, "layers.1/forward/input"), embedded + first)
    assert torch.equal(payload(sink, "layers.1/forward/output"), embedded + first + second)


def test_tapping_changes_no_bit_and_leaves_no_trace(model: Any) -> None:
    with torch.no_grad():
        plain = model(IDS)
    before = [dict(vars(module)) for module in model.modules()]
    _, logits = tapped(model, IDS)
    assert torch.equal(logits, plain)
    after = [dict(vars(module)) for module in model.modules()]
    assert [set(a) for a in after] == [set(b) for b in before]
    assert not any("forward" in names or "update" in names for names in after)


def test_a_step_of_decoding_is_seen(model: Any) -> None:
    caches: Any = ([], [])
    with torch.no_grad():
        model(IDS, caches)
    sink, _ = tapped(model, IDS[:, -1:], caches)
    assert payload(sink, "layers.0.mixer.scan/forward/u").shape == (1, CHANNELS)
    assert torch.equal(payload(sink, "layers.0.mixer.scan/forward/state"), caches[0][1])
    assert payload(sink, "layers.0.mixer.conv/forward/output").shape == (1, CHANNELS)


def test_a_cache_gets_the_state_it_asked_for(model: Any) -> None:
    plain, seen = ([], []), ([], [])
    with torch.no_grad():
        model(IDS, plain)
    tapped(model, IDS, seen)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, seen, strict=True))


def test_a_copy_of_a_tapped_model_is_not_tapped(model: Any) -> None:
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"), torch.no_grad():
        twin = copy.deepcopy(model)
        twin(IDS)
        assert not sink.records
        model(IDS)
    assert sink.records


def test_only_what_is_selected_is_watched(model: Any) -> None:
    sink, _ = tapped(model, IDS, select="layers.0.mixer.scan/*")
    assert {record.name.module for record in sink.records} == {"layers.0.mixer.scan"}


def test_the_run_says_that_it_is_int8_and_rotated(model: Any) -> None:
    with modes.apply(model, "loaded"):
        sink, _ = tapped(model, IDS)
    assert sink.run is not None
    assert sink.run.format == "int8"
    assert sink.run.metadata["mode"]["basis"] == "rotated"
    assert sink.run.model_config["n_layer"] == 2


def test_mixers_without_int8_activations_have_only_their_modules(model: Any) -> None:
    for layer in model.backbone.layers:
        layer.mixer.selective_scan = nn.Identity()
    assert all(site.kind == "module" or site.native.endswith(":sum")
               for site in quamba_model.sites(model))  # fmt: skip
