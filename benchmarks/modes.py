"""What all eight modes of a mamba-130m cost: `tensortap modes capture`, as a user runs it.

    python benchmarks/modes.py [--samples 1] [--seq-len 512] [--calib-samples 1] [--threads N]

Seconds of wall and of CPU, the peak resident memory, and the load of the machine before and after:
one process, from its start to its end, with imports, random weights and calibration. A busy
machine makes the wall longer, and the CPU seconds too where threads wait for one another.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "mamba-130m"
MAIN = "import sys; from tensortap.cli import main; sys.exit(main())"
UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in `ru_maxrss`."""


def command(options: argparse.Namespace, out: Path) -> list[str]:
    """The capture, by this interpreter; its defaults are the first and the last layer."""
    numbers = {
        "--samples": options.samples,
        "--seq-len": options.seq_len,
        "--calib-samples": options.calib_samples,
        "--calib-seq-len": options.seq_len,
    }
    words = ["modes", "capture", "--random-init", MODEL, "--modes", "all", "--out", out, "--json"]
    words += [word for option, number in numbers.items() for word in (option, number)]
    return [sys.executable, "-c", MAIN, *map(str, words)]


def measured(options: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures of the whole process, and what it said of each mode."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        begun = time.perf_counter()
        done = subprocess.run(
            command(options, Path(folder)), env=environment, stdout=subprocess.PIPE, check=True
        )
        wall = time.perf_counter() - begun
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "wall s": wall,
        "CPU s": used.ru_utime + used.ru_stime,
        "peak RSS GiB": used.ru_maxrss * UNIT / 2**30,
    }
    return figures, json.loads(done.stdout)["modes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens, of calibration too")
    parser.add_argument("--calib-samples", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", type=Path, help="where the runs are written")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    figures, modes = measured(options)
    print(f"{MODEL}, {options.samples} x {options.seq_len} tokens, {len(modes)} modes,")
    print(f"calibrated on {options.calib_samples} samples; {options.threads} threads")
    print(f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after, {os.cpu_count()} cores\n")
    for name, value in figures.items():
        print(f"{name:14}{value:9.2f}")
    print()
    for one in modes:  # The first one that needs scales pays for the calibration.
        print(f"{one['mode']:14}{one['seconds']:9.2f} s")


if __name__ == "__main__":
    main()
