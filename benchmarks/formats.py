"""How fast fake quantisation is, next to torchao (MX, nvfp4) and en-dtypes (hifp8).

    python benchmarks/formats.py [--size 2048] [--threads 2]

Milliseconds for a size x size tensor, the best of 13 interleaved repetitions, and how often our
best time fits into the peer's. `fake` goes by the compiled kernel; `torch` is what runs where there
is none, and on other devices; `codes` is quantising and dequantising apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

from tensortap import formats, native

Way = Callable[[], object]
REPETITIONS = 13
ELEMENTS = {
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e3m2": DTYPE_FP6_E3M2,
    "mxfp6_e2m3": DTYPE_FP6_E2M3,
    "mxfp4": torch.float4_e2m1fn_x2,
}


def peer(name: str, x: torch.Tensor) -> Way | None:
    """The same work by another library, from tensor to tensor; `None` where there is none."""
    if name in ELEMENTS:
        return lambda: by_torchao(x, ELEMENTS[name])
    if name == "nvfp4":
        return lambda: nvfp4_by_torchao(x)
    if name == "hifp8" and importlib.util.find_spec("en_dtypes"):
        return by_en_dtypes(x)
    return None


def by_torchao(x: torch.Tensor, element: torch.dtype | str) -> torch.Tensor:
    scales, codes = to_mx(x, element, 32, ScaleCalculationMode.FLOOR)
    return to_dtype(codes, scales, element, 32, x.dtype)


def nvfp4_by_torchao(x: torch.Tensor) -> torch.Tensor:
    scale = per_tensor_amax_to_scale(x.abs().amax())
    return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)


def by_en_dtypes(x: torch.Tensor) -> Way:
    """There is no bfloat16 in numpy: en-dtypes is given float32, the conversion is not counted."""
    import en_dtypes

    array = x.float().numpy()
    return lambda: array.astype(en_dtypes.hifloat8).astype(np.float32)


def by_torch(codec: formats.Codec, x: torch.Tensor) -> torch.Tensor:
    with mock.patch.object(native, "library", return_value=None):
        return codec.fake_quantize(x)


def seconds(ways: list[Way]) -> list[float]:
    """The best time of each way, all taking turns."""
    best = [float("inf")] * len(ways)
    for _ in range(REPETITIONS):
        for at, way in enumerate(ways):
            way()  # Memory the way before gave back to the system is taken again outside the clock.
            start = time.perf_counter()
            way()
            best[at] = min(best[at], time.perf_counter() - start)
    return best


def line(name: str, x: torch.Tensor) -> str:
    """Milliseconds of each way, and their ratios to the peer's."""
    codec = formats.get(name)
    ways: list[Way] = [
        lambda: codec.fake_quantize(x),
        lambda: codec.fake_quantize(x, axis=0),
        lambda: by_torch(codec, x),
        lambda: codec.dequantize(codec.quantize(x)),
    ]
    other = peer(name, x)
    spent = seconds(ways if other is None else [*ways, other])
    cells = [f"{way * 1e3:9.2f}" for way in spent]
    if other is None:
        return "".join(cells) + f"{'-':>9}"
    cells += [f"{spent[4] / spent[at]:8.1f}x" for at in (0, 2, 3)]
    return "".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=2048, help="rows and columns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads; kernel: {native.status()}\n")
    heads = ("fake", "axis=0", "torch", "codes", "peer", "fake", "torch", "codes")
    print(f"{'ms; then peer / ours':22}" + "".join(f"{head:>9}" for head in heads))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(options.size, options.size).to(dtype)
        for name in formats.names():
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            print(f"{label:22}{line(name, x)}", flush=True)


if __name__ == "__main__":
    main()
