"""The memory that a comparison takes does not depend on the size of the tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.core.store.building import record, write_run

MIB = 1 << 20
ROWS, BATCH, WIDTH = 600 * MIB // 4 // 4 // 256, 4, 256
"""600 MiB of float32."""

_COMPARE = """
import sys, threading
import torch
from tensortap_analysis import compare

torch.set_num_threads(2)

# Resident memory without the pages of mapped files: those are the page cache's, which lends them
# for as long as nobody else needs them.
def own():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return sum(int(status[key].split()[0]) for key in ("RssAnon", "RssShmem", "VmSwap")) // 1024

peak, stop = 0, threading.Event()

def poll():
    global peak
    while not stop.wait(0.005):
        peak = max(peak, own())

compare(sys.argv[1], sys.argv[2], select="warm/*")
before = own()
thread = threading.Thread(target=poll)
thread.start()
found = compare(sys.argv[1], sys.argv[2], select="embed/*")
stop.set()
thread.join()
[pair] = found.runs[0].pairs
print(pair.metrics.count, pair.metrics.percentiles[99], peak - before)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, one that differs, and that one with its axes in another order."""
    folder = tmp_path_factory.mktemp("large")
    seed = torch.Generator().manual_seed(0)
    row = torch.randn(BATCH, WIDTH, generator=seed)
    far = row + torch.rand(BATCH, WIDTH, generator=seed)
    whole = {
        "ref": ("batch seq hidden", row.view(BATCH, 1, WIDTH).expand(BATCH, ROWS, WIDTH)),
        "same": ("batch seq hidden", far.view(BATCH, 1, WIDTH).expand(BATCH, ROWS, WIDTH)),
        "moved": ("seq batch hidden", far.expand(ROWS, BATCH, WIDTH)),
    }
    for name, (dims, tensor) in whole.items():
        items = [
            (record("warm/forward/output", row, 0), row),
            (record("embed/forward/output", tensor, 1, dims=dims), tensor.contiguous()),
        ]
        write_run(folder / name, items)
    return folder, float(torch.quantile((far - row).abs().double(), 0.99))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("other", ["same", "moved"])
def test_a_pair_of_600_mib_tensors_takes_a_few_blocks(runs, other):
    folder, percentile = runs
    command = [sys.executable, "-c", _COMPARE, folder / "ref", folder / other]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    count, found, grown = done.stdout.split()
    assert int(count) == ROWS * BATCH * WIDTH
    assert float(found) == pytest.approx(percentile, rel=1e-3)
    assert int(grown) < 300, f"{grown} MiB"
