"""The statistics, by the compiled kernel and by torch operations, against numpy long doubles."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tensortap import native, stats
from tensortap.errors import NotSupported
from tensortap.records import Statistics

Compute = Callable[..., Statistics]

NAMES = [
    "float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "bool",
    "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64",
    "complex32", "complex64", "complex128",
]  # fmt: skip
DTYPES = [getattr(torch, name) for name in NAMES if hasattr(torch, name)]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def by_kernel(tensor: torch.Tensor, *, exponents: bool = False) -> Statistics:
    library = native.library()
    if library is None:
        pytest.skip(f"no compiled kernel here: {native.status()}")
    return library.statistics(tensor, exponents=exponents)


def by_torch(tensor: torch.Tensor, *, exponents: bool = False) -> Statistics:
    return stats.finish(stats.raw(tensor, exponents=exponents))


BOTH = pytest.mark.parametrize("compute", [by_kernel, by_torch])


def numbers(tensor: torch.Tensor) -> list[float | int]:
    """The values in logical order, exactly, as Python numbers."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if "float4" in str(tensor.dtype):
        packed = tensor.view(torch.uint8).flatten().tolist()
        return [FP4[code] for byte in packed for code in (byte & 15, byte >> 4)]
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        return tensor.to(torch.float64).flatten().tolist()
    return [int(value) for value in tensor.flatten().tolist()]


def expected(values: list[float | int]) -> Statistics:
    """Straight from the definition, in 80-bit floats, two passes over the whole."""
    finite = [v for v in values if isinstance(v, int) or math.isfinite(v)]
    counts = (
        len(values),
        sum(v != v for v in values),
        values.count(math.inf),
        values.count(-math.inf),
        values.count(0),
    )
    first = tuple(float(v) for v in values[:10])
    powers: dict[int, int] = {}
    for v in finite:
        if v:
            e = abs(v).bit_length() - 1 if isinstance(v, int) else math.frexp(v)[1] - 1
            powers[e] = powers.get(e, 0) + 1
    if not finite:
        return Statistics(*counts, *(None,) * 8, first, powers)
    x = np.array(finite, dtype=np.longdouble)
    n = np.longdouble(len(x))
    mean, l2 = x.sum() / n, np.sqrt((x * x).sum())
    moments = (x.min(), x.max(), abs(x).max(), mean, np.sqrt(((x - mean) ** 2).sum() / n))
    sums = (l2 / np.sqrt(n), abs(x).sum(), l2)
    with np.errstate(over="ignore"):
        return Statistics(*counts, *(float(value) for value in moments + sums), first, powers)


def assert_same(found: Statistics, wanted: Statistics) -> None:
    for field in ("count", "nan", "posinf", "neginf", "zero", "min", "max", "absmax"):
        assert getattr(found, field) == getattr(wanted, field), field
    np.testing.assert_array_equal(found.first, wanted.first)
    if found.exponents is not None:
        assert found.exponents == wanted.exponents
    if wanted.absmax is None:
        assert [found.mean, found.std, found.rms, found.l1, found.l2] == [None] * 5
        return
    # A mean that cancels, or a spread far below the values, is good to the size of the values.
    for field, slack in (("rms", 0), ("l1", 0), ("l2", 0), ("mean", 1e-14), ("std", 1e-14)):
        want = getattr(wanted, field)
        close = pytest.approx(want, rel=1e-11, abs=slack * wanted.absmax + 5e-324)
        assert getattr(found, field) == close, field


