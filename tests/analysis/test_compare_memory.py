"""The memory that a comparison takes does not depend on the size of the tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.core.store.building import record, write_run

MIB = 1 << 20

_COMPARE = """
import sys, threading
from tensortap_analysis import compare

# Pages of a memory-mapped file belong to the page cache; what is private is what a process takes.
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    kib = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
    return (kib["Private_Dirty:"] + kib.get("Swap:", 0)) // 1024

peak, stop = 0, threading.Event()

def poll():
    global peak
    while not stop.wait(0.01):
        peak = max(peak, private())

compare(sys.argv[1], sys.argv[2], select="warm/*")
before = private()
thread = threading.Thread(target=poll)
thread.start()
found = compare(sys.argv[1], sys.argv[2], select="embed/*", block=int(sys.argv[3]))
stop.set()
thread.join()
[pair] = found.runs[0].pairs
print(found.verdict, pair.metrics.count, pair.metrics.bitwise_equal, peak - before)
"""


@pytest.mark.parametrize("dims", [("batch seq hidden", "batch seq hidden"),
                                  ("batch seq hidden", "seq batch hidden")])  # fmt: skip
def test_a_pair_of_300_mib_tensors_takes_a_few_blocks(tmp_path, dims):
    x = torch.randn(75 * MIB // 1024, 4, 256)  # 300 MiB
    tensors = x, x if dims[0] == dims[1] else x.transpose(0, 1).contiguous()
    for folder, tensor, axes in zip("ab", tensors, dims, strict=True):
        small = torch.randn(8)
        items = [(record("warm/forward/output", small, 0), small),
                 (record("embed/forward/output", tensor, 1, dims=axes), tensor)]  # fmt: skip
        write_run(tmp_path / folder, items)
    command = [sys.executable, "-c", _COMPARE, tmp_path / "a", tmp_path / "b", str(MIB)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    verdict, count, equal, grown = done.stdout.split()
    assert (verdict, int(count), equal) == ("agree", x.numel(), "True")
    assert int(grown) < 100
