"""How fast the statistics of one tensor are: compiled kernel, torch operations, naive torch.

    python benchmarks/kernel.py [--mebi 16] [--threads 2]

GB/s of tensor read, the best of interleaved repetitions; the last column is the time of a value
relative to float32 with the same code.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from tensortap import native, stats

Reduce = Callable[[torch.Tensor], object]
DTYPES = ("float32", "float64", "bfloat16", "float16", "float8_e4m3fn", "int64", "int32", "bool")
REPETITIONS = 9


def naive(tensor: torch.Tensor) -> tuple[float, ...]:
    """What a hook is usually seen to do: one call and one `.item()` for each statistic."""
    values = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    calls = (
        values.mean(), values.std(), values.min(), values.max(), values.norm(),
        values.isnan().sum(), values.isinf().sum(),
    )  # fmt: skip
    return tuple(float(call.item()) for call in calls)


def by_torch(tensor: torch.Tensor) -> object:
    """The reference: what runs where there is no compiled kernel."""
    return stats.finish(stats.raw(tensor))


def seconds(tensor: torch.Tensor, ways: Sequence[Reduce]) -> list[float]:
    """The best time of each way, all taking turns."""
    best = [float("inf")] * len(ways)
    for _ in range(REPETITIONS):
        for at, way in enumerate(ways):
            start = time.perf_counter()
            way(tensor)
            best[at] = min(best[at], time.perf_counter() - start)
    return best


def call_cost() -> float:
    """Microseconds for the statistics of a tensor of 8 values."""
    tensor, calls = torch.randn(8), 20_000
    start = time.perf_counter()
    for _ in range(calls):
        stats.statistics(tensor)
    return (time.perf_counter() - start) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mebi", type=int, default=16, help="2**20 values in a tensor")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads; kernel: {native.status()}")
    print(f"{options.mebi} Mi values; one small tensor takes {call_cost():.1f} us\n")
    print(f"{'GB/s':14}{'kernel':>9}{'torch':>9}{'naive':>9}{'per value / float32':>22}")
    ways: list[Reduce] = [stats.statistics, by_torch, naive]
    basis = None
    for name in DTYPES:
        tensor = (torch.randn(options.mebi << 20) * 10).to(getattr(torch, name))
        times = seconds(tensor, ways)
        basis = basis or times[0]
        rates = "".join(f"{tensor.nbytes / spent / 1e9:9.1f}" for spent in times)
        print(f"{name:14}{rates}{times[0] / basis:22.2f}", flush=True)


if __name__ == "__main__":
    main()