def bits(dtype: torch.dtype, nbytes: int = 24576) -> torch.Tensor:
    """Every bit pattern of up to 8 bits, and random ones of more: NaN, infinities, subnormals."""
    every = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)
    return torch.cat([every, torch.randint(0, 256, (nbytes,), dtype=torch.uint8)]).view(dtype)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "scalar": lambda x: x[17],
    "empty": lambda x: x[:0],
    "empty in one axis": lambda x: x[:0].reshape(3, 0, 2),
    "transposed": lambda x: x[:1500].view(30, 50).t(),
    "permuted": lambda x: x[:1680].view(4, 6, 10, 7).permute(2, 0, 3, 1),
    "rows cut": lambda x: x[:1500].view(30, 50)[3:, 5:44],
    "every third": lambda x: x[:1500].view(30, 50)[:, ::3],
    "permuted and cut": lambda x: x[:1680].view(4, 6, 10, 7).permute(2, 0, 3, 1)[1:, :, 2:6],
    "expanded": lambda x: x[:5].view(5, 1, 1).expand(5, 7, 2),
    "overlapping windows": lambda x: x[:100].unfold(0, 20, 3),
    "long column": lambda x: x[: len(x) // 2 * 2].view(-1, 2)[:, 1],
}


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype_and_layout_has_the_statistics_of_its_values(
    dtype: torch.dtype, layout: str, compute: Compute
) -> None:
    tensor = LAYOUTS[layout](bits(dtype))
    assert_same(compute(tensor, exponents=True), expected(numbers(tensor)))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_of_the_65536_half_precision_numbers_is_read_right(
    dtype: torch.dtype, compute: Compute
) -> None:
    tensor = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    assert_same(compute(tensor, exponents=True), expected(numbers(tensor)))
    one = [compute(value).first for value in tensor[::37]]
    np.testing.assert_array_equal(np.ravel(one), tensor[::37].double())


def test_half_precision_is_read_right_without_conversion_instructions() -> None:
    # Odd lengths leave a rest that the vectorised conversion does not take.
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    for tensor in (every[31743:31750], every[:7], every[1020:1027], every[64500:64507]):
        assert_same(by_kernel(tensor), expected(numbers(tensor)))


@BOTH
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_conjugated_and_negated_views_count_as_what_they_show(
    dtype: torch.dtype, compute: Compute
) -> None:
    tensor = torch.randn(300, 20, dtype=dtype)
    views = (
        tensor.conj(), tensor.t().conj(), tensor.conj()[:, ::3], tensor.conj().imag,
        torch._neg_view(tensor), torch._neg_view(tensor.conj()), tensor[0, 0].conj(),
    )  # fmt: skip
    for view in views:
        assert_same(compute(view, exponents=True), expected(numbers(view)))


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """A float tensor over a small buffer, with any strides: 0, overlapping, permuted."""
    width = draw(st.sampled_from([32, 64]))
    values = draw(st.lists(st.floats(width=width), min_size=1, max_size=40))
    dtype = torch.float32 if width == 32 else torch.float64
    buffer = torch.tensor(values, dtype=dtype)
    shape, strides, reach = [], [], 0
    for _ in range(draw(st.integers(0, 4))):
        stride = draw(st.integers(0, 7))
        most = (len(values) - 1 - reach) // stride + 1 if stride else 4
        size = draw(st.integers(0, min(most, 6)))
        reach += stride * max(size - 1, 0)
        shape.append(size)
        strides.append(stride)
    return buffer.as_strided(shape, strides, draw(st.integers(0, len(values) - 1 - reach)))


@given(strided())
def test_any_strides_over_any_values(tensor: torch.Tensor) -> None:
    wanted = expected(numbers(tensor))
    for compute in (by_kernel, by_torch):
        assert_same(compute(tensor, exponents=True), wanted)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60), st.integers(1, 5)
)
def test_pieces_of_any_size_give_the_same_statistics(values: list[float], size: int) -> None:
    tensor = torch.tensor(values * 6).view(3, 2, -1).transpose(0, 2)[:, :, 1:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "_PIECE", {"cpu": size})
        assert_same(by_torch(tensor, exponents=True), expected(numbers(tensor)))


