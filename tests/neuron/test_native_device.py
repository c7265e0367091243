"""The native `neuron` device, in a process of its own: PrivateUse1 cannot be given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("native_cases.py")


@pytest.mark.skipif(
    not hasattr(torch._C, "_acc"), reason="the fake device needs torch 2.9's Python backends"
)
def test_the_native_device_is_captured_like_cuda():
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, cwd=CASES.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
