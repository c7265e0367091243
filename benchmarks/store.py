"""What the run directory costs: a million records, bytes on disk, throughput.

    python benchmarks/store.py [--records 1000000] [--directory DIR]

Each measurement runs in a process of its own, so that peak memory is its own. Prints one table
with the budgets of the design beside the figures, and exits 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tensortap.names import TensorName
from tensortap.records import Coordinates, RunInfo, Statistics, TensorRecord
from tensortap.store import RunDirectorySink, open_run

NAMES = 400
MIB = 1 << 20
INFO = RunInfo(launch_id="benchmark", created="")


def template(name: str) -> TensorRecord:
    """A record as a real capture writes it."""
    floats = [0.1234567890123 * (number + 1) for number in range(18)]
    return TensorRecord(
        name=TensorName.parse(name),
        native="model.layers.3.self_attn.q_proj",
        at=Coordinates(),
        shape=(4, 256, 512),
        dtype="bfloat16",
        device="cuda:0",
        seq=0,
        dims="batch seq hidden",
        stats=Statistics(524288, 0, 0, 0, 0, *floats[:8], first=tuple(floats[8:])),
    )


def write_records(path: Path, records: int) -> dict[str, float]:
    """Write `records` records of statistics; microseconds of processor time each."""
    templates = [template(f"layers.{n // 8}.attn.t{n % 8}/forward/output") for n in range(NAMES)]
    sink = RunDirectorySink(path)
    sink.open(INFO)
    begin = time.process_time()
    for seq in range(records):
        step, number = divmod(seq, NAMES)
        sink.write(replace(templates[number], at=Coordinates(step=step), seq=seq), None)
        if number == NAMES - 1:
            sink.end_step(step)
    taken = time.process_time() - begin
    sink.close()
    size = sum(file.stat().st_size for file in (path / "rank00000").iterdir())
    return {"us": 1e6 * taken / records, "bytes": size / records}


def open_and_filter(path: Path, records: int) -> dict[str, float]:
    """Open, filter by name and step, list names, take statistics in bulk; seconds and peak."""
    before = peak()
    begin = time.perf_counter()
    with open_run(path) as run:
        assert run.complete
        found = list(run.records("layers.3.attn.*/forward/*", step=1))
        assert len(found) == 8
        filtered = time.perf_counter() - begin
        assert len(run.names()) == NAMES
        table = run.table("layers.*.attn.t0/*")
        assert len(table) == len(range(0, records, 8))
        whole = time.perf_counter() - begin
    return {"filter": filtered, "table": whole, "peak": peak() / MIB, "import": before / MIB}


def rebuild(path: Path, records: int) -> dict[str, float]:
    """Open and filter without the index; seconds for all records."""
    (path / "rank00000/index.bin").unlink()
    begin = time.perf_counter()
    with open_run(path) as run:
        assert len(list(run.records("layers.3.attn.*/forward/*", step=1))) == 8
    return {"seconds": time.perf_counter() - begin, "peak": peak() / MIB}


def overhead(path: Path, megabytes: int) -> dict[str, float]:
    """Bytes on disk over unique payload bytes, each tensor seen at two sites."""
    tensors = [torch.randn(512, 1024) for _ in range(megabytes // 2)]
    write_payloads(path, tensors, sites=2)
    unique = sum(tensor.nbytes for tensor in tensors)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"ratio": size / unique}


def throughput(path: Path, megabytes: int) -> dict[str, float]:
    """Seconds for the same bytes: the sink against plain writes, both synced, in turn."""
    tensors = [torch.randn(512, 1024) for _ in range(megabytes // 2)]
    ways: dict[str, Callable[[Path], None]] = {
        "plain": lambda place: write_plain(place / "plain", tensors),
        "sink": lambda place: write_payloads(place / "run", tensors, sites=1),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(8):
        # Each goes first as often as the other: the second finds blocks that were just freed.
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            place = path / f"{way}{turn}"
            place.mkdir()
            taken[way].append(timed(ways[way], place))
            shutil.rmtree(place)
    middle = {way: statistics.median(seconds) for way, seconds in taken.items()}
    rates = {way: megabytes / seconds for way, seconds in middle.items()}
    return rates | {"ratio": middle["sink"] / middle["plain"]}


def write_payloads(path: Path, tensors: list[torch.Tensor], sites: int) -> None:
    """A run of full values, every tensor recorded at `sites` places."""
    records = [template(f"layers.0.t{site}/forward/output") for site in range(sites)]
    sink = RunDirectorySink(path)
    sink.open(INFO)
    for seq, tensor in enumerate(tensors):
        for site, record in enumerate(records):
            at = Coordinates(step=seq)
            full = replace(
                record, at=at, shape=tuple(tensor.shape), dtype="float32",
                seq=sites * seq + site, values="full",
            )  # fmt: skip
            sink.write(full, tensor)
        sink.end_step(seq)
    sink.close()


def write_plain(path: Path, tensors: list[torch.Tensor]) -> None:
    """The least that puts the same bytes on the disk."""
    with open(path, "wb", buffering=0) as file:
        for tensor in tensors:
            file.write(tensor.numpy())
        os.fsync(file.fileno())


def timed(act: Callable[[Path], None], place: Path) -> float:
    """Seconds that `act` takes."""
    begin = time.perf_counter()
    act(place)
    return time.perf_counter() - begin


def peak() -> float:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


PARTS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    part.__name__: part for part in (write_records, open_and_filter, rebuild, overhead, throughput)
}


def alone(part: str, path: Path, amount: int) -> dict[str, Any]:
    """Run one part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--directory", str(path)]
    done = subprocess.run(
        [*command, "--records", str(amount)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> int:
    """Measure, print the table; 1 when a budget is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, help="where to write (default: temporary)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.directory, options.records)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        return report(Path(place), options.records)


def report(place: Path, records: int) -> int:
    """Run all parts below `place`."""
    written = alone("write_records", place / "many", records)
    opened = alone("open_and_filter", place / "many", records)
    rebuilt = alone("rebuild", place / "many", records)
    shutil.rmtree(place / "many")
    disk = alone("overhead", place / "disk", 256)
    (place / "speed").mkdir()
    speed = alone("throughput", place / "speed", 1024)
    rows = [
        ("write one record of statistics, us", written["us"], 20.0),
        ("  its bytes on disk", written["bytes"], None),
        (f"open and filter {records:,} records, s", opened["filter"], 3.0),
        ("  and names, and a table of an eighth, s", opened["table"], 3.0),
        ("  peak memory, MiB", opened["peak"], 1024.0),
        ("    of which imports", opened["import"], None),
        ("the same without index.bin, s", rebuilt["seconds"], None),
        ("  peak memory, MiB", rebuilt["peak"], None),
        ("bytes on disk over unique payload bytes, 256 MiB", disk["ratio"], 1.02),
        ("time over plain synced writes of the same GiB", speed["ratio"], 1.3),
        ("  plain, MiB/s", speed["plain"], None),
        ("  run directory, MiB/s", speed["sink"], None),
    ]
    for what, value, budget in rows:
        limit = "" if budget is None else f"<= {budget:g}"
        print(f"{what:<52}{value:>12.4g}   {limit}")
    return int(any(budget is not None and value > budget for _, value, budget in rows))


if __name__ == "__main__":
    sys.exit(main())
