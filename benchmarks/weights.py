"""What scanning weights takes, next to weightwatcher and to plain torch code on the same files.

    python benchmarks/weights.py [--quick] [--scratch DIR] [--peer-python PYTHON]

Three tables: values one by one, in GB/s of a bfloat16 file in the page cache; spectra, against
`torch.linalg.svdvals` in float64; and a folder of the shapes of GPT-2 (124 million float32 values)
with all methods. Ways take turns; the best time of each counts. weightwatcher runs in the peers'
environment (`make bench` makes it), and is left out where that is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tensortap import native
from tensortap_analysis.weights import METHODS, Options, Scope
from tensortap_analysis.weights.measures import measure

HERE = Path(__file__).resolve().parent
ROUNDS = 5
VALUES = ("quantization", "sparsity", "norms")
SPECTRA = ((768, 768), (3072, 768), (768, 3072), (2048, 2048), (16384, 1024))
GPT2 = {"wte": (50257, 768), "wpe": (1024, 768)}
BLOCK = {"c_attn": (768, 2304), "attn_proj": (768, 768), "c_fc": (768, 3072), "c_proj": (3072, 768)}
Way = Callable[[], object]


def best(ways: Sequence[Way], rounds: int = ROUNDS) -> list[float]:
    """Seconds of each way, all taking turns."""
    found = [float("inf")] * len(ways)
    for _ in range(rounds):
        for at, way in enumerate(ways):
            start = time.perf_counter()
            way()
            found[at] = min(found[at], time.perf_counter() - start)
    return found


def bfloat16_file(folder: Path, mebi: int) -> Path:
    path = folder / "values.safetensors"
    matrices = {f"{at}.weight": torch.randn(4096, 4096).bfloat16() for at in range(mebi // 32)}
    save_file(matrices, path)
    return path


def gpt2_folder(folder: Path, layers: int) -> Path:
    """Random values with the shapes of GPT-2; a real one takes as long."""
    shapes = {**GPT2, **{f"h.{n}.{name}": s for n in range(layers) for name, s in BLOCK.items()}}
    target = folder / "gpt2"
    target.mkdir()
    weights = {f"{name}.weight": torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text("{}")
    return target


def read_plainly(path: Path) -> int:
    """Every byte into one buffer, and no more."""
    buffer, total = bytearray(1 << 24), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def read_as_float64(path: Path, threads: int) -> float:
    """Every value to float64, and a sum: the least there is to do at that precision."""
    torch.set_num_threads(threads)
    total = 0.0
    for weight in load_file(path).values():
        for piece in weight.view(-1).split(1 << 16):
            total += float(piece.double().sum())
    return total


def values_plainly(path: Path) -> list[tuple[float, ...]]:
    """One expression a metric, as scripts do it; without duplicated rows and int8 per channel."""
    return [plain_values(weight) for weight in load_file(path).values()]


def plain_values(weight: torch.Tensor) -> tuple[float, ...]:
    w = weight.float()
    size, mean, std = w.abs(), w.mean(), w.std()
    scale = size.max() / 127
    noise = w - torch.clamp(torch.round(w / scale), -127, 127) * scale
    rows = w.norm(dim=1)
    metrics = (
        size.sum(), w.norm(), size.max(), mean, std, rows.max(), rows.min(), rows.std(),
        w.isnan().sum(), w.isinf().sum(), (w == 0).sum(), (size < 1e-3 * w.square().mean()).sum(),
        (w == 0).all(0).sum(), (w == 0).all(1).sum(), ((w - mean).abs() > 3 * std).sum(),
        size.max() / size.mean(), ((w - mean) / std).pow(4).mean(),
        10 * torch.log10(w.square().sum() / noise.square().sum()),
    )  # fmt: skip
    return tuple(float(metric) for metric in metrics)


def spectra_plainly(weight: torch.Tensor) -> tuple[float, ...]:
    s = torch.linalg.svdvals(weight.double())
    p = s / s.sum()
    energy = torch.cumsum(s.square(), 0) / s.square().sum()
    metrics = (
        s[0] / s[-1], s.square().sum() / s[0] ** 2, (s > 1e-7 * s[0]).sum(),
        (-(p * p.log()).sum()).exp(), (energy < 0.9).sum(), (energy < 0.99).sum(),
    )  # fmt: skip
    return tuple(float(metric) for metric in metrics)


def scan(path: Path, methods: Sequence[str], formats: bool, workers: int) -> Way:
    options = Options() if formats else Options(formats=())
    return lambda: Scope(path).scan(methods, parallel=workers, options=options)


def values_table(folder: Path, mebi: int, workers: int) -> None:
    path = bfloat16_file(folder, mebi)
    ways: dict[str, Way] = {
        "a plain read of the bytes": lambda: read_plainly(path),
        "a sum in float64, 1 thread": lambda: read_as_float64(path, 1),
        f"a sum in float64, {workers} threads": lambda: read_as_float64(path, workers),
        "these metrics in plain torch": lambda: values_plainly(path),
        "tensortap, 1 worker": scan(path, VALUES, False, 1),
        f"tensortap, {workers} workers": scan(path, VALUES, False, workers),
    }
    print(f"\nvalues one by one, {mebi} MiB of bfloat16\n{'':32}{'GB/s':>8}{'times a sum':>14}")
    spent = dict(zip(ways, best(list(ways.values())), strict=True))
    for name, seconds in spent.items():
        print(f"{name:32}{path.stat().st_size / seconds / 1e9:8.2f}{_times_a_sum(name, spent)}")


def _times_a_sum(name: str, spent: dict[str, float]) -> str:
    """Ours over a sum on as many cores."""
    words = name.partition("tensortap, ")[2].split()
    same = [one for one in spent if words and one.startswith(f"a sum in float64, {words[0]} ")]
    return f"{spent[name] / spent[same[0]]:13.2f}x" if same else ""


def spectra_table(quick: bool) -> None:
    """One matrix on one thread, as a worker has it."""
    heads = ("ours", "svdvals", "ratio", "error")
    print("\nall singular values on one thread, ms; largest relative error")
    print(f"{'':32}" + "".join(f"{head:>10}" for head in heads))
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SPECTRA[: 3 if quick else None]:
            name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            print(f"{name:32}{spectra_line(torch.randn(shape).to(dtype))}", flush=True)


def spectra_line(weight: torch.Tensor) -> str:
    options = Options(full_spectrum=True)

    def ours() -> list[float]:
        found = measure(weight, weight.dtype, ["spectral"], options)["spectral"]["spectrum"]
        assert isinstance(found, list)
        return found

    torch.set_num_threads(1)
    times = best([ours, lambda: torch.linalg.svdvals(weight.double())], 3)
    exact = torch.linalg.svdvals(weight.double())
    error = float(((torch.tensor(ours(), dtype=torch.float64) - exact).abs() / exact).max())
    cells = "".join(f"{spent * 1e3:10.1f}" for spent in times)
    return f"{cells}{times[1] / times[0]:9.2f}x{error:10.1e}"


def spectra_of_file(folder: Path, workers: int) -> None:
    """All matrices of two layers of GPT-2, on all cores: several at once, or one after another."""
    path = folder / "spectra.safetensors"
    shapes = {f"h.{n}.{name}": shape for n in range(2) for name, shape in BLOCK.items()}
    save_file({f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}, path)

    def plainly() -> None:
        torch.set_num_threads(workers)
        for weight in load_file(path).values():
            torch.linalg.svdvals(weight.double())

    ours, theirs = best([scan(path, ["spectral"], False, workers), plainly], 3)
    print(f"two layers of GPT-2 on {workers} cores: ours {ours * 1e3:.0f} ms, svdvals "
          f"{theirs * 1e3:.0f} ms, {theirs / ours:.2f}x", flush=True)  # fmt: skip


def whole_plainly(folder: Path) -> None:
    for weight in load_file(folder / "model.safetensors").values():
        plain_values(weight)
        spectra_plainly(weight)


def folder_table(folder: Path, layers: int, workers: int, peer: Path) -> None:
    target = gpt2_folder(folder, layers)
    print(f"\nshapes of GPT-2, {layers} layers, all methods")
    print(f"{'':32}{'s':>8}{'CPU s':>8}{'peak MiB':>10}{'of imports':>12}")
    for name, lane in (
        (f"tensortap, {workers} workers", f"scan{workers}"), ("tensortap, 1 worker", "scan1"),
        ("plain torch, no block formats", "plain"),
    ):  # fmt: skip
        print(f"{name:32}{in_process(target, lane)}", flush=True)
    if not peer.exists():
        print(f"weightwatcher: {peer} is missing; `make bench` makes it")
        return
    script = [str(peer), str(HERE / "weights_peer.py"), str(target)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"weightwatcher failed: {done.stderr.strip().splitlines()[-1]}")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    label = f"weightwatcher {found['version']}, {found['layers']} layers"
    cells = f"{found['seconds']:8.1f}{found['cpu_seconds']:8.1f}{found['peak_mib']:10.0f}"
    print(f"{label:32}{cells}")


def in_process(target: Path, lane: str) -> str:
    """Seconds, CPU seconds, and peak memory of a process of its own, in all and of its imports."""
    command = [sys.executable, str(HERE / "weights.py"), "--lane", lane, "--scratch", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, busy, peak, before = map(float, done.stdout.split()[-4:])
    return f"{seconds:8.1f}{busy:8.1f}{peak:10.0f}{before:12.0f}"


def run_lane(lane: str, target: Path) -> None:
    start, busy, before = time.perf_counter(), time.process_time(), peak_mib()
    if lane == "plain":
        whole_plainly(target)
    else:
        scan(target, METHODS, True, int(lane.removeprefix("scan")))()
    spent, busy = time.perf_counter() - start, time.process_time() - busy
    print(spent, busy, peak_mib(), before)


def peak_mib() -> float:
    """What this process has held at most; on Linux not what the one that started it had."""
    account = Path("/proc/self/status")
    if account.exists():
        found = re.search(r"VmHWM:\s*(\d+)", account.read_text())
        assert found
        return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small files: does it run at all?")
    parser.add_argument("--scratch", type=Path, help="where the files are made")
    parser.add_argument("--peer-python", type=Path, default=HERE.parent / ".bench-venv/bin/python")
    parser.add_argument("--lane", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.lane:
        run_lane(options.lane, options.scratch)
        return
    workers = len(os.sched_getaffinity(0))
    print(f"torch {torch.__version__}, {workers} cores; kernel: {native.status()}")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        values_table(folder, 64 if options.quick else 512, workers)
        spectra_table(options.quick)
        spectra_of_file(folder, workers)
        folder_table(folder, 1 if options.quick else 12, workers, options.peer_python)


if __name__ == "__main__":
    main()
