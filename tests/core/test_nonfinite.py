"""Where NaN and infinity begin in a single run: what `show` says of it."""

from __future__ import annotations

import json

import pytest
import torch
from tests.core.store.building import info, record, statistics, write_run

from tensortap import open_run
from tensortap.nonfinite import first_nonfinite, nonfinite_table

CLEAN = statistics()


def broken(nan=0, inf=0):
    return statistics(nan=nan, posinf=inf)


@pytest.fixture
def run(tmp_path):
    """Two steps; at the second a NaN begins in the middle, and fills the rest."""
    rows = [("layers.0/forward/output", 0, CLEAN), ("layers.1/forward/output", 0, CLEAN),
            ("layers.1/forward/input.attention_mask", 0, statistics(neginf=4)),
            ("layers.0/forward/output", 1, CLEAN), ("layers.1.up/forward/output", 1, broken(1)),
            ("layers.1/forward/output", 1, broken(2, 1)),
            ("head/forward/output", 1, broken(9))]  # fmt: skip
    items = [
        (record(name, None, seq, step, stats=stats), None)
        for seq, (name, step, stats) in enumerate(rows)
    ]
    return write_run(tmp_path / "run", items, steps=(0, 1))


def test_show_lists_them_the_first_first(cli, run):
    code, out, _ = cli("show", run, "--nonfinite")
    assert code == 0
    rows = [
        line.split()[:2] for line in out.splitlines() if "/forward/" in line and "x" not in line
    ]
    names = [row for row in rows if row[1] == "1"]
    assert [name for name, _ in names] == [
        "layers.1.up/forward/output", "layers.1/forward/output", "head/forward/output"
    ]  # fmt: skip
    assert "mask" not in out


def test_the_summary_of_show_names_the_first_and_its_step(cli, run):
    _, out, _ = cli("show", run, "--limit", 1)
    said = "first NaN or Inf: layers.1.up/forward/output (step 1): 1 NaN; 2 more records have some"
    assert said in out
    _, out, _ = cli("show", run, "--json")
    first = json.loads(out)["first_nonfinite"]
    assert (first["name"], first["step"], first["records"]) == ("layers.1.up/forward/output", 1, 3)
    assert (first["nan"], first["inf"]) == (1, 0)


def test_a_run_without_any_says_so_and_exits_0(cli, tmp_path):
    clean = write_run(tmp_path / "clean", [(record(stats=CLEAN), None)])
    code, out, _ = cli("show", clean, "--nonfinite")
    assert (code, "No NaN and no infinity" in out) == (0, True)
    _, out, _ = cli("show", clean)
    assert "NaN or Inf" not in out
    _, out, _ = cli("show", clean, "--json")
    assert json.loads(out)["first_nonfinite"] is None


def test_selection_step_and_limit_narrow_it(cli, run):
    _, out, _ = cli("show", run, "--nonfinite", "--select", "head/*")
    assert "layers.1.up/forward/output  " not in out
    assert "head/forward/output" in out
    _, out, _ = cli("show", run, "--nonfinite", "--step", 0)
    assert "No NaN and no infinity" in out
    _, out, _ = cli("show", run, "--nonfinite", "--limit", 1)
    assert "and 2 more" in out


def test_real_values_are_counted(tmp_path):
    x = torch.tensor([1.0, torch.nan, torch.inf])
    stats = statistics([1.0], count=3, nan=1, posinf=1)
    run = write_run(tmp_path / "run", [(record("a/forward/output", x, stats=stats), x)])
    with open_run(run) as opened:
        assert str(first_nonfinite(opened)) == "a/forward/output (step 0): 1 NaN, 1 Inf"


def test_of_pipeline_stages_the_first_stage_comes_first(tmp_path):
    path = tmp_path / "run"
    for rank, before in ((0, 5), (1, 0)):  # the second stage has numbered fewer records before
        rows = [(f"layers.{rank}.x{n}/forward/output", CLEAN) for n in range(before)]
        rows += [(f"layers.{rank}/forward/output", broken(1))]
        items = [(record(name, None, seq, rank=rank, stats=stats), None)
                 for seq, (name, stats) in enumerate(rows)]  # fmt: skip
        place = {"pp": 2, "pp_rank": rank}
        write_run(path, items, info(rank=rank, world_size=2, parallel=place))
    with open_run(path) as opened:
        assert nonfinite_table(opened).column("name").tolist() == [
            "layers.0/forward/output", "layers.1/forward/output"
        ]  # fmt: skip
        assert str(first_nonfinite(opened)).startswith("layers.0/forward/output")
