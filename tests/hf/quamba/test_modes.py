"""The modes as a whole: what must be equal, what must differ, what is recorded, what is undone."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensortap
from tensortap.errors import AlreadyAttached, CaptureError, ConfigError, NotSupported
from tensortap.records import FormatInfo
from tensortap_hf import modes, quamba
from tensortap_hf.quamba.modes import _in_codes
from tensortap_hf.quamba.scan import BLOCKED, SEQUENTIAL, Order, ScanInputs, scan
from tensortap_hf.quamba.variants import VARIANTS

LAYERS = range(4)
SAME = {frozenset(pair) for pair in (("0", "2-0"), ("2-1", "2-2"), ("2-1", "2-3"), ("2-2", "2-3"))}
PAIRS = list(combinations(("fp32", "0", "2-0", "2-1", "2-2", "2-3", "2-4", "3"), 2))

# Mode -> (dtype and grid of the convolution's output, of the scan's u), as the table has them.
TABLE = {
    "fp32": (("float32", False), ("float32", False)),
    "0": (("int8", True), ("int8", True)),
    "2-0": (("float32", True), ("int8", True)),
    "2-1": (("int8", True), ("int8", True)),
    "2-2": (("float32", True), ("float32", True)),
    "2-3": (("float32", False), ("int8", True)),
    "2-4": (("float32", False), ("float32", False)),
    "3": (("float32", False), ("float32", False)),
}
AWAY, EVEN = FormatInfo("int8", None, "nearest-away"), FormatInfo("int8", None, "nearest-even")


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def outputs(shown: Any) -> list[torch.Tensor]:
    """Layer and mixer outputs of every layer, and the logits."""
    names = [f"layers.{n}{part}/forward/output" for n in LAYERS for part in ("", ".mixer")]
    return [*(shown(name) for name in names), shown.logits]


def test_there_are_the_modes_of_the_table() -> None:
    assert set(modes.names("quamba")) == {*TABLE, "fp16", "bf16"}
    family = modes.family("quamba")
    assert family.presets["all"] == tuple(TABLE)
    assert family.presets["essential"] == ("fp32", "0", "2-1", "2-2", "2-4")
    assert family.presets["quant_only"] == tuple(TABLE)[1:]
    assert family.presets["fp_only"] == ("fp32",)


def test_every_mode_is_in_the_rotated_basis() -> None:
    assert {modes.get(name, "quamba").basis for name in modes.names("quamba")} == {"rotated"}


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_layers_are_equal_where_the_table_says_the_same_and_nowhere_else(
    one: str, other: str, shown: Any, request: pytest.FixtureRequest
) -> None:
    equal = [
        torch.equal(a, b) for a, b in zip(outputs(shown[one]), outputs(shown[other]), strict=True)
    ]
    declared = other in modes.get(one, "quamba").equals
    assert declared == (one in modes.get(other, "quamba").equals)
    if frozenset((one, other)) in SAME:
        assert declared
        assert all(equal)
    else:
        assert not declared
        if {one, other}.isdisjoint({"0", "2-0"}) or {one, other} & {"2-4", "3", "fp32"}:
            assert not any(equal)


def test_the_scans_of_the_two_groups_differ_by_rounding(shown: Any, calibrated: Any) -> None:
    model, _, _ = calibrated
    for n in LAYERS:
        prefix, mixer = f"layers.{n}.mixer.scan/forward", model.backbone.layers[n].mixer
        u, dt, b, c = (shown["0"].values(f"{prefix}/{name}").mT for name in ("u", "dt", "B", "C"))
        step = torch.nn.functional.softplus(dt + mixer.dt_proj.bias.detach())
        given = ScanInputs(u, step, -mixer.A_log.detach().exp(), b, c, mixer.D.detach())
        blocked, sequential = scan(given, BLOCKED)[0], scan(given, SEQUENTIAL)[0]
        assert 0 < relative(blocked, sequential) < 1e-5


@pytest.mark.parametrize("order", [SEQUENTIAL, BLOCKED], ids=lambda order: order.name)
def test_with_one_order_of_the_scan_five_modes_are_one(
    order: Order, calibrated: Any, seen: Any
) -> None:
    model, scales, ids = calibrated
    found = []
    for variant in VARIANTS[:5]:
        apply = _in_codes(replace(variant, order=order))
        mode = modes.Mode(variant.name, "quamba", "the row in another order", apply)
        found.append(seen(model, ids, mode, calibration=scales))
    for other in found[1:]:
        pairs = zip(outputs(found[0]), outputs(other), strict=True)
        assert all(torch.equal(one, same) for one, same in pairs)


def test_codes_of_the_two_groups_are_at_most_one_step_apart(shown: Any) -> None:
    for n in LAYERS:
        name = f"layers.{n}.mixer.out_proj/forward/input"
        apart = (shown["0"](name).int() - shown["2-1"](name).int()).abs()
        assert int(apart.max()) <= 1
        assert float((apart > 0).double().mean()) <= 1e-3


def test_quantisation_is_an_error_of_the_size_of_int8(shown: Any) -> None:
    for mode in TABLE:
        if mode != "fp32":
            assert 1e-4 < relative(shown[mode].logits, shown["fp32"].logits) < 0.2


def test_layer_0_is_given_the_same_bits_in_every_mode(shown: Any) -> None:
    given = [shown[mode]("layers.0/forward/input") for mode in TABLE]
    assert all(torch.equal(one, given[0]) for one in given)


def on_grid(values: torch.Tensor, scale: float) -> bool:
    steps = values.double().numpy() / scale
    return bool(np.abs(steps - np.round(steps)).max() < 1e-4)


def test_the_convolution_and_u_have_the_dtype_and_grid_of_the_table(mode: str, shown: Any) -> None:
    """A branch that returns early would leave the convolution's output on the grid."""
    (conv_dtype, conv_grid), (u_dtype, u_grid) = TABLE[mode]
    for n in LAYERS:
        scale = float(shown["0"](f"layers.{n}.mixer.conv/forward/output_scale"))
        for name, dtype, grid in (
            (f"layers.{n}.mixer.conv/forward/output", conv_dtype, conv_grid),
            (f"layers.{n}.mixer.scan/forward/u", u_dtype, u_grid),
        ):
            record, seen = shown[mode].record(name), shown[mode]
            assert record.dtype == dtype
            assert record.format == (AWAY if grid else None)
            assert on_grid(seen.values(name), scale) == grid
            if grid:
                assert float(seen(f"{name}_scale")) == scale
            else:
                assert not seen.sink.find(f"{name}_scale")


