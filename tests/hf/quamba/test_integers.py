"""int8 arithmetic: roundings at their ties, saturation, and products without error."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal

import numpy as np
import pytest
import torch

from tensortap_hf.quamba import integers

TIES = torch.tensor([-128.5, -127.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5])
BELOW_HALF = torch.nextafter(torch.tensor([0.5, 1.5, -0.5]), torch.zeros(3))


def rounded(x: torch.Tensor, rule: str) -> list[int]:
    """Of decimal numbers, which are exact."""
    whole = [int(Decimal(float(v)).quantize(Decimal(1), rounding=rule)) for v in x]
    return [min(127, max(-128, v)) for v in whole]


@pytest.mark.parametrize(
    ("quantize", "rule"),
    [(integers.half_even, ROUND_HALF_EVEN), (integers.half_away, ROUND_HALF_UP)],
)
def test_ties_round_as_the_rule_says(quantize: object, rule: str) -> None:
    x = torch.cat([TIES, BELOW_HALF, torch.linspace(-140, 140, 1001)])
    assert quantize(x, 1.0).codes.tolist() == rounded(x, rule)  # type: ignore[operator]


def test_the_largest_number_below_a_half_rounds_down() -> None:
    """Where adding 0.5 and cutting off would round up."""
    assert integers.half_away(BELOW_HALF, 1.0).codes.tolist() == [0, 1, 0]


def test_a_weight_ends_at_127() -> None:
    weight = torch.tensor([[-3.0, 1.0], [2.0, 0.011]])
    codes = integers.quantize_weight(weight)
    assert codes.codes.tolist() == [[-127, 42], [85, 0]]
    assert codes.scale == pytest.approx(3 / 127, rel=1e-7)


def test_a_weight_of_zeros_has_codes_of_zero() -> None:
    codes = integers.quantize_weight(torch.zeros(3))
    assert codes.scale > 0
    assert codes.values().tolist() == [0.0] * 3


@pytest.mark.parametrize("k", [1, 7, 64, 1024, 1536, 3000])
def test_a_product_of_codes_has_no_error(k: int) -> None:
    generator = np.random.default_rng(k)
    left = generator.integers(-128, 128, (2, 5, k), dtype=np.int8)
    right = generator.integers(-128, 128, (9, k), dtype=np.int8)
    left[0, 0], right[0], right[1] = -128, -128, 127
    product = integers.matmul(torch.from_numpy(left), torch.from_numpy(right))
    assert product.dtype == torch.int32
    np.testing.assert_array_equal(product.numpy(), left.astype(np.int64) @ right.astype(np.int64).T)


def saturating_int_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What vpmaddubsw does: two products are added in 16 bits before the rest."""
    products = left.int()[:, None] * right.T.int()[None]
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767)
    return pairs.sum(-1).int()


def missing_int_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("Could not run 'aten::_int_mm' with arguments from the 'CPU' backend")


@pytest.mark.parametrize("fake_int_mm", [saturating_int_mm, missing_int_mm])
def test_a_machine_without_an_exact_product_is_noticed(
    fake_int_mm: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_int_mm", fake_int_mm)
    integers._int_mm_is_exact.cache_clear()
    try:
        codes = torch.full((3, 8), -128, dtype=torch.int8)
        assert integers.matmul(codes, codes).tolist() == [[8 * 128 * 128] * 3] * 3
    finally:
        integers._int_mm_is_exact.cache_clear()


def test_a_product_is_rescaled_half_to_even_and_saturates() -> None:
    product = torch.tensor([1, 3, 5, -1, -3, 600, -600], dtype=torch.int32)
    codes = integers.rescaled(product, 0.25, 0.5)
    assert codes.codes.tolist() == [0, 2, 2, 0, -2, 127, -128]
    assert codes.scale == 0.5
