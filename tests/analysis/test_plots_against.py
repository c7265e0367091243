"""Pictures of a run against another one: what is paired, which differ most, what is said."""

from __future__ import annotations

import math

import pytest
import torch
from tests.analysis.test_whatif import write_run
from tests.core.store.building import record
from tests.core.store.building import write_run as write_rows

from tensortap import Part, Placement, open_run
from tensortap.stats import statistics
from tensortap_analysis.plots.against import draw_errors
from tensortap_analysis.plots.drawing import Drawing
from tensortap_analysis.plots.gallery import plot
from tensortap_analysis.plots.selecting import at_moments, latest
from tensortap_analysis.plots.survey import survey

pytestmark = pytest.mark.usefixtures("coarse")


def drawing(run, out):
    found = survey(run)
    return Drawing(run, "run", found, at_moments(run, latest(found)), out, lambda what: None)


def test_the_worst_against_another_run_are_those_with_the_largest_error(tmp_path):
    torch.manual_seed(0)
    tensors = {f"layers.{n}/forward/output": torch.randn(40, 8) for n in range(4)}
    errors = dict(zip(tensors, (0.01, 0.3, 0.0, 0.1), strict=True))
    other = {n: x + errors[n] * x.norm() / 320**0.5 for n, x in tensors.items()}
    ref = write_run(tmp_path / "ref", tensors)
    with open_run(write_run(tmp_path / "run", other)) as run, open_run(ref) as two:
        found = draw_errors(drawing(run, tmp_path / "errors"), two)
        done = plot(run, tmp_path / "out", against=two, count=2)
    assert found == pytest.approx(errors, rel=1e-3)
    names = [path.name for path in done.files if path.parent.name == "comparisons"]
    assert names == [
        "overview.png", "layers.1__forward__output__step_0.png",
        "layers.3__forward__output__step_0.png",
    ]  # fmt: skip
    assert done.failed == []


def test_against_a_run_with_nothing_in_common_the_rest_is_drawn(cli, tmp_path):
    run = write_run(tmp_path / "run", {"layers.0/forward/output": torch.randn(8, 8)})
    other = write_run(tmp_path / "other", {"elsewhere/forward/output": torch.randn(8)})
    out = tmp_path / "out"
    code, printed, error = cli("plot", run, "--against", other, "--out", out, "--worst", 1)
    assert (code, error.strip()) == (0, "")
    assert f"nothing in common with {other}" in printed
    assert (out / "quick_analysis.png").exists()


def test_statistics_against_statistics_are_compared_as_far_as_they_say(cli, tmp_path):
    torch.manual_seed(0)
    tensors = {f"layers.{n}/forward/output": torch.randn(40, 4) for n in range(3)}
    ref = write_run(tmp_path / "ref", tensors, values="stats")
    other = {name: x * (1 + 0.1 * ("2" in name)) for name, x in tensors.items()}
    run = write_run(tmp_path / "run", other, values="stats")
    with open_run(run) as one, open_run(ref) as two:
        done = plot(one, tmp_path / "out", against=two)
        found = draw_errors(drawing(one, tmp_path / "errors"), two)
    assert done.failed == []
    assert (tmp_path / "out" / "comparisons" / "overview.png") in done.files
    assert [round(error, 3) for error in found.values()] == [0.0, 0.0, 0.1]


def test_fused_tensors_meet_split_ones_and_shapes_that_do_not_match_are_said(tmp_path):
    torch.manual_seed(0)
    out = "layers.0.attn.{}/forward/output"
    fused, mlp = torch.randn(5, 24), "layers.0.mlp.up/forward/output"
    parts = tuple(Part(f"layers.0.attn.{w}", 1, ((8 * n, 8),)) for n, w in enumerate("qkv"))
    rows = [
        (record(out.format("qkv"), fused, 0, placement=Placement((5, 24), parts=parts),
                stats=statistics(fused)), fused),
        (record(mlp, fused, 1, stats=statistics(fused)), fused),
    ]  # fmt: skip
    split = {out.format(w): fused[:, 8 * n : 8 * n + 8] for n, w in enumerate("qkv")}
    split = {name: x.clone() for name, x in split.items()} | {mlp: torch.randn(5, 7)}
    split[out.format("k")] *= 1.25
    one, two = write_rows(tmp_path / "fused", rows), write_run(tmp_path / "split", split)
    for run_path, ref_path in ((one, two), (two, one)):
        folder = tmp_path / f"{run_path.name}_out"
        with open_run(run_path) as run, open_run(ref_path) as ref:
            done = plot(run, folder, against=ref)
        assert done.failed == []
        assert any(line.startswith(f"{mlp}: shapes") for line in done.left_out)
        drawn = {path.name.partition("__")[0] for path in (folder / "comparisons").iterdir()}
        assert drawn == {"overview.png", *(f"layers.0.attn.{word}" for word in "qkv")}


def test_where_a_nan_began_is_drawn_and_what_is_nothing_else_is_only_said(cli, tmp_path):
    weight = torch.randn(8, 8)
    weight[0, 0] = math.nan
    lost = torch.full((8, 8), math.nan)
    tensors = {"layers.1.up/param/weight": weight, "layers.1.up/forward/output": weight * 2}
    tensors |= {f"layers.{n}/forward/output": lost for n in (1, 2)}
    tensors |= {f"layers.{n}.up/grad/weight": lost for n in (1, 2)}
    run = write_run(tmp_path / "run", tensors)
    ref = write_run(tmp_path / "ref", {name: x.nan_to_num() + 1 for name, x in tensors.items()})
    code, out, _ = cli("plot", run, "--against", ref, "--worst", 2, "--out", tmp_path / "out")
    assert code == 0
    assert "layers.1/forward/output and 3 more: every value is NaN or Inf" in out
    drawn = {path.name for path in (tmp_path / "out" / "distributions").iterdir()}
    assert drawn == {
        "layers.1.up__param__weight__step_0.png", "layers.1.up__forward__output__step_0.png"
    }  # fmt: skip
