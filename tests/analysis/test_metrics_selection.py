"""Exact percentiles in bounded memory, however the values are spread."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensortap import native
from tensortap.native import counts
from tensortap_analysis.metrics import measure_tensors, selection

COUNT = 6000


def spread() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    near = 1.0 + random.random(COUNT) * 2.0**-42
    return {
        "normal": abs(random.standard_normal(COUNT)),
        "many decades": 10.0 ** random.uniform(-300, 300, COUNT),
        "one bin": near,
        "two neighbours": np.where(random.random(COUNT) < 0.5, 1.0, np.nextafter(1.0, 2.0)),
        "all equal": np.full(COUNT, 0.3),
        "few values": random.integers(0, 5, COUNT) / 7,
        "mostly zero": np.where(random.random(COUNT) < 0.92, 0.0, near),
        "subnormal": random.integers(0, 999, COUNT) * 5e-324,
        "short mantissas": random.integers(1, 1 << 9, COUNT) * 2.0 ** random.integers(-9, 0, COUNT),
        "ties and a tail": np.where(random.random(COUNT) < 0.4, 1.001, near),
    }


@pytest.fixture(params=["kernel", "numpy"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "numpy":
        with mock.patch.object(native, "library", return_value=None):
            yield request.param
    elif native.library() is None:
        pytest.skip(f"no compiled kernel here: {native.status()}")
    else:
        yield request.param


@pytest.mark.parametrize("fine", [0, COUNT + 1], ids=["keys", "rows"])
@pytest.mark.parametrize("room", [0, 100, 1 << 22])
@pytest.mark.parametrize("name", spread())
def test_percentiles_are_those_of_numpy_however_little_may_be_collected(
    name: str, room: int, fine: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "ROOM", room)
    monkeypatch.setattr(counts, "FINE", fine)
    errors = spread()[name]
    ref = torch.zeros(COUNT, dtype=torch.float64)
    found = measure_tensors(ref, torch.from_numpy(errors), block=1000)
    for percent, value in found.percentiles.items():
        assert value == np.percentile(errors, percent), percent
    with np.errstate(over="ignore"):
        assert found.relative_median == pytest.approx(np.median(errors / 1e-8), rel=1e-15)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_percentiles_of_anything_are_those_of_numpy(errors: list[float]) -> None:
    x = torch.tensor(errors, dtype=torch.float64)
    with (
        mock.patch.object(selection, "ROOM", 3),
        mock.patch.object(counts, "FINE", len(x) % 2 * 99),
    ):
        found = measure_tensors(torch.zeros_like(x), x)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = {p: np.percentile(np.abs(errors), p) for p in found.percentiles}
    assert found.percentiles == wanted


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    ref = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    other = (ref * 1.01).bfloat16().float()
    alone, before = measure_tensors(ref, other), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.object(selection, "ROOM", 50):
            assert measure_tensors(ref, other) == alone
    finally:
        torch.set_num_threads(before)


PROGRAM = """
import resource, torch
from tensortap_analysis.metrics import measure_tensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

row = 1.0 + torch.rand(1 << 16, dtype=torch.float64) * 2.0**-9
ref, other = torch.zeros(1, 1, dtype=torch.float64).expand(768, 1 << 16), row.expand(768, -1)
measure_tensors(ref[:8], other[:8], block=1 << 18)
before = peak()
found = measure_tensors(ref, other, block=1 << 18)
print(found.compared * 8, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes there only")
def test_memory_does_not_grow_with_the_tensor_even_if_all_values_share_a_bin() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120
    )
    values, grown = map(int, done.stdout.split())
    assert values == 768 << 19
    assert grown < 64 << 20, f"{grown >> 20} MiB more for {values >> 20} MiB of differences"
