"""What calibration remembers: maxima, and smoothed quantiles of tensors of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tensortap_hf.quamba.observers import MinMax, Percentile, quantile


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.99, 0.9995, 0.9999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 17, 5000])
def test_a_quantile_is_numpys(alpha: float, count: int) -> None:
    x = torch.rand(count, generator=torch.Generator().manual_seed(count))
    assert quantile(x, alpha) == pytest.approx(np.quantile(x.double().numpy(), alpha), rel=1e-12)


def test_a_quantile_of_more_than_torch_can() -> None:
    x = torch.arange(16_777_217, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.5)
    assert quantile(x.view(1, 1, -1), 0.9995) == pytest.approx(0.9995 * 16_777_216, rel=1e-7)


def test_a_maximum_is_that_of_all_samples() -> None:
    observer = MinMax()
    assert observer.maximum is None
    for sample in (torch.tensor([[1.0, -2.5]]), torch.tensor([[2.0]])):
        observer.see(sample)
    assert observer.maximum == 2.5


def test_a_percentile_moves_a_hundredth_towards_each_later_sample() -> None:
    samples = [torch.randn(50), torch.randn(80) * 3, torch.randn(20)]
    observer = Percentile(0.9)
    for sample in samples:
        observer.see(sample)
    first, second, third = (np.quantile(np.abs(s.double().numpy()), 0.9) for s in samples)
    expected = first + 0.01 * (second - first)
    expected += 0.01 * (third - expected)
    assert observer.maximum == pytest.approx(expected, rel=1e-12)
