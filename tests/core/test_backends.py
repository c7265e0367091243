"""Reduction and snapshots on the CPU, the choice of a backend, and CUDA where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tensortap import backends, stats
from tensortap.backends import Backend, CpuBackend, CudaBackend
from tensortap.errors import NotSupported, PluginError
from tensortap.testing import BackendContract

NAMES = [
    "float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "float8_e8m0fnu", "float4_e2m1fn_x2", "bool", "int8", "int64", "uint16", "uint64",
    "complex32", "complex64", "complex128",
]  # fmt: skip
DTYPES = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HALF_COMPLEX = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


class Memory:
    """Hands out buffers of other bytes, larger than asked for, and notes what was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, nbytes: int) -> torch.Tensor:
        self.asked.append(nbytes)
        return torch.full((nbytes + 100,), 0xA5, dtype=torch.uint8)


def random_bits(dtype: torch.dtype, elements: int) -> torch.Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (elements * size,), dtype=torch.uint8).view(dtype)


def stored(tensor: torch.Tensor) -> bytes:
    """The bytes of the elements in logical order, gathered one by one."""
    size = tensor.element_size()
    storage = bytes(tensor.untyped_storage())
    offset, places = tensor.storage_offset(), [0]
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = [place + i * stride for place in places for i in range(length)]
    return b"".join(storage[(offset + p) * size : (offset + p + 1) * size] for p in places)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    assert tensor.is_contiguous()
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


