"""Random damage to any file of a run: the truth, or an error of ours; never anything else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.core.store.building import small_run

from tensortap.errors import TensortapError
from tensortap.store import open_run, recover

FILES = [
    "run.json",
    "rank00000/rank.json",
    "rank00000/coverage.json",
    "rank00000/records.jsonl",
    "rank00000/index.bin",
    "rank00000/names.jsonl",
    "rank00000/shard-00000.safetensors",
]
DERIVED = ("index.bin", "names.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never changed, what is in it, and its records as text."""
    path = tmp_path_factory.mktemp("whole") / "run"
    expected = small_run(path)
    with open_run(path) as run:
        return path, expected, {repr(r) for r in run.records()}, run.table().rows.tobytes()


def damage(data, draw):
    """One random damage, of the kinds that happen and those that are made."""
    kind = draw(st.sampled_from(["flip", "cut", "zero", "insert", "repeat", "delete"]))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    size = draw(st.integers(1, 200))
    if kind == "flip" and data:
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        data[at : at + size] = bytes(len(data[at : at + size]))
    elif kind == "insert":
        data[at:at] = draw(st.binary(min_size=1, max_size=20))
    elif kind == "repeat":
        data[at:at] = data[at : at + size]
    elif kind == "delete":
        del data[at : at + size]


def check_truth(path, expected, records):
    """Whatever is served is what was written; everything else is an error of ours."""
    with open_run(path) as run:
        for found in run.records():
            assert repr(found) in records
            if found.payload is not None:
                try:
                    tensor = run.piece(found)
                except TensortapError:
                    continue
                assert tensor.equal(expected[str(found.name), found.at.step])
        for name, step in expected:
            try:
                tensor = run.tensor(name, step=step)
            except TensortapError:
                continue
            assert tensor.equal(expected[name, step])
        problems = run.verify()
        assert run.complete or problems
        return problems


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_damage_never_gives_wrong_data_or_a_foreign_exception(whole, data):
    path, expected, records, table = whole
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(path, Path(place) / "run"))
        damaged = data.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=3, unique=True))
        for name in damaged:
            content = bytearray((copy / name).read_bytes())
            damage(content, data.draw)
            (copy / name).write_bytes(content)
        try:
            problems = check_truth(copy, expected, records)
        except TensortapError:
            assert {"run.json", "rank00000/rank.json"} <= set(damaged)
            return
        if all(name.endswith(DERIVED) for name in damaged):
            assert problems == []
            with open_run(copy) as run:
                assert run.table().rows.tobytes() == table
        if "rank00000/records.jsonl" in damaged and "rank00000/rank.json" not in damaged:
            same = (copy / "rank00000/records.jsonl").read_bytes()
            assert problems or same == (path / "rank00000/records.jsonl").read_bytes()
        assert str(recover(copy))
        check_truth(copy, expected, records)
