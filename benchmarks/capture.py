"""What capturing costs: `python benchmarks/capture.py --help`, and README.md next to this file."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capture_report import RESULTS, Row, machine, show, write_results

HERE = Path(__file__).resolve().parent
BASELINE = "untapped"
OURS = (
    "disabled", "nothing-selected", "other-steps", "stats", "stats+exponents", "stats-4-phases",
    "stats-hf", "full",
)  # fmt: skip
NAIVE = ("naive-stats", "naive-full")
PEER = ("mindstudio-stats", "mindstudio-full")
CHUNK = 8 << 20
STEP_BYTES = 1_600_000_000
"""What the lane that writes most leaves on the disk in one step, rounded up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, and where."""

    lanes: tuple[str, ...]
    rounds: int
    warmup: int
    steps: int
    scratch: Path
    peer_python: Path


@dataclass(slots=True)
class Samples:
    """Reports of one lane, a round each, with the ratios to the untapped runs around them."""

    reports: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    plain_writes: list[float] = field(default_factory=list)


def run_worker(plan: Plan, lane: str) -> dict[str, Any]:
    """One process on one lane; raises with the end of its output when it fails."""
    python = plan.peer_python if lane in PEER else Path(sys.executable)
    work = Path(tempfile.mkdtemp(dir=plan.scratch))
    report = work / "report.json"
    command = [
        str(python), str(HERE / "capture_worker.py"), lane, "--scratch", str(work / "out"),
        "--report", str(report), "--warmup", str(plan.warmup), "--steps", str(plan.steps),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise SystemExit(f"The lane {lane!r} failed:\n{tail}")
        return dict(json.loads(report.read_text()))
    finally:
        shutil.rmtree(work)
        # The next process must not pay for what this one left in the page cache.
        os.sync()


def plain_write(scratch: Path, nbytes: int) -> float:
    """Seconds to write `nbytes` into one file, in order, and bring them to the disk."""
    block = memoryview(os.urandom(CHUNK))
    path = scratch / "plain"
    started = time.perf_counter()
    with path.open("wb", buffering=0) as out:
        for start in range(0, nbytes, CHUNK):
            out.write(block[: min(CHUNK, nbytes - start)])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    os.sync()
    return seconds


def run_all(plan: Plan) -> dict[str, Samples]:
    """Untapped, lane, untapped, lane, …: every lane runs between two untapped processes."""
    results = {lane: Samples() for lane in (BASELINE, *plan.lanes)}
    before = run_worker(plan, BASELINE)
    results[BASELINE].reports.append(before)
    for number in range(plan.rounds):
        for lane in plan.lanes:
            print(f"round {number + 1} of {plan.rounds}: {lane} …", file=sys.stderr, flush=True)
            report = run_worker(plan, lane)
            after = run_worker(plan, BASELINE)
            results[BASELINE].reports.append(after)
            sample = results[lane]
            sample.reports.append(report)
            sample.ratios.append(2 * report["median"] / (before["median"] + after["median"]))
            if lane.endswith("full"):
                sample.plain_writes.append(plain_write(plan.scratch, report["written"]))
            before = after
    return results


def row_of(lane: str, samples: Samples, baseline: Samples) -> Row:
    """Medians over the rounds."""

    def median(key: str, of: Samples = samples) -> float:
        return float(statistics.median(report[key] for report in of.reports))

    plain = statistics.median(samples.plain_writes) if samples.plain_writes else None
    return Row(
        lane=lane,
        ratio=statistics.median(samples.ratios) if samples.ratios else 1.0,
        spread=(min(samples.ratios), max(samples.ratios)) if samples.ratios else (1.0, 1.0),
        fastest=median("min") / median("min", baseline),
        median=median("median"),
        extra_memory=median("peak") - median("peak", baseline),
        tensors=median("tensors"),
        written=median("written"),
        unique=median("unique"),
        wall=median("wall"),
        untapped_wall=median("wall", baseline),
        plain_write=plain,
    )


def parse(arguments: Sequence[str] | None = None) -> tuple[Plan, Path]:
    known = (*OURS, *NAIVE, *PEER)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of two steps, to try it")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each lane")
    parser.add_argument("--steps", type=int, default=8, help="measured steps a process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--lanes", nargs="+", choices=known, default=known, metavar="LANE",
                        help=f"which of: {' '.join(known)}")  # fmt: skip
    parser.add_argument("--scratch", type=Path, default=HERE.parent / "build" / "bench",
                        help="where runs are written, on the disk to be measured")  # fmt: skip
    parser.add_argument("--peer-python", type=Path, default=HERE.parent / ".bench-venv/bin/python",
                        help="the Python that has mindstudio-probe")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the table is written")
    args = parser.parse_args(arguments)
    if args.quick:
        args.rounds, args.steps, args.warmup = 1, 2, 1
    if set(args.lanes) & set(PEER) and not args.peer_python.exists():
        parser.error(f"{args.peer_python} is missing: `make bench` makes it, or leave out {PEER}")
    args.scratch.mkdir(parents=True, exist_ok=True)
    needed = STEP_BYTES * (args.steps + args.warmup)
    if shutil.disk_usage(args.scratch).free < needed:
        parser.error(f"{args.scratch} needs {needed / 1e9:.0f} GB free; take fewer --steps, or "
                     "another disk with --scratch")  # fmt: skip
    lanes = tuple(dict.fromkeys(args.lanes))
    plan = Plan(lanes, args.rounds, args.warmup, args.steps, args.scratch, args.peer_python)
    return plan, args.out


def main() -> None:
    plan, out = parse()
    started = machine(plan.scratch)
    results = run_all(plan)
    rows = [row_of(lane, samples, results[BASELINE]) for lane, samples in results.items()]
    versions: dict[str, str] = {}
    for samples in results.values():
        versions |= samples.reports[-1]["versions"]
    quiet = [report["median"] for report in results[BASELINE].reports]
    setup = {
        "setup": f"{plan.rounds} rounds of {plan.steps} steps after {plan.warmup} to warm up",
        "threads": str(results[BASELINE].reports[0]["threads"]),
        "untapped step": f"{min(quiet):.3f} s to {max(quiet):.3f} s in {len(quiet)} processes",
    }
    show(rows)
    write_results(out, rows, {**started, **setup, **versions})


if __name__ == "__main__":
    main()
