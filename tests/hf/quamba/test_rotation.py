"""Folding and rotation: the logits stay, the residual stream turns, and turns back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tensortap.errors import NotSupported
from tensortap_hf import modes, quamba
from tensortap_hf.quamba import hadamard, parts

RESIDUAL = ("embed/forward/output", "layers.0/forward/input", "layers.0.norm/forward/input",
            "layers.1/forward/output", "layers.1.mixer/forward/output",
            "final_norm/forward/input")  # fmt: skip
CHANNELS = ("layers.1.mixer.in_proj/forward/output", "layers.1.mixer.conv/forward/output",
            "layers.1.mixer.x_proj/forward/output", "layers.1.mixer.scan/forward/dt",
            "layers.1.mixer.scan/forward/B", "layers.1.mixer.scan/forward/output",
            "layers.1.mixer.scan/forward/state")  # fmt: skip


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


@pytest.mark.parametrize("hidden", [16, 24, 48, 80])
def test_rotation_and_folding_change_the_logits_by_rounding_alone(
    hidden: int, mamba: Any, samples: Any, seen: Any
) -> None:
    model, [ids] = mamba(hidden, layers=4), samples(60)
    plain, turned = seen(model, ids), seen(model, ids, "fp32")
    assert 0 < relative(turned.logits, plain.logits) <= 1e-5


def test_an_untied_output_layer_is_rotated_too(mamba: Any, samples: Any, seen: Any) -> None:
    model, [ids] = mamba(tie_word_embeddings=False), samples(30)
    assert model.lm_head.weight is not model.backbone.embeddings.weight
    plain, turned = seen(model, ids), seen(model, ids, "fp32")
    assert relative(turned.logits, plain.logits) <= 1e-5


def test_the_weights_are_those_of_the_equations(mamba: Any) -> None:
    model = mamba()
    layer, backbone = model.backbone.layers[1], model.backbone
    before = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    h, h_inner = (hadamard.matrix(n).numpy() for n in (24, 48))
    norm, mixer = "backbone.layers.1.norm.weight", "backbone.layers.1.mixer"
    expected = {
        backbone.embeddings: before["backbone.embeddings.weight"] @ h,
        layer.mixer.in_proj: before[f"{mixer}.in_proj.weight"] @ np.diag(before[norm]) @ h,
        layer.mixer.out_proj: h.T @ before[f"{mixer}.out_proj.weight"] @ h_inner,
        layer.norm: np.ones(24),
        backbone.norm_f: np.ones(24),
        model.lm_head: before["backbone.embeddings.weight"]
        @ np.diag(before["backbone.norm_f.weight"])
        @ h,
    }
    with modes.apply(model, "fp32", family="quamba"):
        for module, weight in expected.items():
            np.testing.assert_array_equal(module.weight.detach().numpy(), np.float32(weight))


@pytest.mark.parametrize("name", RESIDUAL)
def test_the_residual_stream_turned_back_is_that_of_the_model(
    name: str, mamba: Any, samples: Any, seen: Any
) -> None:
    model, [ids] = mamba(), samples(30)
    plain, turned = seen(model, ids)(name), seen(model, ids, "fp32")(name)
    assert quamba.is_residual(name)
    assert relative(turned, plain) > 0.1
    assert relative(quamba.unrotate(turned), plain) < 1e-5


@pytest.mark.parametrize("name", CHANNELS)
def test_channels_are_in_no_basis(name: str, mamba: Any, samples: Any, seen: Any) -> None:
    model, [ids] = mamba(), samples(30)
    plain, turned = seen(model, ids)(name), seen(model, ids, "fp32")(name)
    assert not quamba.is_residual(name)
    assert relative(turned, plain) < 1e-5


def test_what_is_turned_back_has_the_dtype_it_can(mamba: Any) -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert quamba.unrotate(torch.ones(2, 24, dtype=dtype)).dtype == expected


def test_names_that_only_look_like_the_residual_stream_are_not(mamba: Any) -> None:
    for name in ("layers.1.norm/forward/output", "layers.1.mixer/forward/input",
                 "layers.1.mixer.out_proj/forward/input", "lm_head/forward/output",
                 "layers.1/backward/grad_output", "embed/forward/input"):  # fmt: skip
        assert not quamba.is_residual(name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 20}, "not of 20"),
        ({"use_bias": True}, "use_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_a_mamba_that_quamba_cannot_serve_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, mamba: Any
) -> None:
    model = mamba(**changes)
    assert reason in (parts.refusal(model) or "")
    with pytest.raises(NotSupported, match=reason):
        quamba.calibrate(model, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("mamba2", "groups"), ("falcon_mamba", "norms of dt"), ("llama", "MambaForCausalLM")],
)
def test_other_families_are_refused_with_the_reason(kind: str, reason: str, build: Any) -> None:
    assert reason in (parts.refusal(build(kind)) or "")
