"""examples/neuron_layers, run as its README says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "examples" / "neuron_layers" / "run.py"


def run_example(out: Path) -> str:
    """What it prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (out / "broken-port-report.json", out / "broken-port-report-prompt-1.html"):
        assert page.exists()
    assert "first divergence: layers.5/forward/output" in done.stdout
    return done.stdout
