import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MIB = 1 << 20
SCRIPT = """
import sys
from tensortap_analysis.weights import Scope

def highest():
    # Of this process alone: what resource.getrusage says began with the one that started it.
    [line] = [one for one in open("/proc/self/status") if one.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

before = highest()
Scope(sys.argv[1]).scan(parallel=int(sys.argv[2]))
print(before, highest())
"""


def peaks(path, parallel):
    """MiB that a process has held at most: after its imports, and after a scan."""
    command = [sys.executable, "-c", SCRIPT, str(path), str(parallel)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    return before, after


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account")
@pytest.mark.parametrize("parallel", [1, 2])
def test_a_worker_holds_twice_the_largest_tensor_and_300_mib_with_all_imports(tmp_path, parallel):
    state = {f"layers.{n}.weight": torch.randn(1024, 1024).bfloat16() for n in range(24)}
    state |= {f"embed_{n}.weight": torch.randn(60_000, 256) for n in range(2)}
    save_file(state, tmp_path / "x.safetensors")
    largest = max(one.numel() * one.itemsize for one in state.values()) / MIB
    before, after = peaks(tmp_path / "x.safetensors", parallel)
    assert after < parallel * 2 * largest + 300
    # Not for the tensors were small: each worker has mapped one of the large ones.
    assert after > before + largest
