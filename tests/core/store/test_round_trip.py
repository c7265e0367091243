"""What goes into a run directory comes out of it, and other tools can read the payloads."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.core.store.building import (
    INF,
    NAN,
    info,
    record,
    small_run,
    statistics,
    write_run,
)

from tensortap.errors import CaptureError, ConfigError, RunError, SelectionError
from tensortap.records import FormatInfo, Part, Placement
from tensortap.store import RunDirectorySink, open_run
from tensortap.store.dtypes import STORED
from tensortap.testing import SinkContract

DTYPES = sorted(STORED)


def some_values(dtype, shape=(3, 5)):
    """Every byte pattern is a value: what is stored is bytes."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape))
    raw = torch.randint(0, 256, (count * size,), dtype=torch.uint8)
    if dtype == torch.bool:
        raw = raw % 2
    return raw.view(dtype).view(shape)


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_bitwise_and_in_its_own_dtype(tmp_path, name):
    tensor = some_values(STORED[name].torch)
    write_run(tmp_path / "run", [(record(tensor=tensor), tensor)])
    with open_run(tmp_path / "run") as run:
        [found] = run.records()
        piece = run.piece(found)
    assert piece.dtype == tensor.dtype
    assert piece.shape == tensor.shape
    assert as_bytes(piece) == as_bytes(tensor)
    assert run.complete


@pytest.mark.parametrize("name", DTYPES)
def test_safetensors_itself_opens_a_closed_shard_of_every_dtype(tmp_path, name):
    tensor = some_values(STORED[name].torch)
    write_run(tmp_path / "run", [(record(tensor=tensor, seq=7), tensor)])
    path = tmp_path / "run/rank00000/shard-00000.safetensors"
    key = "layers.0.mlp/forward/output#7"
    with safe_open(path, "pt") as file:
        opened = file.get_tensor(key)
    loaded = load_file(path)[key]
    assert as_bytes(opened) == as_bytes(loaded) == as_bytes(tensor)
    if name in ("bfloat16", "float8_e4m3fn", "bool", "complex64", "uint16"):
        assert loaded.dtype == tensor.dtype
    if name == "complex128":
        assert torch.view_as_complex(loaded).shape == tensor.shape


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,), (1, 1, 1), (7,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.bool])
def test_scalars_and_empty_tensors_keep_their_shape(tmp_path, shape, dtype):
    tensor = some_values(dtype, shape)
    other = torch.arange(3.0)
    items = [(record(tensor=tensor), tensor), (record("x/forward/y", other, 1), other)]
    write_run(tmp_path / "run", items)
    with open_run(tmp_path / "run") as run:
        assert run.tensor("layers.0.mlp/forward/output").shape == shape
        assert as_bytes(run.tensor("layers.0.mlp/forward/output")) == as_bytes(tensor)
        assert run.tensor("x/forward/y").equal(other)
        assert run.verify() == []
    assert len(load_file(tmp_path / "run/rank00000/shard-00000.safetensors")) >= 2


def test_nan_payload_bits_and_infinities_survive(tmp_path):
    bits = torch.tensor([0x7FC00001, 0xFFC12345 - (1 << 32), 0x7F800000], dtype=torch.int32)
    tensor = bits.view(torch.float32)
    write_run(tmp_path / "run", [(record(tensor=tensor), tensor)])
    with open_run(tmp_path / "run") as run:
        assert run.tensor("layers.0.mlp/forward/output").view(torch.int32).equal(bits)


def test_views_and_conjugates_are_stored_in_logical_order(tmp_path):
    base = torch.randn(4, 6, dtype=torch.complex64)
    items = []
    for seq, tensor in enumerate([base.t(), base[1:, ::2], base.conj(), base.conj().imag]):
        items.append((record("x/forward/y", tensor, seq, step=seq), tensor))
    write_run(tmp_path / "run", items)
    with open_run(tmp_path / "run") as run:
        for step, (_, tensor) in enumerate(items):
            assert run.tensor("x/forward/y", step=step).equal(tensor.resolve_conj().resolve_neg())


