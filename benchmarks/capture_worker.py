"""One process, one lane: train, time each step, report as JSON. Started by capture.py."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from capture_lanes import LANES, seen
from capture_model import build_model, training_step

PACKAGES = ("tensortap", "transformers", "numpy", "mindstudio-probe")


def measure(lane: str, scratch: Path, warmup: int, steps: int) -> dict[str, Any]:
    """Step times in seconds; `wall` runs from the first step to the end of the lane's clean-up."""
    model = build_model()
    step = training_step(model)
    times = []
    with LANES[lane](model, scratch) as observed:
        started = time.perf_counter()
        for _ in range(warmup + steps):
            begun = time.perf_counter()
            with observed():
                step()
            times.append(time.perf_counter() - begun)
    wall = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "median": statistics.median(times[warmup:]),
        "min": min(times[warmup:]),
        "wall": wall,
        "peak": peak,
        **what_was_written(scratch, warmup + steps),
    }


def what_was_written(scratch: Path, steps: int) -> dict[str, Any]:
    """Bytes on disk, tensors a step and, for a run of ours, the bytes of its unique payloads."""
    written = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    if (scratch / "run").is_dir():
        tensors, unique = read_run(scratch / "run")
    elif (scratch / "dump").is_dir():
        dumps = scratch.glob("dump/step*/**/dump.json")
        tensors, unique = sum(path.read_text().count('"torch.Tensor"') for path in dumps), 0
    else:
        tensors, unique = len(seen), 0
    return {"written": written, "tensors": tensors / steps, "unique": unique}


def read_run(path: Path) -> tuple[int, int]:
    """How many records a run holds, and the bytes of its payloads, each digest counted once."""
    import tensortap

    records = list(tensortap.open_run(path).records())
    payloads = {r.payload.digest: r.payload.nbytes for r in records if r.payload is not None}
    return len(records), sum(payloads.values())


def versions() -> dict[str, str]:
    """What ran, as far as it is installed here."""
    found = {"torch": str(torch.__version__)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lane", choices=LANES)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    report = measure(args.lane, args.scratch, args.warmup, args.steps)
    report |= {"versions": versions(), "threads": torch.get_num_threads()}
    args.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