@BOTH
@pytest.mark.parametrize("size", [2047, 2048, 2049, 65535, 65536, 65537, 300_001])
def test_blocks_and_chunks_are_merged_without_a_seam(size: int, compute: Compute) -> None:
    tensor = torch.randn(size) * torch.logspace(-6, 6, size) + 3
    tensor[:: max(1, size // 5)] = math.nan
    assert_same(compute(tensor, exponents=True), expected(numbers(tensor)))


@BOTH
@pytest.mark.parametrize(
    ("dtype", "mean", "spread"),
    [(torch.float32, 1e4, 1e-2), (torch.float32, 1e30, 1e24), (torch.float64, 1e9, 1e-5)],
)
def test_a_large_mean_does_not_cancel_the_variance(
    dtype: torch.dtype, mean: float, spread: float, compute: Compute
) -> None:
    tensor = (torch.randn(10_000, dtype=torch.float64) * spread + mean).to(dtype)
    wanted = expected(numbers(tensor))
    assert compute(tensor).std == pytest.approx(wanted.std, rel=1e-7)
    assert compute(torch.full((5000,), mean, dtype=dtype)).std == 0.0


@BOTH
@pytest.mark.parametrize("value", [1e200, 1.7e308, 1e-200, 5e-324])
def test_the_norm_of_finite_float64_is_as_finite_as_the_values(
    value: float, compute: Compute
) -> None:
    found = compute(torch.tensor([value, -value, 0.0, math.nan], dtype=torch.float64))
    assert found.rms == pytest.approx(value * math.sqrt(2 / 3), rel=1e-12, abs=5e-324)
    assert found.std == pytest.approx(found.rms, rel=1e-12)
    assert found.l2 == pytest.approx(value * math.sqrt(2), rel=1e-12, abs=5e-324)


@BOTH
def test_magnitudes_of_all_sizes_may_be_mixed(compute: Compute) -> None:
    tensor = torch.logspace(-300, 300, 200_000, dtype=torch.float64)
    assert_same(compute(tensor, exponents=True), expected(numbers(tensor)))


@BOTH
def test_the_norm_of_finite_float32_is_finite(compute: Compute) -> None:
    found = compute(torch.full((100_000,), 3e38))
    assert found.l2 == pytest.approx(3e38 * math.sqrt(100_000), rel=1e-6)
    assert found.l1 == pytest.approx(3e43, rel=1e-6)


@BOTH
def test_one_outlier_in_a_block_leaves_the_rest_its_spread(compute: Compute) -> None:
    tensor = torch.randn(50_000, dtype=torch.float64)
    tensor[0] = 1e6
    assert_same(compute(tensor), expected(numbers(tensor)))


@BOTH
def test_wide_integers_keep_their_power_of_two(compute: Compute) -> None:
    signed = torch.tensor([2**62 - 1, 2**63 - 1, -(2**63), -(2**53) - 1, 0, 1, -1])
    assert compute(signed, exponents=True).exponents == {61: 1, 62: 1, 63: 1, 53: 1, 0: 2}
    unsigned = torch.tensor([2**64 - 1, 2**63, 2**63 - 1, 3], dtype=torch.uint64)
    assert compute(unsigned, exponents=True).exponents == {63: 2, 62: 1, 1: 1}


@BOTH
def test_nothing_finite_leaves_no_moments(compute: Compute) -> None:
    found = compute(torch.tensor([math.nan, math.inf, -math.inf] * 3000), exponents=True)
    assert (found.count, found.finite) == (9000, 0)
    assert (found.nan, found.posinf, found.neginf) == (3000, 3000, 3000)
    assert found.mean is found.min is found.l2 is None
    assert found.exponents == {}


@BOTH
def test_an_expanded_tensor_costs_no_more_than_what_it_stores(compute: Compute) -> None:
    found = compute(torch.tensor([[3.0], [-1.0]]).expand(2, 10**12))
    assert (found.count, found.mean, found.std, found.l1) == (2 * 10**12, 1.0, 2.0, 4e12)
    assert found.first == (3.0,) * 10


@BOTH
def test_leading_values_are_in_logical_order(compute: Compute) -> None:
    tensor = torch.arange(24.0).view(4, 6).t()
    assert compute(tensor).first == (0, 6, 12, 18, 1, 7, 13, 19, 2, 8)


@BOTH
def test_zeros_of_either_sign_are_zeros(compute: Compute) -> None:
    found = compute(torch.tensor([-0.0, -0.0, 0.0]))
    assert found.zero == 3
    assert math.copysign(1, found.min or 0) == math.copysign(1, found.max or 0) == 1
    assert math.copysign(1, found.first[0]) == -1


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_nothing_is_changed_by_looking(dtype: torch.dtype, compute: Compute) -> None:
    tensor = LAYOUTS["permuted"](bits(dtype))
    random = torch.get_rng_state()
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    copy = storage.clone()
    compute(tensor, exponents=True)
    assert torch.equal(storage, copy)
    assert torch.equal(torch.get_rng_state(), random)


@BOTH
def test_autograd_neither_sees_nor_stops_the_reduction(compute: Compute) -> None:
    leaf = torch.randn(10, requires_grad=True)
    compute(leaf * 2)
    (leaf * 2).sum().backward()
    assert leaf.grad is not None
    with torch.inference_mode():
        inside = torch.ones(3)
        assert compute(inside).mean == 1.0
    assert compute(inside).mean == 1.0
    assert not stats.raw(leaf).requires_grad


def test_subnormals_are_no_zeros_even_where_threads_flush_them() -> None:
    tensor = torch.full((1_000_000,), 1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush subnormals")
    try:
        found = by_kernel(tensor)
        assert torch.equal(tensor[:1] * 1, torch.zeros(1)), "the setting of the thread is kept"
    finally:
        torch.set_flush_denormal(False)
    assert found.zero == 0
    assert found.mean == pytest.approx(1e-40, rel=1e-4)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_the_number_of_threads_does_not_change_one_bit(
    dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    tensor = (torch.randn(3_000_001) * 50).to(dtype)
    found = []
    for count in (1, 2, 3, 2):
        threads(count)
        found.append(by_kernel(tensor, exponents=True))
    assert found[0] == found[1] == found[2] == found[3]


class _Largest(TorchDispatchMode):
    """Notes the most bytes any operation allocated for a result."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.nbytes = 0
        self._given = tensor.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (list, tuple)) else [result]:
            if not isinstance(out, torch.Tensor):
                continue
            storage = out.untyped_storage()
            if storage.data_ptr() != self._given:
                self.nbytes = max(self.nbytes, storage.nbytes())
        return result


@pytest.mark.parametrize("view", ["whole", "transposed", "cut", "conjugated"])
def test_torch_operations_never_copy_a_tensor_as_a_whole(view: str) -> None:
    tensor = torch.zeros(1000, 1000, dtype=torch.bfloat16)
    if view == "conjugated":
        tensor = torch.zeros(1000, 500, dtype=torch.complex64).conj()
    shown = {"transposed": tensor.t(), "cut": tensor[:, 1:]}.get(view, tensor)
    with _Largest(shown) as largest:
        stats.raw(shown)
    assert 0 < largest.nbytes <= 1 << 20


def test_a_device_is_never_waited_for() -> None:
    # A fake CUDA tensor has no values: whatever would bring one to the host raises.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.complex64):
            tensor = torch.empty(5000, 900, dtype=dtype, device="cuda").t()
            found = stats.raw(tensor, exponents=True)
            assert (found.device.type, found.dtype) == ("cuda", torch.float64)
            with pytest.raises(Exception, match="_local_scalar_dense"):
                found.max().item()


def test_deterministic_algorithms_are_enough_for_the_reduction() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert by_torch(torch.tensor([1.0, 4.0]), exponents=True).exponents == {0: 1, 2: 1}
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.empty(3, device="meta"), "meta"),
        (torch.zeros(3, dtype=torch.uint8).view(torch.bits8), "bits8"),
    ],
)
def test_what_holds_no_readable_values_is_refused_by_name(tensor: torch.Tensor, word: str) -> None:
    with pytest.raises(NotSupported, match=word):
        stats.statistics(tensor)


def test_a_forked_child_reduces_large_tensors_although_its_threads_are_gone() -> None:
    script = """
import os, torch
from tensortap import stats
torch.set_num_threads(2)
tensor = torch.randn(2_000_000)
before = stats.statistics(tensor)
child = os.fork()
if child == 0:
    os._exit(0 if stats.statistics(tensor) == before else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], timeout=60, env=os.environ, check=False
    )
    assert done.returncode == 0


def test_statistics_take_the_kernel_and_agree_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000).to(torch.bfloat16)
    with_kernel = stats.statistics(tensor, exponents=True)
    monkeypatch.setattr(native, "library", lambda: None)
    without = stats.statistics(tensor, exponents=True)
    assert_same(with_kernel, dataclasses.replace(without))