def test_every_field_of_a_record_comes_back(tmp_path):
    full = torch.randn(4, 6)
    placement = Placement(
        logical_shape=(8, 12),
        segments={0: ((4, 4),), 1: ((0, 3), (6, 3))},
        valid={0: 7, -1: 11},
        partial=("tp", "cp"),
        parts=(Part("layers.0.attn.q", 1, ((0, 6),)), Part("layers.0.attn.k", -1, ((6, 6),))),
    )
    stats = statistics(
        nan=1, posinf=2, neginf=3, l2=INF, max=None, first=(1.0, NAN, INF, -INF, -0.0),
        exponents={-140: 1, 3: 2},
    )  # fmt: skip
    written = record(
        tensor=full, seq=3, step=5, microbatch=1, call=2, recompute=True, eval=True,
        dims="batch (head dim)", placement=placement, stats=stats,
        format=FormatInfo("mxfp4", 32, "nearest"), native='odd "native" näme\n',
    )  # fmt: skip
    write_run(tmp_path / "run", [(written, full)])
    with open_run(tmp_path / "run") as run:
        [found] = run.records()
    assert found.payload is not None
    for field in ("name", "native", "at", "shape", "dtype", "dims", "placement", "format", "seq"):
        assert getattr(found, field) == getattr(written, field)
    assert repr(found.stats) == repr(stats)  # repr, because NaN is not equal to itself


def test_records_without_statistics_or_placement_come_back_without(tmp_path):
    write_run(tmp_path / "run", [(record(), None)])
    with open_run(tmp_path / "run") as run:
        [found] = run.records()
    assert (found.stats, found.placement, found.payload, found.format) == (None,) * 4


