"""What `compare` says where a NaN begins late, and where only statistics are known."""

from __future__ import annotations

import copy
import json
import re
from itertools import count

import pytest
import torch
from tests.analysis.small_runs import PlainMlp, capture_plain

import tensortap
from tensortap_analysis import compare

LATE = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three steps of a plain model; in `nan` one module returns a NaN at the last one."""
    folder, model = tmp_path_factory.mktemp("late"), PlainMlp()
    for name, first in (("ref", LATE + 1), ("nan", LATE)):
        again = copy.deepcopy(model)
        again.layers[1].up.register_forward_hook(_with_nan(first))
        with tensortap.attach(again, folder / name, values="full", on_error="raise") as tap:
            for step in range(LATE + 1):
                x = torch.randn(7, 16, generator=torch.Generator().manual_seed(step))
                again(x).square().sum().backward()
                tap.step()
    return folder


def _with_nan(first):
    """A hook that puts a NaN into what a module returns, from this call on."""
    calls = count()

    def put(owner, args, output):
        output = output.clone()
        if next(calls) >= first:
            output[0, 0] = torch.nan
        return output

    return put


def test_the_error_by_depth_is_shown_where_it_begins(cli, runs):
    _, out, _ = cli("compare", runs / "ref", runs / "nan")
    assert f"The error by depth, forward, step {LATE} (the first that tells of 3 moments" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()
            if line.startswith(" layers.") and "/" not in line}  # fmt: skip
    assert rows["layers.0"][:3] == ["0", "0", "0"]
    assert rows["layers.1"] == ["0", "inf", "-", "up", "inf"]
    assert rows["layers.2"] == ["inf", "inf", "-", "-", "-"]
    _, out, _ = cli("compare", runs / "ref", runs / "nan", "--markdown")
    assert re.search(rf"Error by depth of .*, step {LATE}, `~` is an estimate", out)


def test_changes_to_nan_are_no_jumps_and_abnormal_tensors_come_first(cli, runs):
    [run] = compare(runs / "ref", runs / "nan").runs
    assert not run.jumps
    assert run.abnormal[0].startswith(f"layers.1.up/forward/output (step {LATE}): RUN 1 NaN")
    _, out, _ = cli("compare", runs / "ref", runs / "nan")
    assert "jump between layers" not in out
    lines = [line.strip() for line in out.splitlines()]
    about = [line for line in lines if line.startswith(("abnormal", "inherited errors"))]
    assert about[0].startswith("inherited errors")
    assert about[1].startswith("abnormal: layers.1.up/forward/output")


def test_errors_of_the_finite_elements_are_not_shown_beside_a_nan(cli, runs):
    _, out, _ = cli("compare", runs / "ref", runs / "nan")
    rows = [line for line in out.splitlines() if line.startswith(" layers.1.up/forward/output")]
    assert re.search(rf" {LATE} +values +- +- +- +inf +- +- +inf ", rows[0])
    _, out, _ = cli("compare", runs / "ref", runs / "nan", "--json")
    [run] = json.loads(out)["runs"]
    found = next(one for one in run["tensors"] if one["tensor"] == "layers.1.up/forward/output"
                 and one["step"] == LATE)  # fmt: skip
    assert found["mse"] == 0


def test_of_statistics_what_was_added_is_said_to_be_the_least(cli, tmp_path):
    model = PlainMlp()
    ref = capture_plain(model, tmp_path / "ref", values="stats")
    with torch.no_grad():
        model.layers[1].up.weight[0] += 0.5
    _, out, _ = cli("compare", ref, capture_plain(model, tmp_path / "run", values="stats"))
    first = next(line for line in out.splitlines() if "first divergence" in line)
    assert re.search(
        r"relative error at least [\d.]+, .*; local: at least [\d.]+ added here", first
    )
    assert "≥ is at least" in out
    row = next(line for line in out.splitlines() if re.match(r" layers\.1 ", line))
    assert "≥" in row


def test_report_and_plot_of_one_run_say_where_a_nan_begins(cli, runs, tmp_path):
    said = f"layers.1.up/forward/output (step {LATE}): 1 NaN; "
    cli("report", runs / "nan", "--out", tmp_path / "nan.html")
    assert f"First NaN or Inf: {said}" in (tmp_path / "nan.html").read_text()
    cli("report", runs / "ref", "--out", tmp_path / "ref.html")
    assert "First NaN or Inf" not in (tmp_path / "ref.html").read_text()
    cli("plot", runs / "nan", "--out", tmp_path / "pictures", "--worst", 0)
    assert f"first in {said}" in (tmp_path / "pictures/tensor_stats.txt").read_text()
