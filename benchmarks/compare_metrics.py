"""How fast all metrics of two tensors are, next to numpy code written like the older scripts.

    python benchmarks/compare_metrics.py [--mebi 32] [--threads 2] [--repetitions 5]

GB/s of both tensors, from memory or mapped from files in the page cache, the best of interleaved
repetitions; `scripts` goes through float32 arrays as those did (and computes less exactly), `numpy`
is what runs where there is no compiled kernel. Then the cost of one small tensor.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from tensortap import native
from tensortap_analysis.metrics import measure_tensors

Floats = npt.NDArray[np.float32]
Way = Callable[[torch.Tensor, torch.Tensor], object]

CASES = (
    ("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"),
    ("float32", "bfloat16"), ("float64", "float64"), ("float8_e4m3fn", "float8_e4m3fn"),
    ("int8", "int8"),
)  # fmt: skip


def by_kernel(ref: torch.Tensor, other: torch.Tensor) -> object:
    return measure_tensors(ref, other)


def by_numpy_pieces(ref: torch.Tensor, other: torch.Tensor) -> object:
    with mock.patch.object(native, "library", return_value=None):
        return measure_tensors(ref, other)


def by_scripts(ref: torch.Tensor, other: torch.Tensor) -> object:
    """One whole-array expression a metric, as the older comparison scripts have it."""
    r, o = ref.float().numpy().reshape(-1), other.float().numpy().reshape(-1)
    d = o - r
    size, relative = np.abs(d), np.abs(d) / (np.abs(r) + 1e-8)
    mse, mae = np.mean(d**2), np.mean(size)
    return (
        [np.isnan(x).sum() for x in (r, o)], [np.isinf(x).sum() for x in (r, o)],
        [(x.mean(), x.std(), x.min(), x.max()) for x in (r, o, d)],
        mse, np.sqrt(mse), mae, size.max(), size.argmax(),
        mse / (np.mean(r**2) + 1e-8), mae / (np.mean(np.abs(r)) + 1e-8),
        relative.max(), relative.mean(), np.median(relative),
        np.linalg.norm(d) / np.linalg.norm(r),
        np.dot(r, o) / (np.linalg.norm(r) * np.linalg.norm(o)), np.corrcoef(r, o)[0, 1],
        10 * np.log10(np.sum(r**2) / np.sum(d**2)),
        np.percentile(size, [50, 90, 95, 99]), ulps(r, o), np.array_equal(r, o),
    )  # fmt: skip


def ulps(ref: Floats, other: Floats) -> tuple[object, object]:
    far = np.abs(ref.view(np.int32).astype(np.int64) - other.view(np.int32))
    return far.max(), far.mean()


def made(names: tuple[str, str], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal values, and the same with an error of one percent."""
    ref = torch.randn(count) * (20 if "int8" in names else 1)
    other = ref * (1 + 0.01 * torch.randn(count))
    one, two = (getattr(torch, name) for name in names)
    return ref.to(one), other.to(two)


def mapped(tensor: torch.Tensor, path: Path) -> torch.Tensor:
    tensor.view(torch.uint8).numpy().tofile(path)
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=tensor.nbytes)
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (tensor.numel(),))


def seconds(
    ref: torch.Tensor, other: torch.Tensor, ways: list[Way], repetitions: int
) -> list[float]:
    """The best time of each way, all taking turns."""
    best = [float("inf")] * len(ways)
    for _ in range(repetitions):
        for at, way in enumerate(ways):
            start = time.perf_counter()
            way(ref, other)
            best[at] = min(best[at], time.perf_counter() - start)
    return best


def small_cost() -> float:
    """Microseconds for a pair of 64 values."""
    ref, other, calls = torch.randn(64), torch.randn(64), 500
    start = time.perf_counter()
    for _ in range(calls):
        measure_tensors(ref, other)
    return (time.perf_counter() - start) / calls * 1e6


def line(names: tuple[str, str], options: argparse.Namespace) -> str:
    ref, other = made(names, options.mebi << 20)
    ways: list[Way] = [by_kernel, by_numpy_pieces, by_scripts]
    spent = seconds(ref, other, ways, options.repetitions)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        files = [mapped(x, Path(folder) / str(n)) for n, x in enumerate((ref, other))]
        spent[1:1] = seconds(files[0], files[1], [by_kernel], options.repetitions)
    nbytes = ref.nbytes + other.nbytes
    rates = "".join(f"{nbytes / time_ / 1e9:9.2f}" for time_ in spent)
    return f"{rates}{spent[3] / spent[0]:10.1f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mebi", type=int, default=32, help="2**20 values in a tensor")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--scratch", type=Path, help="where the mapped files go")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads; kernel: {native.status()}")
    print(f"{options.mebi} Mi values a side; one small pair takes {small_cost():.0f} us\n")
    heads = ("kernel", "mapped", "numpy", "scripts")
    print(f"{'GB/s':28}" + "".join(f"{head:>9}" for head in heads) + f"{'scripts / ours':>16}")
    for names in CASES:
        print(f"{' and '.join(names):28}{line(names, options)}", flush=True)


if __name__ == "__main__":
    main()