def test_each_line_is_plain_json_for_other_tools(tmp_path):
    small_run(tmp_path / "run")
    text = (tmp_path / "run/rank00000/records.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["name"] == "layers.0.attn.q/forward/output"
    assert lines[0]["stats"]["max"] == 3.0


def test_run_info_comes_back_with_nan_and_foreign_objects_as_text(tmp_path):
    run_info = info(
        model_class="Llama", parallel={"tp": 2, "tp_rank": 0}, mode="bf16",
        metadata={"prompt": "…", "ids": [1, 2], "nan": NAN, "dtype": torch.float32},
    )  # fmt: skip
    write_run(tmp_path / "run", [(record(), None)], run_info)
    with open_run(tmp_path / "run") as run:
        assert run.info.metadata == {
            "prompt": "…", "ids": [1, 2], "nan": "nan", "dtype": "torch.float32",
        }  # fmt: skip
        assert run.info.parallel == {"tp": 2, "tp_rank": 0}
        assert (run.info.model_class, run.info.mode) == ("Llama", "bf16")


def test_equal_bytes_are_stored_once_whatever_their_name_and_shape(tmp_path):
    tensor = torch.randn(64, 64)
    items = [(record(tensor=tensor, seq=seq, step=seq), tensor.clone()) for seq in range(20)]
    flat = tensor.reshape(-1)
    items.append((record("flat/forward/output", flat, 20), flat))
    write_run(tmp_path / "run", items)
    shard = tmp_path / "run/rank00000/shard-00000.safetensors"
    assert shard.stat().st_size < 2 * tensor.nbytes + 65536
    with open_run(tmp_path / "run") as run:
        assert all(run.tensor("layers.0.mlp/forward/output", step=s).equal(tensor) for s in (0, 19))
        assert run.tensor("flat/forward/output").equal(flat)


def test_a_full_shard_is_followed_by_the_next_and_all_are_valid(tmp_path):
    tensors = [torch.full((1000,), float(n)) for n in range(40)]
    items = [(record(tensor=t, seq=n, step=n), t) for n, t in enumerate(tensors)]
    write_run(tmp_path / "run", items, max_shard_bytes=100_000)
    shards = sorted((tmp_path / "run/rank00000").glob("*.safetensors"))
    assert len(shards) > 2
    found = {key: value for shard in shards for key, value in load_file(shard).items()}
    assert all(found[f"layers.0.mlp/forward/output#{n}"].equal(t) for n, t in enumerate(tensors))
    with open_run(tmp_path / "run") as run:
        assert run.verify() == []


def test_a_full_header_begins_a_new_shard_with_more_room(tmp_path):
    tensors = [torch.tensor([n], dtype=torch.int64) for n in range(900)]
    items = [(record(tensor=t, seq=n, step=n), t) for n, t in enumerate(tensors)]
    write_run(tmp_path / "run", items)
    shards = sorted((tmp_path / "run/rank00000").glob("*.safetensors"))
    rooms = [int.from_bytes(shard.read_bytes()[:8], "little") for shard in shards]
    assert len(rooms) == 3
    assert [round(room / rooms[0]) for room in rooms] == [1, 2, 4]
    assert sum(len([k for k in load_file(s) if k[0] != "_"]) for s in shards) == 900


def test_names_of_any_length_and_alphabet_make_valid_shards(tmp_path):
    words = ["ö" * 3000, "😀.x", "\ud800lone", 'quote".\\', "__metadata__", "a" * 5000]
    items = []
    for seq, word in enumerate(words):
        tensor = torch.tensor([float(seq)])
        items.append((record(f"{word}/forward/x", tensor, seq, native="n"), tensor))
    write_run(tmp_path / "run", items)
    with open_run(tmp_path / "run") as run:
        for seq, word in enumerate(words):
            assert run.tensor(f"{word}/forward/x").item() == seq
    assert len(load_file(tmp_path / "run/rank00000/shard-00000.safetensors")) >= len(words)


def test_a_repeated_number_does_not_make_a_shard_invalid(tmp_path):
    items = [(record(tensor=torch.ones(n), seq=1, step=n), torch.ones(n)) for n in (1, 2, 3)]
    write_run(tmp_path / "run", items)
    found = load_file(tmp_path / "run/rank00000/shard-00000.safetensors")
    assert sorted(v.numel() for k, v in found.items() if k[0] != "_") == [1, 2, 3]


def test_samples_come_back_as_one_axis(tmp_path):
    whole = torch.arange(100.0).reshape(10, 10)
    sample = whole.reshape(-1)[::7].contiguous()
    written = record(tensor=sample, values="sample", shape=(10, 10), stride=7)
    write_run(tmp_path / "run", [(written, sample)])
    with open_run(tmp_path / "run") as run:
        [found] = run.records()
        assert run.sample(found).equal(sample)
        with pytest.raises(RunError, match=r"run\.sample"):
            run.tensor("layers.0.mlp/forward/output")


def test_writing_to_a_tensor_that_was_read_changes_nothing_on_disk_or_later(tmp_path):
    expected = small_run(tmp_path / "run")
    with open_run(tmp_path / "run") as run:
        name = "layers.0.attn.q/forward/output"
        run.tensor(name, step=0).zero_()
        assert run.tensor(name, step=0).equal(expected[name, 0])
        assert run.verify() == []


def test_tensors_stay_valid_after_the_run_is_closed(tmp_path):
    expected = small_run(tmp_path / "run")
    with open_run(tmp_path / "run") as run:
        tensors = {key: run.tensor(key[0], step=key[1]) for key in expected}
    assert all(tensors[key].equal(expected[key]) for key in expected)


class TestTheContract(SinkContract):
    @pytest.fixture
    def make_sink(self, tmp_path):
        return lambda: RunDirectorySink(tmp_path / "run")


@pytest.mark.parametrize("durable", ["close", "step"])
def test_the_end_of_a_step_is_synced_when_that_is_asked_for(tmp_path, monkeypatch, durable):
    synced = []

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])

    sink = RunDirectorySink(tmp_path / "run", durable=durable)
    sink.open(info())
    sink.write(record(tensor=torch.ones(3)), torch.ones(3))
    monkeypatch.setattr(os, "fsync", fsync)
    sink.end_step(0)
    payload, lines, names = "shard-00000.safetensors", "records.jsonl", "rank00000"
    assert synced == ([payload, names, lines] if durable == "step" else [])
    synced.clear()
    sink.close()
    assert {payload, lines, names} <= set(synced)


