"""The command on the native device, in a process of its own: PrivateUse1 cannot be given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASE = Path(__file__).with_name("native_case.py")


@pytest.mark.skipif(
    not hasattr(torch._C, "_acc"), reason="the fake device needs torch 2.9's Python backends"
)
def test_layers_are_captured_on_the_native_device():
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(CASE)]
    done = subprocess.run(command, cwd=CASE.parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
