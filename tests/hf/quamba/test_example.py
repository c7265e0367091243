"""The example runs as printed, and its runs are what it says they are."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import torch

import tensortap
from tensortap_hf import quamba

EXAMPLE = Path(__file__).parents[3] / "examples" / "quamba_modes" / "quamba_modes.py"


def test_the_whole_workflow_runs_in_one_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), "--out", str(out)])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("COLUMNS", "200")
    # A copy of the script has all it needs, and replaces the runs that an earlier start left.
    script = Path(shutil.copy(EXAMPLE, tmp_path))
    other = torch.nn.Linear(1, 1)
    with tensortap.attach(other, out / "2-0"):
        other(torch.ones(1))
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    assert [row[0].strip() for row in rows] == ["0", "2-0", "2-1", "2-2", "2-3", "2-4", "3"]
    assert rows[0][1:6] == rows[1][1:6]
    assert rows[2][1:6] == rows[3][1:6] == rows[4][1:6]
    assert rows[5][1:6] != rows[6][1:6]
    assert (out / "errors.png").stat().st_size > 20_000
    assert quamba.Scales.load(out / "scales").sample_lengths == (100, 140, 180, 220, 260)
    with tensortap.open_run(out / "2-0") as run, tensortap.open_run(out / "0") as other:
        assert run.info.mode == "2-0"
        name = "layers.5/forward/output"
        assert torch.equal(run.tensor(name), other.tensor(name))