def test_everything_else_is_int8_in_every_quantised_mode(int8_mode: str, shown: Any) -> None:
    formats = {
        **dict.fromkeys(("scan/forward/dt", "scan/forward/B", "scan/forward/C"), EVEN),
        "scan/forward/state": AWAY,
        "conv/forward/input": EVEN,
        "out_proj/forward/input": AWAY,
        "x_proj/forward/input": AWAY,
        **{
            f"{linear}/forward/{tensor}": EVEN
            for linear in ("in_proj", "x_proj", "dt_proj")
            for tensor in ("input", "weight", "output")
            if (linear, tensor) != ("x_proj", "input")
        },
        "out_proj/forward/weight": EVEN,
    }
    for n in LAYERS:
        for name, format in formats.items():
            record = shown[int8_mode].record(f"layers.{n}.mixer.{name}")
            assert (record.dtype, record.format) == ("int8", format), name
            scale = shown[int8_mode](f"layers.{n}.mixer.{name}_scale")
            assert scale.dtype == torch.float32
            assert float(scale) > 0


def test_mixers_return_fp16_and_layers_the_residual_sum(int8_mode: str, shown: Any) -> None:
    """Two names: the mixer's output, and the layer's, which has the residual in it."""
    for n in LAYERS:
        mixer = shown[int8_mode](f"layers.{n}.mixer/forward/output")
        layer = shown[int8_mode](f"layers.{n}/forward/output")
        assert mixer.dtype == torch.float16
        assert torch.equal(layer, shown[int8_mode](f"layers.{n}/forward/input") + mixer)
        assert not torch.equal(layer, mixer.float())


def test_names_and_axes_are_those_of_an_unquantised_model(
    mode: str, shown: Any, calibrated: Any, seen: Any
) -> None:
    model, _, ids = calibrated
    plain = seen(model, ids)
    tensors = ("u", "dt", "B", "C", "output", "state")
    for name in ("conv/forward/input", "conv/forward/output", "in_proj/forward/output",
                 "x_proj/forward/output", "out_proj/forward/output",
                 *(f"scan/forward/{tensor}" for tensor in tensors)):  # fmt: skip
        ours, theirs = (one.record(f"layers.2.mixer.{name}") for one in (shown[mode], plain))
        assert (ours.shape, ours.dims) == (theirs.shape, theirs.dims), name


def test_nothing_is_missing_from_the_coverage(mode: str, shown: Any) -> None:
    assert shown[mode].sink.coverage["complete"]
    notes = {row["name"]: row["reason"] for row in shown[mode].sink.coverage["notes"]}
    assert notes["layers.0.mixer.conv1d"] == "superseded by layers.0.mixer.conv"
    assert not any("dt_proj" in name or "in_proj" in name for name in notes)


