"""`tensortap modes compare`: modes against a reference, with numbers checked by numpy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.hf.modes.conftest import LLAMA, MAMBA, shifting

import tensortap
from tensortap_analysis import Comparison

Cli = Callable[..., tuple[int, str, str]]
Shape = Callable[[dict[str, Any]], Path]


@pytest.fixture
def captured(cli: Cli, shape: Shape, tmp_path: Path) -> Callable[..., Path]:
    """Capture a shape in some modes; returns the folder of runs."""

    def run(modes: str, fields: dict[str, Any] = MAMBA, *options: object, code: int = 0) -> Path:
        out = tmp_path / "runs"
        got, _, errors = cli(
            "modes", "capture", "--random-init", shape(fields), "--modes", modes, "--samples", 2,
            "--seq-len", 9, "--calib-samples", 2, "--calib-seq-len", 9, "--out", out, *options,
        )  # fmt: skip
        assert got == code, errors
        return out

    return run


def values(run: Path, name: str) -> np.ndarray:
    """All samples of a tensor, in float64."""
    with tensortap.open_run(run) as opened:
        found = [opened.tensor(name, step=step).double().numpy() for step in opened.steps]
    return np.concatenate([sample.reshape(-1, sample.shape[-1]) for sample in found])


def test_every_mode_is_compared_with_fp32_over_all_samples(
    cli: Cli, captured: Callable[..., Path]
) -> None:
    out = captured("fp32,0,2-4")
    code, printed, _ = cli("modes", "compare", out, "--json")
    assert code == 0
    report = json.loads(printed)
    assert [(one["mode"], one["reference"]) for one in report["comparisons"]] == [
        ("0", "fp32"), ("2-4", "fp32"),
    ]  # fmt: skip
    for one in report["comparisons"]:
        for kind, name in (("layer", "layers.{}"), ("mixer", "layers.{}.mixer")):
            correlations = []
            for word, layer in (("first", 0), ("last", 1)):
                tensor = name.format(layer) + "/forward/output"
                ref, got = values(out / "fp32", tensor), values(out / one["mode"], tensor)
                row = one[kind]
                assert row[f"{word}_mse"] == pytest.approx(np.mean((got - ref) ** 2), rel=1e-9)
                assert row[f"{word}_mae"] == pytest.approx(np.mean(abs(got - ref)), rel=1e-9)
                correlations.append(np.corrcoef(ref.ravel(), got.ravel())[0, 1])
            assert row["mean_correlation"] == pytest.approx(np.mean(correlations), rel=1e-9)
    assert report["first_inputs"]["equal"] == [["fp32", "0", "2-4"]]


def test_details_of_each_layer_and_a_summary_are_printed(
    cli: Cli, captured: Callable[..., Path]
) -> None:
    out = captured("fp32,2-1,2-4")
    code, printed, _ = cli("modes", "compare", out)
    assert code == 0
    for word in (
        "2-1 against fp32", "layers.0/forward/input [18, 32] (2 samples together)",
        "layers.1.mixer/forward/output", "reference   mean", "range [", "difference  mean",
        "|d|", "50%:", "90%:", "95%:", "99%:", "RMSE", "relative MSE", "%)", "correlation",
        "layer outputs (with residual)", "mixer outputs", "first MSE", "mean correlation",
        "layers.0/forward/input is bitwise equal in all 3 modes",
    ):  # fmt: skip
        assert word in printed, word


def test_a_comparison_is_kept_and_can_be_judged_again(
    cli: Cli, captured: Callable[..., Path]
) -> None:
    out = captured("fp32,2-1")
    assert cli("modes", "compare", out)[0] == 0
    saved = Comparison.load(out / "comparisons" / "2-1-vs-fp32.json")
    pair = next(p for p in saved.runs[0].pairs if p.name == "layers.1/forward/output")
    ref, got = (values(out / m, pair.name) for m in ("fp32", "2-1"))
    d = got - ref
    m = pair.metrics
    assert m.rmse == pytest.approx(np.sqrt(np.mean(d**2)))
    assert m.relative_mse == pytest.approx(np.mean(d**2) / (np.mean(ref**2) + 1e-8))
    assert m.relative_mae == pytest.approx(np.mean(abs(d)) / (np.mean(abs(ref)) + 1e-8))
    for rank in (50, 90, 95, 99):
        assert m.percentiles[rank] == pytest.approx(np.percentile(abs(d), rank))
    assert saved.preset == "classic"
    summary = json.loads((out / "comparisons" / "summary.json").read_text())
    assert summary["comparisons"][0]["file"].endswith("2-1-vs-fp32.json")
    assert cli("compare", "--from", out / "comparisons" / "2-1-vs-fp32.json")[0] in (0, 1)


def test_one_mode_against_any_other(cli: Cli, captured: Callable[..., Path]) -> None:
    out = captured("fp32,2-1,2-4")
    code, printed, _ = cli("modes", "compare", out, "--mode", "2-4", "--reference", "2-1", "--json")
    assert code == 0
    [one] = json.loads(printed)["comparisons"]
    assert (one["mode"], one["reference"]) == ("2-4", "2-1")


def test_the_ladder_compares_each_mode_with_the_one_it_refines(
    cli: Cli, captured: Callable[..., Path]
) -> None:
    out = captured("essential")
    code, printed, _ = cli("modes", "compare", out, "--ladder", "--json")
    assert code == 0
    assert [(one["mode"], one["reference"]) for one in json.loads(printed)["comparisons"]] == [
        ("0", "fp32"), ("2-1", "0"), ("2-2", "2-1"), ("2-4", "2-2"),
    ]  # fmt: skip


def test_a_missing_reference_names_the_command_that_makes_it_and_it_works(
    cli: Cli, captured: Callable[..., Path], shape: Shape
) -> None:
    import shlex

    out = captured("2-1,2-2")
    code, _, errors = cli("modes", "compare", out)
    assert code == 2
    assert "has no run of mode 'fp32'; it has 2-1, 2-2" in errors
    command = errors.partition("This makes it: ")[2].strip()
    words = shlex.split(command)
    assert words[:3] == ["tensortap", "modes", "capture"]
    assert words[-4:] == ["--modes", "fp32", "--out", str(out)]
    assert cli(*words[1:])[0] == 0
    assert cli("modes", "compare", out)[0] == 0


def test_a_missing_rung_names_the_command_that_makes_it(
    cli: Cli, captured: Callable[..., Path]
) -> None:
    code, _, errors = cli("modes", "compare", captured("fp32,0"), "--ladder")
    assert code == 2
    assert "no run of mode 'quamba/2-1'" in errors
    assert "--modes quamba/2-1" in errors


def test_different_bases_are_refused_unless_rotations_are_taken_back(
    cli: Cli, captured: Callable[..., Path]
) -> None:
    out = captured("quamba/fp32,generic/fp32,2-1")
    arguments = ("modes", "compare", out, "--reference", "generic/fp32")
    code, _, errors = cli(*arguments)
    assert code == 2
    assert "quamba-fp32 is in the rotated basis and generic-fp32 in the native one" in errors
    assert "--unrotate" in errors
    code, printed, _ = cli(*arguments, "--unrotate", "--json")
    assert code == 0
    rows = {one["mode"]: one["layer"] for one in json.loads(printed)["comparisons"]}
    assert rows["quamba-fp32"]["last_mse"] < 1e-12
    assert 1e-10 < rows["2-1"]["last_mse"] < 1e-2
    assert rows["2-1"]["mean_correlation"] > 0.99


def test_a_name_that_two_runs_have_must_be_spelled_out(
    cli: Cli, captured: Callable[..., Path]
) -> None:
    code, _, errors = cli("modes", "compare", captured("quamba/fp32,generic/fp32"))
    assert code == 2
    assert "several runs of mode 'fp32'; write quamba/fp32 or generic/fp32" in errors


def test_inputs_that_differ_are_said(cli: Cli, captured: Callable[..., Path]) -> None:
    code, printed, _ = cli("modes", "compare", captured("fp32,bf16,int8", LLAMA))
    assert code == 0
    assert "is not the same in all modes; bitwise equal within: fp32, int8; bf16." in printed


def test_runs_of_different_samples_are_refused(
    cli: Cli, captured: Callable[..., Path], shape: Shape
) -> None:
    out = captured("fp32", LLAMA)
    cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "int8", "--samples", 1,
        "--seq-len", 4, "--out", out,
    )  # fmt: skip
    code, _, errors = cli("modes", "compare", out)
    assert code == 2
    assert "int8 and fp32 were captured on different inputs" in errors


def test_runs_of_different_weights_are_refused(cli: Cli, captured: Callable[..., Path]) -> None:
    out = captured("fp32", LLAMA)
    captured("int8", {**LLAMA, "intermediate_size": 40})
    code, _, errors = cli("modes", "compare", out)
    assert code == 2
    assert "int8 and fp32 were captured of models with different weights" in errors


def test_modes_with_different_scales_need_not_be_equal(
    cli: Cli, captured: Callable[..., Path]
) -> None:
    out = captured("0", MAMBA, "--percentile-alpha", "0.5")
    captured("2-0")
    code, _, errors = cli("modes", "compare", out, "--reference", "0")
    assert (code, "declared" in errors) == (0, False)


def test_layers_that_only_one_run_has_are_said_and_exit_1(
    cli: Cli, captured: Callable[..., Path], shape: Shape
) -> None:
    out = captured("fp32", LLAMA, "--layers", "all")
    cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "int8", "--samples", 2,
        "--seq-len", 9, "--layers", "first", "--out", out,
    )  # fmt: skip
    code, _, errors = cli("modes", "compare", out)
    assert code == 1
    assert "layers.2/forward/output could not be compared: it was not captured" in errors


def test_values_that_cannot_be_read_any_more_are_said_and_the_rest_is_compared(
    cli: Cli, captured: Callable[..., Path]
) -> None:
    out = captured("fp32,int8", LLAMA)
    [shard] = (out / "int8").glob("rank00000/shard-*")
    with tensortap.open_run(out / "int8") as run:
        [record] = run.records("layers.2/forward/output", step=1)
    assert record.payload is not None
    content = bytearray(shard.read_bytes())
    content[record.payload.offset] ^= 255
    shard.write_bytes(content)
    code, printed, errors = cli("modes", "compare", out, "--json")
    assert code == 1
    assert "layers.2/forward/output could not be compared" in errors
    [one] = json.loads(printed)["comparisons"]
    assert one["layer"]["first_mse"] > 0


def test_what_a_killed_capture_left_is_no_mode(cli: Cli, captured: Callable[..., Path]) -> None:
    out = captured("fp32,int8", LLAMA)
    shutil.copytree(out / "fp32", out / ".mxfp4.partial")
    code, printed, _ = cli("modes", "compare", out, "--json")
    assert code == 0
    assert [one["mode"] for one in json.loads(printed)["comparisons"]] == ["int8"]


def test_infinities_are_compared_and_told_as_plain_json(
    cli: Cli, captured: Callable[..., Path], new_family: Any
) -> None:
    new_family("shifts", shifting("nan", "shifts", float("nan")), shifting("one", "shifts", 1))
    out = captured("one,nan", LLAMA)
    code, printed, _ = cli("modes", "compare", out, "--reference", "one")
    assert code == 0
    assert "NaN or infinity on one side only" in printed
    text = (out / "comparisons" / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)


def test_a_declared_equality_that_fails_exits_1(
    cli: Cli, captured: Callable[..., Path], new_family: Any
) -> None:
    new_family(
        "shifts", shifting("one", "shifts", 1, equals=("two",)), shifting("two", "shifts", 2)
    )
    out = captured("one,two", LLAMA, code=1)
    code, _, errors = cli("modes", "compare", out, "--reference", "one")
    assert code == 1
    assert "one and two are declared to be bitwise equal, and differ" in errors


def test_without_analysis_the_error_names_what_to_install(
    cli: Cli, captured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = captured("fp32,bf16", LLAMA)
    for name in list(sys.modules):
        if name.partition(".")[0] == "tensortap_analysis":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensortap_analysis", None)
    code, _, errors = cli("modes", "compare", out)
    assert code == 2
    assert 'pip install "tensortap[analysis]"' in errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ladder", "--mode", "int8"), "leave --mode out"),
        (("--ladder", "--reference", "int8"), "leave --reference out"),
        (("--ladder",), "modes of the family generic, which has no ladder"),
        (("--mode", "mxfp4"), "no run of mode 'mxfp4'"),
        (("--mode", "9"), "There is no mode '9'"),
        (("--mode", "fp32"), "no other run to compare with fp32"),
    ],
)
def test_a_mistake_is_one_line_and_exits_2(
    cli: Cli, captured: Callable[..., Path], arguments: tuple[str, ...], says: str
) -> None:
    code, _, errors = cli("modes", "compare", captured("fp32,int8", LLAMA), *arguments)
    assert code == 2
    assert says in errors


def test_a_folder_without_runs_says_how_to_make_them(cli: Cli, tmp_path: Path) -> None:
    code, _, errors = cli("modes", "compare", tmp_path)
    assert code == 2
    assert f"holds no runs of modes; `tensortap modes capture … --out {tmp_path}`" in errors