class TestCpuBackend(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return CpuBackend()

    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cpu")


@HALF_COMPLEX
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_snapshot_keeps_every_bit_of_every_dtype_and_layout(dtype: torch.dtype) -> None:
    whole = random_bits(dtype, 120)
    for tensor in (
        whole, whole.view(4, 5, 6).permute(2, 0, 1), whole.view(10, 12)[1:, ::5], whole[7],
        whole[:0].view(0, 3), whole[:6].view(6, 1).expand(6, 4),
    ):  # fmt: skip
        memory = Memory()
        snapshot = CpuBackend().snapshot(tensor, memory)
        host = snapshot.host()
        assert (host.dtype, host.shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(host) == stored(tensor)
        assert snapshot.nbytes == tensor.numel() * tensor.element_size()
        assert memory.asked == ([snapshot.nbytes] if tensor.numel() else [])


@HALF_COMPLEX
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [2, 7, 1000])
def test_a_sample_is_every_nth_element_in_logical_order(dtype: torch.dtype, stride: int) -> None:
    whole = random_bits(dtype, 120)
    size = whole.element_size()
    for tensor in (whole, whole.view(10, 12).t(), whole.view(10, 12)[:, ::5], whole[3]):
        host = CpuBackend().snapshot(tensor, Memory(), stride=stride).host()
        everything = stored(tensor)
        elements = [everything[at : at + size] for at in range(0, len(everything), size)]
        assert host.shape == (-(-len(elements) // stride),)
        assert raw_bytes(host) == b"".join(elements[::stride])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_conjugated_and_negated_views_are_copied_as_what_they_show(dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 8, dtype=dtype)
    for view in (tensor.conj(), tensor.t().conj()[:, 1:], tensor.conj().imag):
        for stride in (1, 3):
            host = CpuBackend().snapshot(view, Memory(), stride=stride).host()
            assert (host.is_conj(), host.is_neg()) == (False, False)
            shown = view.resolve_conj().resolve_neg().contiguous()
            assert torch.equal(host, shown if stride == 1 else shown.view(-1)[::stride])


def test_a_snapshot_of_a_parameter_has_no_history() -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    host = CpuBackend().snapshot(parameter, Memory()).host()
    assert not host.requires_grad
    with torch.inference_mode():
        inside = CpuBackend().snapshot(torch.ones(2, 3).t(), Memory()).host()
    assert inside.tolist() == [[1.0, 1.0]] * 3


def test_vectors_from_a_device_come_back_in_one_batch_and_in_order() -> None:
    tensors = [
        torch.randn(5),
        torch.zeros(0),
        torch.randn(200_000).to(torch.bfloat16),
        torch.eye(3),
    ]
    wanted = [True, False, True, False]
    vectors = [stats.raw(t, exponents=e) for t, e in zip(tensors, wanted, strict=True)]
    for found, tensor, exponents in zip(backends.resolve(vectors), tensors, wanted, strict=True):
        expected = stats.statistics(tensor, exponents=exponents)
        assert (found.count, found.zero, found.max, found.exponents) == (
            expected.count, expected.zero, expected.max, expected.exponents,
        )  # fmt: skip
        if tensor.numel():
            assert found.l2 == pytest.approx(expected.l2, rel=1e-12)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution with a backend module; the choice of backends starts afresh."""
    info = tmp_path / "odd_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tensortap.backends]\nmeta = odd_backend:Good\nmps = odd_backend:Half\n"
        "xpu = odd_backend_that_is_not_there:Good\nhpu = odd_backend:Good\n"
    )
    (tmp_path / "odd_backend.py").write_text(
        "from tensortap.backends import CpuBackend\n"
        "class Good(CpuBackend): pass\n"
        "class Half:\n    def reduce(self, tensor, *, exponents): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    backends._for_type.cache_clear()
    yield tmp_path
    backends._for_type.cache_clear()


def test_a_device_type_has_one_backend() -> None:
    cpu = backends.for_device(torch.device("cpu"))
    assert isinstance(cpu, CpuBackend)
    assert backends.for_device(torch.device("cpu", 0)) is cpu
    first, second = (backends.for_device(torch.device("cuda", index)) for index in (0, 1))
    assert isinstance(first, CudaBackend)
    assert first is second


def test_a_device_nobody_serves_is_named() -> None:
    with pytest.raises(NotSupported, match=r"'vulkan'.*cpu and cuda.*tensortap\.backends"):
        backends.for_device(torch.device("vulkan"))


def test_an_installed_plugin_serves_its_device_type(plugins: Path) -> None:
    backend = backends.for_device(torch.device("meta"))
    assert type(backend).__name__ == "Good"
    assert isinstance(backends.for_device(torch.device("cpu")), CpuBackend)


def test_a_plugin_that_does_not_load_is_not_taken_for_an_absent_one(plugins: Path) -> None:
    with pytest.raises(PluginError, match="odd_backend_that_is_not_there"):
        backends.for_device(torch.device("xpu"))


def test_a_plugin_that_is_no_backend_is_told_what_it_lacks(plugins: Path) -> None:
    with pytest.raises(PluginError, match="odd_backend:Half has no snapshot, flush"):
        backends.for_device(torch.device("mps"))


def test_two_plugins_for_one_device_type_are_an_error(plugins: Path) -> None:
    other = plugins / "other_backend-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other-backend\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[tensortap.backends]\nhpu = other_backend:Good\n")
    with pytest.raises(PluginError, match="odd_backend:Good, other_backend:Good"):
        backends.for_device(torch.device("hpu"))


@CUDA
@pytest.mark.gpu
class TestCudaBackend(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return CudaBackend()

    @pytest.fixture
    def device(self) -> torch.device:
        return torch.device("cuda")


@CUDA
@pytest.mark.gpu
def test_nothing_but_flush_and_host_waits_for_the_gpu() -> None:
    backend = CudaBackend()
    tensors = [
        torch.randn(300, 70, device="cuda").to(dtype).t()
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64)
    ]
    rooms = [torch.empty(t.nbytes, dtype=torch.uint8, pin_memory=True) for t in tensors]
    torch.cuda.set_sync_debug_mode("error")
    try:
        reductions = [backend.reduce(tensor, exponents=True) for tensor in tensors]
        snapshots = [
            backend.snapshot(tensor, lambda nbytes, room=room: room)
            for tensor, room in zip(tensors, rooms, strict=True)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kept = [tensor.cpu() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    for found, snapshot, tensor in zip(backend.flush(reductions), snapshots, kept, strict=True):
        wanted = stats.statistics(tensor, exponents=True)
        assert (found.count, found.exponents, found.max) == (
            wanted.count, wanted.exponents, wanted.max,
        )  # fmt: skip
        assert torch.equal(snapshot.host(), tensor)


@CUDA
@pytest.mark.gpu
def test_work_on_another_stream_is_waited_for_by_the_flush() -> None:
    backend, side = CudaBackend(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        tensor = torch.full((1000,), 3.0, device="cuda")
        reduction = backend.reduce(tensor, exponents=False)
    assert backend.flush([reduction])[0].mean == 3.0