def test_the_reference_is_made_of_unquantised_weights(shown: Any, calibrated: Any) -> None:
    """Not of the int8 ones: the reference would be equal to mode 0."""
    model, _, ids = calibrated
    with modes.apply(model, "fp32", family="quamba"):
        for layer in model.backbone.layers:
            weight = layer.mixer.x_proj.weight
            assert weight.dtype == torch.float32
            assert weight.unique().numel() > 256
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    assert relative(shown["fp32"].logits, plain) < 1e-5
    assert relative(shown["0"].logits, plain) > 1e-3


def test_a_capture_of_nothing_is_an_error(calibrated: Any) -> None:
    model, scales, _ = calibrated
    with modes.apply(model, "0", family="quamba", calibration=scales):
        with pytest.raises(CaptureError):
            with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
                pass


def test_a_rotated_run_is_another_basis_until_it_is_turned_back(
    shown: Any, calibrated: Any, seen: Any
) -> None:
    model, _, ids = calibrated
    plain = seen(model, ids)
    for n in LAYERS:
        name = f"layers.{n}/forward/output"
        error = relative(quamba.unrotate(shown["0"](name)), plain(name))
        assert error < 0.1 < 1 < relative(shown["0"](name), plain(name))


def test_the_dynamic_input_of_mode_3_ends_at_its_own_maximum(shown: Any) -> None:
    for n in LAYERS:
        codes = shown["3"](f"layers.{n}.mixer.conv/forward/input")
        assert int(codes.int().abs().max()) == 127
    first = "layers.0.mixer.conv/forward/input"
    static, dynamic = (float(shown[mode](f"{first}_scale")) for mode in ("2-4", "3"))
    absmax = float(shown["2-4"].values(first).abs().max())
    assert dynamic == pytest.approx(absmax / 127, rel=1e-6)
    assert dynamic < static


