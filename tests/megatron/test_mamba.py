"""Mamba and hybrid models of Megatron-core, on faithful fakes of the kernels they import."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.megatron import fake_mamba_ssm as fake
from tests.megatron import launching
from tests.megatron.test_parallel import moments, names, require_equal

import tensortap
from tensortap_megatron import parameters
from tensortap_megatron.facts import Facts
from tensortap_megatron.naming import Named
from tensortap_megatron.parallel import Group, Parallel

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.xdist_group("megatron-mamba")

INNER, STATE, HEADS, GROUPS = 64, 8, 8, 2
AT = {"step": 0, "microbatch": 1}


class Launches(launching.Launches):
    """Runs of the step of `spread.py` with a hybrid Mamba model."""

    def __call__(self, processes: int, *, fails: bool = False, **options: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launching, "SCRIPT", Path(fake.__file__))
            return super().__call__(processes, fails=fails, **{"kind": "hybrid", **options})


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory)


def test_a_hybrid_model_has_canonical_names(launch: Launches) -> None:
    run = tensortap.open_run(launch(1) / "run")
    found = set(run.names())
    for layer in (0, 3):  # The pattern is M*-M.
        for word in ("norm", "mixer", "mixer.in_proj", "mixer.norm", "mixer.out_proj"):
            for tensor in ("forward/input", "forward/output", "backward/grad_output"):
                assert f"layers.{layer}.{word}/{tensor}" in found
        for word in (
            "in_proj/param/weight",
            "conv/param/weight",
            "conv/grad/bias",
            "norm/grad/weight",
        ):
            assert f"layers.{layer}.mixer.{word}" in found
        for word in ("A_log", "D", "dt_bias"):
            assert f"layers.{layer}.mixer/grad/{word}" in found
    assert "layers.1.attn.core/forward/query" in found
    assert "layers.1.input_norm/forward/output" in found
    assert "layers.2.mlp.gate_up/forward/output" in found
    assert not [name for name in found if re.match(r"layers\.1\.mlp|layers\.2\.attn", name)]
    for word in ("embed", "final_norm", "lm_head"):
        assert f"{word}/forward/output" in found


def test_two_tensor_parallel_ranks_assemble_to_the_model_in_one_process(launch: Launches) -> None:
    assert require_equal(launch(1), launch(2, tp=2, sequence_parallel=True)) > 400


def test_layers_of_a_second_stage_have_global_numbers_of_every_kind(launch: Launches) -> None:
    """Megatron adds the offset of a stage itself for Mamba layers, inside of all others."""
    alone, piped = launch(1), launch(2, pp=2)
    assert require_equal(alone, piped) > 400
    run = tensortap.open_run(piped / "run")
    ranks = {word: {r.at.rank for r in run.records(f"layers.{word}")} for word in "0123"}
    assert ranks == {"0": {0}, "1": {0}, "2": {1}, "3": {1}}


def test_parameters_of_a_mixer_are_whole_tensors_of_their_heads(launch: Launches) -> None:
    run = tensortap.open_run(launch(2, tp=2, sequence_parallel=True) / "run")
    shapes = {
        "mixer.in_proj/param/weight": (2 * INNER + 2 * GROUPS * STATE + HEADS, 32),
        "mixer.conv/param/weight": (INNER + 2 * GROUPS * STATE, 1, 4),
        "mixer.conv/param/bias": (INNER + 2 * GROUPS * STATE,),
        "mixer/param/A_log": (HEADS,),
        "mixer/param/D": (HEADS,),
        "mixer/param/dt_bias": (HEADS,),
        "mixer.norm/param/weight": (INNER,),
        "mixer.out_proj/param/weight": (32, INNER),
    }
    for name, shape in shapes.items():
        assert run.tensor(f"layers.0.{name}", step=0).shape == shape


def test_the_projection_of_all_ranks_is_z_x_b_c_and_dt_in_order(launch: Launches) -> None:
    """From the assembled tensors alone, numpy computes what the next layer was given."""
    run = tensortap.open_run(launch(2, tp=2, sequence_parallel=True) / "run")

    def get(name: str, **at: int) -> Any:
        return run.tensor(f"layers.0.{name}", **at).double().numpy()

    sizes = np.cumsum([INNER, INNER, GROUPS * STATE, GROUPS * STATE])
    z, *xbc, dt = np.split(get("mixer.in_proj/forward/output", **AT), sizes, axis=-1)
    mixed = np.concatenate(xbc, -1)
    padded = np.concatenate([np.zeros((3, *mixed.shape[1:])), mixed])
    weight = get("mixer.conv/param/weight", step=0)[:, 0]
    taps = [padded[k : k + len(mixed)] * weight[:, k] for k in range(4)]
    x, b, c = np.split(
        _silu(sum(taps) + get("mixer.conv/param/bias", step=0)), sizes[1:3] - INNER, -1
    )
    dt = np.log1p(np.exp(dt + get("mixer/param/dt_bias", step=0)))
    a = -np.exp(get("mixer/param/A_log", step=0))
    y = _scan(x, dt, a, b, c, get("mixer/param/D", step=0)) * _silu(z)
    given = get("mixer.norm/forward/input", **AT)
    np.testing.assert_allclose(given, y, rtol=1e-4, atol=1e-5 * np.abs(y).max())


def _silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def _scan(x: Any, dt: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The recurrence of Mamba-2, head by head: [seq, batch, …]."""
    out = np.zeros_like(x)
    width = INNER // HEADS
    for head in range(HEADS):
        group = slice(STATE * (head * GROUPS // HEADS), STATE * (head * GROUPS // HEADS + 1))
        own = slice(width * head, width * (head + 1))
        state = np.zeros((x.shape[1], width, STATE))
        for t in range(len(x)):
            write = x[t, :, own, None] * b[t, :, None, group] * dt[t, :, head, None, None]
            state = state * np.exp(dt[t, :, head] * a[head])[:, None, None] + write
            read = (state * c[t, :, None, group]).sum(-1)
            out[t, :, own] = read + d[head] * x[t, :, own]
    return out


@pytest.mark.parametrize("marked", [True, False], ids=["0.16", "before"])
def test_the_gated_norm_is_split_whether_megatron_marks_it_or_not(marked: bool) -> None:
    """Before 0.16 its weight has no attribute `tensor_model_parallel`."""
    norm = fake.FakeRMSNormGated(INNER // 2)
    if marked:
        norm.weight.tensor_model_parallel = True
    named = Named("layers.0.mixer.norm", "decoder.layers.0.mixer.norm", norm)
    facts = Facts(None, Parallel({"tp": Group(2, 1)}), None, True, True, False)
    placed = parameters.plans(named, facts)["weight"].place(norm.weight, gradient=True)
    assert placed is not None
    assert placed.logical_shape == (INNER,)
    assert placed.segments == {0: ((INNER // 2, INNER // 2),)}
    assert placed.partial == ()


def test_what_the_fused_kernel_hides_is_said(launch: Launches) -> None:
    coverage = tensortap.open_run(launch(1) / "run").coverage()
    said = {note["name"]: note["reason"] for note in coverage["notes"]}
    for word in ("scan", "conv", "act"):
        assert "one kernel" in said[f"layers.3.mixer.{word}"]
    assert coverage["gaps"] == []


def test_a_mixer_that_was_asked_for_has_no_gap_for_its_fused_parts(launch: Launches) -> None:
    only = launch(1, attach={"select": "layers.*.mixer.*"})
    coverage = tensortap.open_run(only / "run").coverage()
    assert coverage["gaps"] == []
    assert "layers.0.mixer.conv" in {note["name"] for note in coverage["notes"]}


def test_with_transformer_engine_the_norm_keeps_its_name(launch: Launches) -> None:
    own, engine = (tensortap.open_run(launch(1, kind=k) / "run") for k in ("hybrid", "engine"))
    left, right = set(names(own)), set(names(engine))
    assert not right - left
    assert {name for name in right if name.startswith("layers.0.norm/")} == {
        f"layers.0.norm/{t}"
        for t in ("forward/input", "backward/grad_input", "param/weight", "grad/weight")
    }
    assert "layers.0.mixer/forward/input" not in right
    for name in sorted(left & right):
        for moment in moments(own, name):
            a, b = (run.tensor(name, **moment).double() for run in (own, engine))
            assert (a - b).abs().max() <= 1e-5 * (a.abs().max() or 1.0), name


def test_the_fake_scan_is_the_convolution_of_the_whole_kernel() -> None:
    """One head, constant decay: the recurrence is a matrix that numpy can write down."""
    torch.manual_seed(0)
    x, dt = torch.randn(1, 6, 1, 3), torch.rand(1, 6, 1) + 0.1
    b, c = torch.randn(1, 6, 1, 4), torch.randn(1, 6, 1, 4)
    found = fake.fake_scan(x, dt, torch.tensor([-0.7]), b, c, 4, D=torch.tensor([0.5]))
    sums = np.cumsum(dt[0, :, 0].double().numpy())
    decay = np.tril(np.exp(-0.7 * (sums[:, None] - sums[None])))
    scores = c[0, :, 0].double().numpy() @ b[0, :, 0].double().numpy().T
    matrix = decay * scores * dt[0, :, 0].double().numpy()
    expected = (matrix + 0.5 * np.eye(6)) @ x[0, :, 0].double().numpy()
    np.testing.assert_allclose(found[0, :, 0], expected, rtol=1e-5, atol=1e-5)