class TestSelecting:
    def test_records_come_in_execution_order_over_ranks(self, tmp_path):
        for rank in (1, 0):
            items = [(record(seq=seq, step=seq // 2, rank=rank), None) for seq in (2, 0, 3, 1)]
            write_run(tmp_path / "run", items, info(rank=rank, world_size=2))
        with open_run(tmp_path / "run") as run:
            order = [(r.at.step, r.seq, r.at.rank) for r in run.records()]
        assert order == sorted(order)
        assert len(order) == 8

    def test_every_coordinate_selects(self, tmp_path):
        items = []
        for seq in range(64):
            bits = [(seq >> bit) & 1 for bit in range(5)]
            name = f"layers.{seq % 2}/{'forward' if seq < 32 else 'backward'}/x"
            items.append(
                (
                    record(
                        name, None, seq, bits[0], microbatch=bits[1], call=bits[2],
                        recompute=bool(bits[3]), eval=bool(bits[4]),
                    ),
                    None,
                )
            )  # fmt: skip
        write_run(tmp_path / "run", items)
        plain = [written for written, _ in items]
        with open_run(tmp_path / "run") as run:
            for given, keep in (
                ({"step": 1}, lambda r: r.at.step == 1),
                ({"microbatch": 1, "call": 0}, lambda r: r.at.microbatch and not r.at.call),
                ({"recompute": True}, lambda r: r.at.recompute),
                ({"eval": False}, lambda r: not r.at.eval),
                ({"phase": "backward"}, lambda r: r.name.phase == "backward"),
                ({"select": "layers.1/*"}, lambda r: r.name.module == "layers.1"),
                ({"rank": 0, "step": 0}, lambda r: r.at.step == 0),
                ({"step": 2}, lambda r: False),
            ):
                expected = [r.seq for r in sorted(plain, key=lambda r: r.at.step) if keep(r)]
                assert [r.seq for r in run.records(**given)] == expected

    def test_a_selection_that_matches_nothing_lists_near_names(self, tmp_path):
        small_run(tmp_path / "run")
        with open_run(tmp_path / "run") as run:
            with pytest.raises(SelectionError, match=r"layers\.0\.attn\.q/forward/output"):
                run.records("layers.0.attn.k/forward/output")
            with pytest.raises(ConfigError, match="forwards"):
                run.records(phase="forwards")
            with pytest.raises(RunError, match="no rank 3"):
                run.records(rank=3)

    def test_the_table_has_the_statistics_of_the_records(self, tmp_path):
        values = {}
        for rank in (0, 1):
            items = []
            for seq in range(20):
                stats = statistics([seq, -rank, 0.5]) if seq % 3 else None
                items.append(
                    (record(f"l.{seq % 4}/forward/x", None, seq, rank=rank, stats=stats), None)
                )
                values[rank, seq] = stats
            write_run(tmp_path / "run", items, info(rank=rank, world_size=2))
        with open_run(tmp_path / "run") as run:
            table = run.table("l.1/*,l.2/*")
            assert sorted(set(table.column("name"))) == ["l.1/forward/x", "l.2/forward/x"]
            assert set(table.column("dtype")) == {"float32"}
            rows = table.rows
            assert len(table) == 20
            for row in rows:
                stats = values[row["rank"], row["seq"]]
                expected = [NAN if stats is None else getattr(stats, f) for f in ("mean", "l2")]
                np.testing.assert_array_equal([row["mean"], row["l2"]], expected)

    def test_coordinates_have_to_be_chosen_when_there_are_several(self, tmp_path):
        items = []
        for seq, call in enumerate((0, 1, 2)):
            tensor = torch.tensor([float(call)])
            items.append((record(tensor=tensor, seq=seq, call=call), tensor))
        again = torch.tensor([9.0])
        items.append((record(tensor=again, seq=3, call=0, recompute=True), again))
        write_run(tmp_path / "run", items)
        name = "layers.0.mlp/forward/output"
        with open_run(tmp_path / "run") as run:
            with pytest.raises(RunError, match=r"call=0.*call=1.*call=2"):
                run.tensor(name)
            assert run.tensor(name, call=1).item() == 1
            assert run.tensor(name, recompute=True).item() == 9
            with pytest.raises(RunError, match=r"step=0 microbatch=0 call=0"):
                run.tensor(name, step=4)

    def test_statistics_alone_say_how_to_get_values(self, tmp_path):
        small_run(tmp_path / "run")
        with open_run(tmp_path / "run") as run, pytest.raises(RunError, match="values='full'"):
            run.tensor("layers.0/backward/grad_output", step=0)

    def test_an_unknown_name_lists_the_nearest(self, tmp_path):
        small_run(tmp_path / "run")
        with (
            open_run(tmp_path / "run") as run,
            pytest.raises(RunError, match=r"'layers\.0\.attn\.q/forward/output'"),
        ):
            run.tensor("layers.0.attn.q/forward/outputs", step=0)


class TestRefusing:
    @pytest.mark.parametrize(
        ("written", "payload", "reason"),
        [
            (record(step=-1), None, "cannot be stored"),
            (record(rank=1), None, "rank 1"),
            (record(values="full"), None, "payload"),
            (record(tensor=torch.ones(3)), torch.ones(4), "shape"),
            (record(tensor=torch.ones(3)), torch.ones(3).double(), "dtype"),
            (record(tensor=torch.ones(3)), torch.ones(3, device="meta"), "no bytes"),
            (record(tensor=torch.ones(3)), torch.ones(3).to_sparse(), "no bytes"),
            (record(values="sample", stride=0, tensor=torch.ones(3)), torch.ones(3), "stride"),
        ],
    )
    def test_a_record_that_could_not_be_read_back_is_refused(
        self, tmp_path, written, payload, reason
    ):
        sink = RunDirectorySink(tmp_path / "run")
        sink.open(info())
        with pytest.raises(CaptureError, match=reason):
            sink.write(written, payload)
        sink.write(record("good/forward/x"), None)
        sink.close()
        with open_run(tmp_path / "run") as run:
            assert run.names() == ["good/forward/x"]
            assert not run.complete
            assert reason in " ".join(run.problems)

    def test_max_bytes_says_how_to_raise_it_and_keeps_what_is_there(self, tmp_path):
        sink = RunDirectorySink(tmp_path / "run", max_bytes=200_000)
        sink.open(info())
        tensors = [torch.full((5000,), float(n)) for n in range(20)]

        def write_all():
            for seq, tensor in enumerate(tensors):
                sink.write(record(tensor=tensor, seq=seq, step=seq), tensor)

        with pytest.raises(CaptureError, match="Raise max_bytes"):
            write_all()
        with pytest.raises(CaptureError, match="Raise max_bytes"):
            sink.end_step(0)
        sink.close()
        used = sum(f.stat().st_size for f in (tmp_path / "run/rank00000").iterdir())
        assert used < 210_000
        with open_run(tmp_path / "run") as run:
            found = list(run.records())
            assert len(found) >= 5
            assert all(run.piece(r).equal(tensors[r.seq]) for r in found)
            assert not run.complete

    def test_each_rank_has_its_share_of_max_bytes(self, tmp_path):
        sink = RunDirectorySink(tmp_path / "run", max_bytes=800_000)
        sink.open(info(world_size=8))
        with pytest.raises(CaptureError, match="max_bytes"):
            sink.write(record(tensor=torch.ones(30_000)), torch.ones(30_000))
        sink.close()


def test_a_closed_sink_and_an_unopened_one_say_so(tmp_path):
    sink = RunDirectorySink(tmp_path / "run")
    with pytest.raises(CaptureError, match="not open"):
        sink.write(record(), None)
    other = RunDirectorySink(tmp_path / "run")
    other.open(info())
    other.close()
    other.close()
    with pytest.raises(CaptureError, match="not open"):
        other.write(record(), None)


def test_coverage_of_several_ranks_is_one_report(tmp_path):
    for rank in (0, 1):
        sink = RunDirectorySink(tmp_path / "run")
        sink.open(info(rank=rank, world_size=2))
        sink.write(record(rank=rank), None)
        gap = {"name": "x", "reason": "dropped", "count": 2}
        note = {"name": "y", "reason": "container", "count": 1}
        sink.cover(
            {
                "complete": rank == 0, "steps": 3 + rank, "records": 1, "captured": {"a/b/c": 1},
                "gaps": [gap] * rank, "notes": [note],
            }
        )  # fmt: skip
        sink.close()
    with open_run(tmp_path / "run") as run:
        assert run.coverage() == {
            "complete": False, "steps": 4, "records": 2, "captured": {"a/b/c": 2},
            "gaps": [{"name": "x", "reason": "dropped", "count": 2}],
            "notes": [{"name": "y", "reason": "container", "count": 2}],
        }  # fmt: skip
        assert not run.complete
        assert "dropped" in " ".join(run.problems)


def test_a_failure_outside_the_sink_marks_the_run(tmp_path):
    sink = RunDirectorySink(tmp_path / "run")
    sink.open(info())
    sink.write(record(), None)
    sink.mark_incomplete("the transfer failed")
    sink.close()
    with open_run(tmp_path / "run") as run:
        assert len(list(run.records())) == 1
        assert "the transfer failed" in " ".join(run.problems)