@pytest.mark.parametrize("name", [*TABLE, "fp16", "bf16"])
def test_undo_leaves_the_very_parameters_that_were_there(name: str, calibrated: Any) -> None:
    model, scales, ids = calibrated
    before = {key: (p, p.detach().clone()) for key, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids).logits
    with modes.apply(model, name, family="quamba", calibration=scales), torch.no_grad():
        assert not torch.equal(model(ids).logits, logits)
        assert model.lm_head.weight is not model.backbone.embeddings.weight
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[key] is p and torch.equal(p, copy) for key, (p, copy) in before.items())
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.lm_head.weight is model.backbone.embeddings.weight
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_a_mode_that_fails_half_way_is_undone(
    calibrated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, scales, _ = calibrated
    before = dict(model.named_parameters())

    def broken(*args: Any) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr("tensortap_hf.quamba.modes.CodesForward", broken)
    with pytest.raises(RuntimeError, match="half-way"):
        modes.apply(model, "0", family="quamba", calibration=scales)
    after = dict(model.named_parameters())
    assert all(after[key] is parameter for key, parameter in before.items())


def test_modes_do_not_add_up(calibrated: Any) -> None:
    model, scales, _ = calibrated
    with modes.apply(model, "0", family="quamba", calibration=scales):
        with pytest.raises(AlreadyAttached):
            modes.apply(model, "2-1", family="quamba", calibration=scales)


def test_samples_will_do_for_scales(mamba: Any, samples: Any, seen: Any) -> None:
    model, ids = mamba(), samples(20, 30)
    scales = quamba.calibrate(model, ids)
    one = seen(model, ids[0], "0", calibration=ids)
    assert torch.equal(one.logits, seen(model, ids[0], "0", calibration=scales).logits)


def test_a_checkpoint_in_half_precision_has_a_float32_reference(
    mamba: Any, samples: Any, seen: Any
) -> None:
    model, [ids] = mamba().bfloat16(), samples(20)
    with modes.apply(model, "fp32", family="quamba"):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    same = seen(mamba().bfloat16().float(), ids, "fp32")
    assert torch.equal(seen(model, ids, "fp32").logits, same.logits)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_modes_are_near_the_reference(
    name: str, dtype: torch.dtype, calibrated: Any, shown: Any, seen: Any
) -> None:
    model, _, ids = calibrated
    found = seen(model, ids, name)
    assert found("layers.1.mixer/forward/output").dtype == dtype
    assert 0 < relative(found.logits, shown["fp32"].logits) < 2e-2


def test_an_excluded_mixer_stays_in_float32(calibrated: Any, seen: Any, shown: Any) -> None:
    model, scales, ids = calibrated
    found = seen(model, ids, "0", calibration=scales, exclude="layers.0.*")
    assert found.record("layers.0.mixer.scan/forward/u").dtype == "float32"
    assert found.record("layers.1.mixer.scan/forward/u").dtype == "int8"
    output = "layers.0/forward/output"
    assert torch.equal(found(output), shown["fp32"](output))


def test_an_exclusion_of_no_mixer_is_an_error(calibrated: Any) -> None:
    model, scales, _ = calibrated
    for wrong in ("layers.9.*", "layers.0.mixer.in_proj"):
        with pytest.raises(ConfigError, match="whole mixers"):
            modes.apply(model, "0", family="quamba", calibration=scales, exclude=wrong)


def test_backward_is_refused_with_the_reason(mode: str, calibrated: Any) -> None:
    model, scales, ids = calibrated
    with modes.apply(model, mode, family="quamba", calibration=scales):
        loss = model(ids, labels=ids).loss
        with pytest.raises(NotSupported, match="no backward"):
            loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_run_says_its_mode_its_basis_and_what_was_changed(calibrated: Any) -> None:
    model, scales, ids = calibrated
    sink = tensortap.MemorySink()
    with modes.apply(model, "2-1", family="quamba", calibration=scales):
        with tensortap.attach(model, sink, on_error="raise"), torch.no_grad():
            model(ids)
    assert sink.run is not None
    assert (sink.run.mode, sink.run.format) == ("2-1", "int8")
    said = sink.run.metadata["mode"]
    assert (said["family"], said["basis"], said["equals"]) == ("quamba", "rotated", ["2-2", "2-3"])
    assert "layers.3.mixer" in said["changed"]
    assert "not quantised" in said["kept"]["lm_head"]


def test_tapping_a_mode_changes_no_bit(mode: str, calibrated: Any, shown: Any) -> None:
    model, scales, ids = calibrated
    with modes.apply(model, mode, family="quamba", calibration=scales), torch.no_grad():
        untapped = model(ids, use_cache=False).logits
    assert torch.equal(untapped, shown[mode].logits)


def test_a_forward_that_records_gradients_is_captured_as_well(calibrated: Any, shown: Any) -> None:
    model, scales, ids = calibrated
    sink = tensortap.MemorySink()
    with modes.apply(model, "0", family="quamba", calibration=scales):
        with tensortap.attach(model, sink, values="full", on_error="raise"):
            logits = model(ids, use_cache=False).logits
    assert logits.requires_grad
    assert torch.equal(logits.detach(), shown["0"].logits)
    [(_, u)] = sink.find("layers.3.mixer.scan/forward/u")
    assert torch.equal(u, shown["0"]("layers.3.mixer.scan/forward/u"))


def test_parameters_are_recorded_as_the_codes_they_are(calibrated: Any, shown: Any) -> None:
    for name in ("in_proj/param/weight", "conv1d/param/weight", "dt_proj/param/bias"):
        assert shown["0"].record(f"layers.0.mixer.{name}").dtype == "int8"
        assert shown["fp32"].record(f"layers.0.mixer.{name}").dtype == "float32"
    weight = shown["0"]("layers.0.mixer.in_proj/param/weight")
    assert torch.equal(weight, shown["0"]("layers.0.mixer.in_proj/forward/weight"))


def test_codes_of_a_run_are_read_as_the_numbers_they_stand_for(
    calibrated: Any, shown: Any, tmp_path: Path
) -> None:
    model, scales, ids = calibrated
    for mode in ("2-1", "2-2"):
        with modes.apply(model, mode, family="quamba", calibration=scales), torch.no_grad():
            with tensortap.attach(model, tmp_path / mode, select="*.mixer.*", values="full"):
                model(ids, use_cache=False)
    name = "layers.1.mixer.scan/forward/u"
    with tensortap.open_run(tmp_path / "2-1") as run, tensortap.open_run(tmp_path / "2-2") as same:
        assert run.tensor(name).dtype == torch.int8
        assert same.tensor(name).dtype == torch.float32
        assert torch.equal(quamba.values(run, name), quamba.values(same, name))
        assert torch.equal(quamba.values(run, name, step=0), shown["2-1"].values(name))


@pytest.mark.parametrize("name", ["fp32", "2-1"])
def test_a_model_in_a_mode_is_not_copied(name: str, calibrated: Any) -> None:
    """A copy would compute in the mode and not know of it."""
    model, scales, _ = calibrated
    with (
        modes.apply(model, name, family="quamba", calibration=scales),
        pytest.raises(NotSupported, match="cannot be copied"),
    ):
        copy.deepcopy(model)
    copy.deepcopy(model)
