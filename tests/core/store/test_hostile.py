"""A run directory is data from somebody else: never a crash, a hang, a path outside, a lie."""

from __future__ import annotations

import json
import os
import resource
import struct
import time

import numpy as np
import pytest
import torch
from tests.core.store.building import info, record, small_run, write_run

from tensortap.errors import RunCorrupt, RunError
from tensortap.store import open_run, recover
from tensortap.store.documents import encode_document, read_document
from tensortap.store.index import HEAD
from tensortap.store.lines import encode_line
from tensortap.store.rows import ROW, seal

NAME = "layers.0.attn.q/forward/output"


@pytest.fixture
def run_path(tmp_path):
    small_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _no_huge_allocations():
    """Refuse absurd allocations, with room for the threads of a machine with many cores."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def rewrite_line(run_path, number, change):
    """Change the fields of one line and give it a good checksum: an attacker, not an accident."""
    path = run_path / "rank00000/records.jsonl"
    lines = path.read_bytes().split(b"\n")
    fields = json.loads(lines[number])
    del fields["sum"]
    change(fields)
    lines[number] = encode_line(fields)[:-1]
    path.write_bytes(b"\n".join(lines))
    for derived in ("index.bin", "names.jsonl"):
        (run_path / "rank00000" / derived).unlink(missing_ok=True)


def set_payload(position, value):
    def change(fields):
        fields["payload"][position] = value

    return change


def set_fields(**values):
    return lambda fields: fields.update(values)


@pytest.mark.parametrize(
    "change",
    [
        set_payload(0, "../rank00000/shard-00000.safetensors"),
        set_payload(0, "/etc/passwd"),
        set_payload(0, "shard-00000.safetensors/../../../../etc/passwd"),
        set_payload(0, "shard-00000.safetensors\x00"),
        set_payload(0, 3),
        set_payload(1, -64),
        set_payload(1, 1 << 70),
        set_payload(1, 64.5),
        set_payload(1, True),
        set_payload(2, 81),
        set_payload(2, -1),
        set_payload(3, "xyz"),
        set_payload(3, "../" * 10 + "ab"),
        set_fields(payload=[]),
        set_fields(payload={"shard": "x"}),
        set_fields(shape=[1 << 62, 1 << 62]),
        set_fields(shape=[-4, 5]),
        set_fields(shape=[4.0, 5]),
        set_fields(shape="45"),
        set_fields(shape=[1] * 5000),
        set_fields(shape=[5, 5]),
        set_fields(name="../../etc/passwd"),
        set_fields(name="a/b"),
        set_fields(name="a b/forward/c"),
        set_fields(name="a/forward/x\n"),
        set_fields(name=None),
        set_fields(native=7),
        set_fields(step=-1),
        set_fields(step=1 << 80),
        set_fields(step="0"),
        set_fields(microbatch=1 << 33),
        set_fields(rank=1),
        set_fields(values="some"),
        set_fields(values="stats"),
        set_fields(stride=0),
        set_fields(values="sample", stride=1 << 60),
        set_fields(recompute=1),
        set_fields(stats=[1]),
        set_fields(stats={"count": 1}),
        set_fields(stats={"count": "NaN"}),
        set_fields(placement={"segments": {"x": []}}),
        set_fields(placement={"segments": {"0": [[0]]}}),
        set_fields(placement={"segments": {"0": [[-1, 5]]}}),
        set_fields(placement={"logical_shape": [1 << 64]}),
        set_fields(placement={"parts": [["a", "b", []]]}),
        set_fields(placement={"partial": [1]}),
        set_fields(format={"name": 1}),
        set_fields(dims=[]),
        set_fields(device=None),
        lambda fields: fields.clear(),
        lambda fields: fields.pop("dtype"),
    ],
)
def test_a_hostile_line_is_left_out_and_named(run_path, change):
    rewrite_line(run_path, 0, lambda fields: (change(fields), fields.setdefault("x", 1)))
    with open_run(run_path) as run:
        assert len(list(run.records())) == 11
        assert f"{run_path}/rank00000/records.jsonl:1: " in " ".join(run.problems)
        assert not run.complete
        assert run.names()[0] == "layers.0.attn.q/forward/output"  # of the second step
        with pytest.raises(RunError):
            run.tensor(NAME, step=0)
    assert recover(run_path).ranks[0].bad_lines == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_payload(1, 1 << 62), "the file has only"),
        (set_payload(1, 1 << 20), "the file has only"),
        (set_payload(1, 65601), "digest"),
        (set_payload(0, "shard-00001.safetensors"), "missing"),
        (set_payload(3, "0" * 32), "digest"),
        (set_fields(dtype="float32\x00"), "no dtype"),
        (set_fields(dtype="Tensor"), "no dtype"),
        (set_fields(shape=[5, 4]), None),
    ],
)
def test_a_payload_that_cannot_be_right_is_refused(run_path, change, reason):
    rewrite_line(run_path, 0, change)
    with open_run(run_path) as run:
        if reason is None:
            assert run.tensor(NAME, step=0).shape == (5, 4)
            return
        from tensortap.errors import TensortapError

        with pytest.raises(TensortapError, match=reason):
            run.tensor(NAME, step=0)
        assert any(reason in problem for problem in run.verify())


def test_empty_tensors_with_absurd_other_axes_do_not_crash(tmp_path):
    empty = torch.empty(0, 4)
    write_run(tmp_path / "run", [(record(NAME, empty), empty)])
    for shape in ([0, 1 << 62, 1 << 62], [1 << 62, 0], [0] * 64):
        rewrite_line(tmp_path / "run", 0, set_fields(shape=shape))
        with open_run(tmp_path / "run") as run:
            assert tensor_or_error(run) in (0, "refused")


def tensor_or_error(run):
    """How many elements the tensor has, or that it was refused."""
    try:
        return run.tensor(NAME).numel()
    except RunError:
        return "refused"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"sum":"',
        b'{"sum":"0123456789abcdef"',
        b"\xff\xfe" * 50,
        b"9" * 10_000,
        b"x" * 9_000_000,
        b'{"seq":' + b"9" * 5000 + b"}",
    ],
)
def test_a_line_of_nonsense_is_left_out_and_named(run_path, text):
    from xxhash import xxh3_64_hexdigest

    path = run_path / "rank00000/records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    checked = b'{"sum":"%b",%b' % (xxh3_64_hexdigest(text[1:]).encode(), text[1:])
    path.write_bytes(b"".join([*lines[:2], text + b"\n", checked + b"\n", *lines[2:]]))
    with open_run(run_path) as run:
        assert len(list(run.records())) == 12
        assert [":3: " in p or ":4: " in p for p in run.problems].count(True) == 2


@pytest.mark.parametrize(
    "name", ["records.jsonl", "index.bin", "rank.json", "shard-00000.safetensors"]
)
@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_links_fifos_and_directories_are_not_opened(run_path, tmp_path, name, kind):
    path = run_path / "rank00000" / name
    moved = tmp_path / "elsewhere"
    path.rename(moved)
    if kind == "link":
        path.symlink_to(moved)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with open_run(run_path) as run:
        problems = run.verify()
        assert (name == "index.bin") == (problems == [])
        if name != "index.bin":
            assert name in " ".join(problems)


def test_a_rank_directory_that_is_a_link_is_not_followed(run_path):
    (run_path / "rank00001").symlink_to(run_path / "rank00000")
    (run_path / "rank2").mkdir()
    with open_run(run_path) as run:
        assert run.ranks == [0]


def test_the_reader_makes_no_path_outside_the_run(run_path, tmp_path):
    small_run(tmp_path / "other")
    rewrite_line(run_path, 0, set_payload(0, "../../other/rank00000/shard-00000.safetensors"))
    with open_run(run_path) as run, pytest.raises(RunError):
        run.tensor(NAME, step=0)


class TestDocuments:
    def test_a_damaged_run_json_falls_back_to_what_the_rank_knows(self, run_path):
        (run_path / "run.json").write_text('{"checksum": "0"}')
        with open_run(run_path) as run:
            assert run.info.launch_id == "launch-1"
            assert "run.json: checksum mismatch" in " ".join(run.problems)
            assert len(list(run.records())) == 12

    def test_without_any_document_the_run_is_corrupt(self, run_path):
        (run_path / "run.json").write_text("{")
        (run_path / "rank00000/rank.json").unlink()
        with pytest.raises(RunCorrupt, match=r"run\.json"):
            open_run(run_path)

    def test_a_schema_from_the_future_is_refused(self, run_path):
        from tensortap.store import documents

        body = {"schema": 99, **read_document(run_path / "run.json")}
        text = json.dumps({"checksum": documents._checksum(body), **body})
        for path in (run_path / "run.json", run_path / "rank00000/rank.json"):
            path.write_text(text)
        with pytest.raises(RunCorrupt, match="schema 99"):
            open_run(run_path)

    @pytest.mark.parametrize(
        "fields",
        [{}, {"launch_id": 3}, {"world_size": -1}, {"parallel": {"tp": "x"}}, {"metadata": 3}],
    )
    def test_a_run_json_of_the_wrong_form(self, run_path, fields):
        body = read_document(run_path / "run.json") if fields else {}
        for path in (run_path / "run.json", run_path / "rank00000/rank.json"):
            path.write_bytes(encode_document(body | fields))
        with pytest.raises(RunCorrupt, match=r"must be|is missing"):
            open_run(run_path)

    def test_an_absurd_world_size_does_not_hang(self, tmp_path):
        write_run(tmp_path / "run", [(record(), None)], info(world_size=10**9), max_bytes=1 << 60)
        with open_run(tmp_path / "run") as run:
            assert "world size" in " ".join(run.problems)

    @pytest.mark.parametrize(
        "report", [{"gaps": 3}, {"gaps": [3]}, {"captured": []}, {"steps": -1}]
    )
    def test_a_coverage_report_of_the_wrong_form(self, run_path, report):
        (run_path / "rank00000/coverage.json").write_bytes(encode_document(report))
        with open_run(run_path) as run:
            with pytest.raises(RunCorrupt, match=r"coverage\.json"):
                run.coverage()
            assert "coverage.json" in " ".join(run.problems)


class TestIndex:
    """The index is only a cache: whatever it says, records and table tell the truth."""

    def truth(self, run_path):
        with open_run(run_path) as run:
            return [repr(r) for r in run.records()], run.table().rows.tobytes()

    def change_rows(self, run_path, change, sealed=True):
        path = run_path / "rank00000/index.bin"
        rows = np.frombuffer(path.read_bytes()[len(HEAD) :], dtype=ROW).copy()
        rows = change(rows)
        path.write_bytes(HEAD + (seal(rows.tobytes()) if sealed else rows.tobytes()))

    def test_every_single_bit_flip_of_an_index_is_noticed(self, run_path):
        expected = self.truth(run_path)
        path = run_path / "rank00000/index.bin"
        data = path.read_bytes()
        for bit in range(0, 8 * len(data), 41):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << (bit % 8)
            path.write_bytes(flipped)
            assert self.truth(run_path) == expected

    @pytest.mark.parametrize(
        "change",
        [
            lambda rows: rows[:5],
            lambda rows: rows[1:],
            lambda rows: rows[::-1],
            lambda rows: np.concatenate([rows, rows]),
            lambda rows: np.delete(rows, 3),
            lambda rows: rows[[0, 2, 1, *range(3, 12)]],
        ],
    )
    def test_rows_that_do_not_tile_the_lines_are_thrown_away(self, run_path, change):
        expected = self.truth(run_path)
        self.change_rows(run_path, change)
        assert self.truth(run_path) == expected

    @pytest.mark.parametrize(
        ("field", "value"),
        [("step", 1), ("name", 1), ("mean", 7.0), ("flags", 0), ("flags", 128), ("dtype", b"int8"),
         ("seq", 5), ("name", 77), ("offset", -1), ("length", 1 << 31)],
    )  # fmt: skip
    def test_a_row_with_a_good_hash_that_contradicts_its_line_is_found(
        self, run_path, field, value
    ):
        expected, _ = self.truth(run_path)

        def lie(rows):
            rows[field][0] = value
            return rows

        self.change_rows(run_path, lie)
        with open_run(run_path) as run:
            assert sorted(repr(r) for r in run.records()) == sorted(expected)
            assert run.table().rows["mean"][0] == pytest.approx(2 / 3)
            assert run.tensor(NAME, step=0).shape == (4, 5)
            assert run.complete

    def test_missing_and_foreign_files(self, run_path):
        expected = self.truth(run_path)
        directory = run_path / "rank00000"
        for name in ("index.bin", "names.jsonl"):
            for content in (b"", b"x", b"\x00" * 10_000, None):
                kept = (directory / name).read_bytes()
                (directory / name).unlink()
                if content is not None:
                    (directory / name).write_bytes(content)
                assert self.truth(run_path) == expected
                (directory / name).write_bytes(kept)

    def test_an_index_of_another_run_is_found(self, run_path, tmp_path):
        other = tmp_path / "other"
        items = [(record(f"x.{n}/forward/y", None, n), None) for n in range(12)]
        write_run(other, items)
        expected = self.truth(run_path)
        for name in ("index.bin", "names.jsonl"):
            (run_path / "rank00000" / name).write_bytes((other / "rank00000" / name).read_bytes())
        assert self.truth(run_path) == expected

    def test_names_that_lie_are_found_when_a_line_is_parsed(self, run_path):
        path = run_path / "rank00000/names.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([lines[2], lines[1], lines[0], *lines[3:]]))
        with open_run(run_path) as run:
            names = [str(r.name) for r in run.records("layers.0.attn.*")]
        assert set(names) == {NAME}


def test_finely_cut_parts_and_placements_neither_hang_nor_fill_the_memory(tmp_path):
    runs = [[2 * n, 1] for n in range(20_000)]
    wide = torch.zeros(20_000)
    write_run(tmp_path / "run", [(record(NAME, wide), wide)])
    placement = {"logical_shape": [40_000], "segments": {"0": runs}, "parts": [["p", 0, runs]]}
    rewrite_line(tmp_path / "run", 0, set_fields(placement=placement))
    begin = time.monotonic()
    with open_run(tmp_path / "run") as run:
        with pytest.raises(RunError, match="nothing was captured of"):
            run.tensor(NAME)
        with pytest.raises(RunError, match="too finely"):
            run.tensor("p/forward/output", rank=0)
    assert time.monotonic() - begin < 30


def test_tensors_of_very_many_axes_are_served_or_refused(tmp_path):
    deep = torch.ones([1] * 40)
    for rank in (0, 1):
        run_info = info(rank=rank, world_size=2, parallel={"tp": 2, "tp_rank": rank})
        write_run(tmp_path / "run", [(record(NAME, deep, rank=rank), deep)], run_info)
    with open_run(tmp_path / "run") as run:
        assert run.tensor(NAME, rank=1).shape == deep.shape
        with pytest.raises(RunError, match="40 axes"):
            run.tensor(NAME)


class TestShards:
    def test_the_reader_does_not_need_the_header(self, run_path):
        shard = run_path / "rank00000/shard-00000.safetensors"
        data = shard.read_bytes()
        for head in (b"\xff" * 8, struct.pack("<Q", 1 << 63), bytes(8)):
            shard.write_bytes(head + b"{" * 60_000 + data[60_008:])
            with open_run(run_path) as run:
                assert run.verify() == []

    def test_recover_mends_a_head_of_nonsense(self, run_path):
        from safetensors.torch import load_file

        shard = run_path / "rank00000/shard-00000.safetensors"
        for head in (b"\xff" * 8, struct.pack("<Q", 1 << 40), bytes(8)):
            shard.write_bytes(head + shard.read_bytes()[8:])
            report = recover(run_path)
            assert report.ranks[0].finished_shards == 1
            assert len([key for key in load_file(shard) if key[0] != "_"]) == 6

    def test_a_truncated_shard_loses_only_what_was_in_its_end(self, run_path):
        from safetensors.torch import load_file

        shard = run_path / "rank00000/shard-00000.safetensors"
        data = bytearray(shard.read_bytes()[:-200])
        data[8:65600] = b" " * (65600 - 8)
        shard.write_bytes(data)
        with open_run(run_path) as run:
            assert len([p for p in run.verify() if "the file has only" in p]) == 2
        report = recover(run_path)
        assert len(report.ranks[0].problems) == 2
        assert len([key for key in load_file(shard) if key[0] != "_"]) == 4

    def test_every_flipped_payload_byte_is_noticed(self, run_path):
        shard = run_path / "rank00000/shard-00000.safetensors"
        data = shard.read_bytes()
        for position in range(65600, 65680, 7):
            flipped = bytearray(data)
            flipped[position] ^= 0x10
            shard.write_bytes(flipped)
            with (
                open_run(run_path) as run,
                pytest.raises(RunCorrupt, match=f"{shard.name}.*digest"),
            ):
                run.tensor(NAME, step=0)
