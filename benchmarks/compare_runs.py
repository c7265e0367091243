"""How fast two whole runs are compared, next to numpy code written like the older scripts.

    python benchmarks/compare_runs.py [--mebi 16] [--tensors 24] [--small 4000] [--repetitions 3]

First full runs of tensors of that size, half of them outputs of layers, in the page cache: reading,
checking digests, pairing, all metrics with exact percentiles, jumps between layers, verdicts. GB/s
are bytes of both runs over time, the best of interleaved repetitions. `scripts` reads the same
tensors from .npy files in float32, as those tools kept them, and computes what they printed of a
layer; `all in numpy` computes there all metrics that tensortap has. Then what a pair costs where
there are many small tensors, and where there are statistics only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from compare_metrics import by_scripts
from tensortap import native
from tensortap.names import TensorName
from tensortap.records import Coordinates, RunInfo, TensorRecord
from tensortap.stats import statistics
from tensortap.store import RunDirectorySink
from tensortap_analysis import compare

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8")
SIDES = ("ref", "run")
WIDTH = 1024
NAMES = 500
"""Names of the small tensors; each occurs at several steps."""

Item = tuple[str, int, torch.Tensor]
"""Name, step and tensor."""


def large(options: argparse.Namespace, dtype: torch.dtype, side: str) -> Iterator[Item]:
    """Normal values, and the same with an error of one percent."""
    random, errors = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    rows = (options.mebi << 20) // dtype.itemsize // WIDTH
    for number in range(options.tensors):
        x = torch.randn(rows, WIDTH, generator=random) * (20 if dtype is torch.int8 else 1)
        if side == "run":
            x *= 1 + 0.01 * torch.randn(x.shape, generator=errors)
        inside = ".mlp" if number % 2 else ""
        yield f"layers.{number // 2}{inside}/forward/output", 0, x.to(dtype)


def small(count: int, side: str) -> Iterator[Item]:
    """Tensors of 128 values, each name at many steps."""
    random, errors = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    for number in range(count):
        x = torch.randn(8, 16, generator=random)
        if side == "run":
            x *= 1 + 0.01 * torch.randn(x.shape, generator=errors)
        step, place = divmod(number, NAMES)
        yield f"layers.{place // 20}.m{place % 20}/forward/output", step, x


def write(path: Path, items: Iterator[Item], *, full: bool = True) -> Path:
    """A run of these tensors, with their statistics, or of the statistics alone."""
    sink = RunDirectorySink(path)
    sink.open(RunInfo(launch_id=path.name, created="2026-01-01T00:00:00Z"))
    steps = set()
    for seq, (name, step, tensor) in enumerate(items):
        record = TensorRecord(
            name=TensorName.parse(name), native=name.split("/")[0], at=Coordinates(step=step),
            shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."),
            device="cpu", seq=seq, values="full" if full else "stats", dims="batch hidden",
            stats=statistics(tensor),
        )  # fmt: skip
        sink.write(record, tensor if full else None)
        steps.add(step)
    for step in sorted(steps):
        sink.end_step(step)
    sink.close()
    return path


def write_arrays(folder: Path, items: Iterator[Item]) -> Path:
    folder.mkdir()
    for number, (_, _, tensor) in enumerate(items):
        np.save(folder / f"{number}.npy", tensor.float().numpy())
    return folder


def scripts(ref: Path, other: Path, measure: Callable[[np.ndarray, np.ndarray], object]) -> None:
    for number in range(len(list(ref.iterdir()))):
        measure(*(np.load(folder / f"{number}.npy") for folder in (ref, other)))


def printed(ref: np.ndarray, mode: np.ndarray) -> object:
    """What the older comparison of layer outputs printed of a layer."""
    diff = mode - ref
    size, mse = np.abs(diff), np.mean(diff**2)
    sides = [(x.mean(), x.std(), x.min(), x.max()) for x in (ref, mode)]
    mae = np.mean(size)
    return (
        sides, diff.mean(), diff.std(), size.max(), mse, np.sqrt(mse), mae,
        mse / (np.mean(ref**2) + 1e-8), mae / (np.mean(np.abs(ref)) + 1e-8),
        np.corrcoef(ref.ravel(), mode.ravel())[0, 1], np.percentile(size, [50, 90, 95, 99]),
    )  # fmt: skip


def everything(ref: np.ndarray, other: np.ndarray) -> object:
    return by_scripts(torch.from_numpy(ref), torch.from_numpy(other))


def seconds(ways: list[Callable[[], object]], repetitions: int) -> list[float]:
    """The best time of each way, all taking turns."""
    best = [float("inf")] * len(ways)
    for _ in range(repetitions):
        for at, way in enumerate(ways):
            start = time.perf_counter()
            way()
            best[at] = min(best[at], time.perf_counter() - start)
    return best


def of_large(options: argparse.Namespace, name: str, folder: Path) -> str:
    dtype = getattr(torch, name)
    runs = [write(folder / side, large(options, dtype, side)) for side in SIDES]
    arrays = [write_arrays(folder / f"{s}-npy", large(options, dtype, s)) for s in SIDES]
    ways: list[Callable[[], object]] = [
        lambda: compare(*runs),
        lambda: scripts(arrays[0], arrays[1], printed),
        lambda: scripts(arrays[0], arrays[1], everything),
    ]
    ours, theirs, all_ = seconds(ways, options.repetitions)
    nbytes = 2 * options.tensors * (options.mebi << 20)
    rates = "".join(f"{nbytes / time_ / 1e9:14.2f}" for time_ in (ours, theirs, all_))
    return f"{name:14}{rates}{theirs / ours:15.1f}x{all_ / ours:15.1f}x"


def of_small(count: int, folder: Path, repetitions: int, *, full: bool) -> str:
    runs = [write(folder / side, small(count, side), full=full) for side in SIDES]
    [spent] = seconds([lambda: compare(*runs)], repetitions)
    kind = "full values" if full else "statistics"
    return f"{count:8,} pairs of {kind:12}{spent / count * 1e3:10.3f} ms a pair"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mebi", type=int, default=16, help="MiB of a large tensor")
    parser.add_argument("--tensors", type=int, default=24, help="large tensors in a run")
    parser.add_argument("--small", type=int, default=4000, help="small tensors in a run")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where the runs go; a few GB")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads; kernel: {native.status()}")
    print(f"{options.tensors} tensors of {options.mebi} MiB in each of two runs\n")
    heads = ("compare", "scripts", "all in numpy", "scripts / ours", "all / ours")
    print(f"{'GB/s':14}" + "".join(f"{head:>{14 + 2 * ('/' in head)}}" for head in heads))
    for name in options.dtypes:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            print(of_large(options, name, Path(folder)), flush=True)
    print()
    for count in (options.small, 4 * options.small):
        for full in (True, False):
            with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
                print(of_small(count, Path(folder), options.repetitions, full=full), flush=True)


if __name__ == "__main__":
    main()
