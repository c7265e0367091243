"""The compiled kernel: the torch operations' values, bit for bit, and only where it can serve."""

from __future__ import annotations

import platform
import threading
from pathlib import Path

import pytest
import torch
from tests.core.formats.values import assert_same, magnitudes
from torch._subclasses.fake_tensor import FakeTensorMode

from tensortap import formats, native
from tensortap.formats import compiled
from tensortap.native import build

NAMES = ("hifp8", "mxfp8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "nvfp4")
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def engine() -> str:
    """These tests use both."""
    if native.library() is None:
        pytest.skip(str(native.status()))
    return "both"


def assert_equal_to_torch(codec: formats.Codec, x: torch.Tensor, axis: int = -1) -> None:
    """Values, codes and scales, bit for bit, and each decoded by the other."""
    found, codes = codec.fake_quantize(x, axis), codec.quantize(x, axis)
    decoded = codec.dequantize(codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        wanted, plain = codec.fake_quantize(x, axis), codec.quantize(x, axis)
        assert_same(codec.dequantize(codes), decoded)
    assert_same(found, wanted)
    assert_same(decoded.to(x.dtype), wanted)
    assert torch.equal(codes.codes.view(torch.uint8), plain.codes.view(torch.uint8))
    if plain.scales is not None:
        assert codes.scales is not None
        assert codes.scales.dtype is plain.scales.dtype
        assert torch.equal(codes.scales.view(torch.uint8), plain.scales.view(torch.uint8))
    if plain.tensor_scale is not None:
        assert codes.tensor_scale is not None
        assert_same(codes.tensor_scale, plain.tensor_scale)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_gives_what_torch_gives_for_all_magnitudes(name: str, dtype: torch.dtype) -> None:
    every = torch.from_numpy(magnitudes(200_000)[:200_000].copy()).reshape(400, 500).to(dtype)
    normal = torch.randn(400, 500).to(dtype)
    codec = formats.get(name)
    for x in (every, normal, normal * 2.0**-130, normal * 2.0**125):
        for axis in (0, 1):
            assert_equal_to_torch(codec, x, axis)


@each
def test_it_gives_what_torch_gives_for_every_bfloat16(name: str) -> None:
    """Blocks of neighbours, and of numbers far from each other."""
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    codec = formats.get(name)
    for arranged, axis in ((x, 0), (x.reshape(64, 1024), 0), (x.reshape(64, 1024)[:50, :999], 1)):
        assert_equal_to_torch(codec, arranged, axis)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1,),
        (16385,),
        (3, 16400),
        (70_001, 3),
        (1100, 33),
        (40, 1000, 5),
        (33, 257),
        (2, 33, 4, 300),
    ],
    ids=str,
)
def test_it_gives_what_torch_gives_for_every_cut_into_tasks(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, codec = torch.randn(shape).to(dtype), formats.get(name)
    for axis in range(x.dim()):
        assert_equal_to_torch(codec, x, axis)


@each
def test_threads_share_a_large_tensor(name: str) -> None:
    codec, before = formats.get(name), torch.get_num_threads()
    x = torch.randn(1000, 1024)
    try:
        torch.set_num_threads(2)
        shared = [codec.fake_quantize(x, axis) for axis in (0, 1)]
        torch.set_num_threads(1)
        alone = [codec.fake_quantize(x, axis) for axis in (0, 1)]
    finally:
        torch.set_num_threads(before)
    for left, right in zip(shared, alone, strict=True):
        assert_same(left, right)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiled for several x86-64 levels")
def test_every_loop_is_compiled_for_several_processors(tmp_path: Path) -> None:
    build.compile_library(tmp_path / build.LIBRARY)
    symbols = (tmp_path / build.LIBRARY).read_bytes()
    if b"sums_float.resolver" not in symbols:
        pytest.skip("this compiler knows no clones")
    loops = ("round_row", "round_columns", "round_hifloat8", "decode_run", "widen", "narrow")
    assert [loop for loop in loops if f"{loop}.resolver".encode() not in symbols] == []


def test_a_processor_without_vectors_rounds_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = " ".join(build._compiler())
    script = tmp_path / "cc"
    old = 'case "$*" in *NO_CLONES*) ;; *) echo "unknown arch" >&2; exit 1;; esac'
    script.write_text(f'#!/bin/sh\n{old}\nexec {real} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    build.compile_library(tmp_path / build.LIBRARY)
    plain = native.Library(tmp_path / build.LIBRARY)
    monkeypatch.setattr(native, "library", lambda: plain)
    x = torch.from_numpy(magnitudes(60_000)[:60_000].copy()).reshape(200, 300)
    for name in NAMES:
        assert_equal_to_torch(formats.get(name), x, 0)
        assert_equal_to_torch(formats.get(name), x.bfloat16(), 1)


def test_hifloat8_saturates_as_torch_does() -> None:
    codec = formats.get("hifp8", overflow="saturate")
    x = torch.from_numpy(magnitudes(5000, 10, 20))
    assert_equal_to_torch(codec, x)


@each
def test_a_transposed_tensor_is_rounded_as_it_lies(name: str) -> None:
    x = torch.randn(96, 64)
    found = formats.get(name).fake_quantize(x.t(), axis=1)
    assert found.stride() == x.t().stride()
    assert_equal_to_torch(formats.get(name), x.t(), 1)
    assert_same(found, formats.get(name).fake_quantize(x.t().contiguous(), 1))


@each
def test_threads_that_flush_subnormals_change_nothing(name: str) -> None:
    x, codec = torch.randn(64, 64) * 2.0**-128, formats.get(name)
    wanted = codec.fake_quantize(x)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        found = codec.fake_quantize(x) if name != "nvfp4" else wanted
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, wanted)


def test_transforms_and_fakes_go_by_torch() -> None:
    codec, x = formats.get("mxfp4"), torch.randn(5, 64)
    wanted = codec.fake_quantize(x)
    assert_same(torch.vmap(codec.fake_quantize)(x), wanted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert codec.fake_quantize(x).shape == x.shape
        assert not compiled.serves(x)
    assert compiled.serves(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_never_holds_the_values_of_its_example() -> None:
    served = []

    def function(x: torch.Tensor) -> torch.Tensor:
        served.append(compiled.serves(x))
        return x + 1

    torch.jit.trace(function, (torch.randn(3),), check_trace=False)
    assert served == [False]


def test_compiled_models_may_quantise() -> None:
    codec, x = formats.get("mxfp4"), torch.randn(5, 64)
    function = torch.compile(
        lambda t: codec.fake_quantize(t) + 1.0, backend="eager", fullgraph=True
    )
    assert_same(function(x), codec.fake_quantize(x) + 1.0)


def test_many_threads_may_quantise_at_once() -> None:
    codec, x = formats.get("nvfp4"), torch.randn(64, 512)
    wanted, found = codec.fake_quantize(x), []
    threads = [
        threading.Thread(target=lambda: found.append(codec.fake_quantize(x))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for values in found:
        assert_same(values, wanted)


def test_the_kernel_is_what_serves_plain_tensors() -> None:
    assert compiled.serves(torch.zeros(3))
    assert compiled.serves(torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)))
    assert not compiled.serves(torch.zeros(3, dtype=torch.float64))
    assert not compiled.serves(torch.zeros(3, device="meta"))
