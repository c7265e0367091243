"""Comparing several tensors at the same time."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from tests.core.store.building import record, write_run

from tensortap.stats import statistics
from tensortap.store.rank_reader import RankReader
from tensortap_analysis import compare
from tensortap_analysis.measuring.crews import ALONE, Crew

LARGE = 1 << 20


@pytest.fixture
def threads():
    """Sets how many threads torch has, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_large_tensors_share_the_threads_and_small_ones_stay_together(threads):
    threads(6)
    assert Crew.for_tensors(100, LARGE) == Crew(4, 1)
    assert Crew.for_tensors(2, LARGE) == Crew(2, 3)
    assert Crew.for_tensors(1, LARGE) == Crew(1, 6)
    assert Crew.for_tensors(100, 1000) == Crew(1, 6)
    assert Crew.for_tensors(0, 0) == Crew(1, 6)
    threads(1)
    assert Crew.for_tensors(100, LARGE) == ALONE


@pytest.mark.parametrize("crew", [ALONE, Crew(3, 1)])
def test_results_come_in_the_order_of_the_items(crew):
    def slow_first(item):
        time.sleep(0.01 * (3 - item) if item < 3 else 0)
        return item * item

    assert list(crew.each(slow_first, range(20))) == [item * item for item in range(20)]


def test_work_runs_side_by_side():
    meeting = threading.Barrier(2, timeout=10)
    assert len(list(Crew(2, 1).each(lambda _: meeting.wait(), [1, 2]))) == 2


@pytest.mark.parametrize("crew", [ALONE, Crew(2, 1)])
def test_an_error_ends_the_work_that_has_not_begun(crew):
    begun = []

    def fail(item):
        begun.append(item)
        time.sleep(0.005)
        if item == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(crew.each(fail, range(500)))
    assert len(begun) < 20


def large_run(path, seed):
    """Layer outputs of 512 KiB and small tensors between them."""
    random = torch.Generator().manual_seed(seed)
    items = []
    for layer in range(4):
        for name, width in ((f"layers.{layer}", 256), (f"layers.{layer}.norm", 1)):
            x = torch.randn(512, width, generator=random)
            items.append((record(f"{name}/forward/output", x, len(items)), x))
    return write_run(path, items)


def test_the_number_of_threads_changes_nothing(tmp_path, threads):
    runs = [large_run(tmp_path / str(seed), seed) for seed in (1, 2)]
    found, seen = [], []
    for number in (1, 2, 3):
        threads(number)
        compared = compare(*runs, progress=lambda done, total: seen.append((done, total)))
        found.append([compared.runs[0].pairs, compared.runs[0].changes])
    assert found[0] == found[1] == found[2]
    assert [pair.name for pair in found[0][0]][:2] == [
        "layers.0/forward/output", "layers.0.norm/forward/output",
    ]  # fmt: skip
    assert len(found[0][1]) == 3
    assert seen == [(done, 8) for done in range(1, 9)] * 3


def test_a_damaged_tensor_stops_no_other(tmp_path, threads):
    threads(2)
    one, two = (large_run(tmp_path / str(seed), seed) for seed in (1, 2))
    shard = two / "rank00000" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1000] ^= 1
    shard.write_bytes(data)
    found = compare(one, two).runs[0]
    assert len(found.pairs) == 7
    [lost] = found.unpaired
    assert "do not match their digest" in lost.reason


@pytest.mark.parametrize("values", ["full", "stats"])
def test_each_record_is_parsed_a_few_times_however_many_there_are(tmp_path, values, monkeypatch):
    def run(path, count):
        items = []
        for number in range(count):
            x = torch.full((3,), float(number))
            kept = x if values == "full" else None
            name = f"m{number % 10}/forward/output"
            fields = {"step": number // 10, "shape": (3,), "stats": statistics(x)}
            items.append((record(name, kept, number, **fields), kept))
        return write_run(path, items)

    parsed, parse = [], RankReader.record
    monkeypatch.setattr(RankReader, "record", lambda *a: parsed.append(a) or parse(*a))
    counts = {}
    for count in (40, 160):
        one, two = (run(tmp_path / f"{count}{side}", count) for side in "ab")
        parsed.clear()
        assert len(compare(one, two).runs[0].pairs) == count
        counts[count] = len(parsed)
    assert counts[160] - counts[40] <= 3 * 2 * 120
