"""A run killed at any moment: what was complete reads back, the rest is known to be lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tests.core.store.building import info, record, small_run, write_run

from tensortap.errors import CaptureError, RunError
from tensortap.store import RunDirectorySink, open_run, recover

WRITER = """
import sys
import torch
from tensortap.store import RunDirectorySink
from tests.core.store.building import info, record, statistics

def value(seq):
    generator = torch.Generator().manual_seed(seq)
    return torch.randn(int(torch.randint(1, 4000, (), generator=generator)), generator=generator)

if __name__ == "__main__":
    sink = RunDirectorySink(sys.argv[1], max_shard_bytes=1 << 18, durable=sys.argv[2])
    sink.open(info())
    print("open", flush=True)
    for seq in range(1_000_000):
        tensor = value(seq)
        sink.write(record(f"l.{seq % 7}/forward/x", tensor, 2 * seq, seq // 20), tensor)
        sink.write(record(f"l.{seq % 7}/backward/g", None, 2 * seq + 1, seq // 20,
                          stats=statistics()), None)
        if seq % 20 == 19:
            sink.end_step(seq // 20)
            print(seq, flush=True)
"""


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    path = tmp_path_factory.mktemp("writer") / "writer.py"
    path.write_text(WRITER)
    return path


def killed_run(writer, path, delay, durable="close"):
    """Start a writer, kill it `delay` seconds after it opened the run; the last step it ended."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, writer, path, durable], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout.readline() == "open\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    lines = process.stdout.read().split()
    process.wait()
    return int(lines[-1]) if lines else -1


def expected_value(seq):
    generator = torch.Generator().manual_seed(seq)
    return torch.randn(int(torch.randint(1, 4000, (), generator=generator)), generator=generator)


def check_payloads(run):
    """Every record reads back and matches; returns how many payloads there are."""
    count = 0
    for found in run.records(phase="forward"):
        assert run.piece(found).equal(expected_value(found.seq // 2))
        assert found.seq == 2 * count
        count += 1
    return count


@pytest.mark.parametrize("attempt", range(6))
def test_kill_at_a_random_moment_loses_only_what_was_not_complete(writer, tmp_path, attempt):
    chance = random.Random(attempt)
    path = tmp_path / "run"
    last = killed_run(writer, path, chance.uniform(0, 0.25), chance.choice(["close", "step"]))
    with open_run(path) as run:
        before = check_payloads(run)
        assert before > last  # every ended step is there
        assert not run.complete
        assert "interrupted" in " ".join(run.problems)
    report = recover(path)
    rank = report.ranks[0]
    assert rank.records >= before
    assert rank.bad_lines == 0
    assert report.lost == bool(rank.lost_line_bytes or rank.lost_payload_bytes)
    with open_run(path) as run:
        assert check_payloads(run) == before
        assert run.verify() == run.problems
        assert "recovered" in " ".join(run.problems)
        assert run.table().rows["seq"].tolist() == [r.seq for r in run.records()]
        kept = {f"{r.name}#{r.seq}": r for r in run.records(phase="forward")}
        for shard in (path / "rank00000").glob("*.safetensors"):
            found = load_file(shard)
            for key, tensor in found.items():
                if not key.startswith("__"):
                    assert tensor.equal(run.piece(kept.pop(key)))
    assert not kept
    again = recover(path).ranks[0]
    assert (again.finished_shards, again.index_rebuilt) == (0, False)


def cut_copy(source, target, cuts):
    """A copy of a run, as it is when its files had been written only so far."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        data = path.read_bytes()
        (target / path.name).write_bytes(data[: cuts.get(path.name, len(data))])


def test_a_kill_between_any_two_bytes_of_a_line_reads_well(tmp_path):
    expected = small_run(tmp_path / "run", steps=1, names=2)
    source = tmp_path / "run/rank00000"
    state = json.loads((source / "rank.json").read_text())
    lines = (source / "records.jsonl").read_bytes()
    for cut in [*range(0, len(lines), 97), len(lines) - 1]:
        target = tmp_path / f"cut{cut}" / "rank00000"
        cut_copy(source, target, {"records.jsonl": cut})
        (target / "rank.json").write_bytes(_writing(state))
        with open_run(target.parent) as run:
            found = list(run.records())
            assert len(found) == lines[:cut].count(b"\n")
            for one in found:
                if one.payload:
                    assert run.piece(one).equal(expected[str(one.name), 0])
        report = recover(target.parent)
        assert report.lost
        assert report.ranks[0].lost_records == lines.count(b"\n") - len(found)
        assert report.ranks[0].lost_line_bytes == cut - lines[:cut].rfind(b"\n") - 1


def _writing(state):
    from tensortap.store.documents import encode_document

    kept = {"state": "writing", "reason": None, "info": state["info"]}
    return encode_document(kept)


def test_payload_bytes_without_a_record_are_kept_and_counted(tmp_path):
    write_run(tmp_path / "run", [(record(tensor=torch.ones(100)), torch.ones(100))])
    shard = tmp_path / "run/rank00000/shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    room = int.from_bytes(data[:8], "little")
    data[8 : 8 + room] = b" " * room
    shard.write_bytes(data + b"\x07" * 1000)
    report = recover(tmp_path / "run")
    assert (report.ranks[0].finished_shards, report.ranks[0].lost_payload_bytes) == (1, 1000)
    assert report.lost
    [lost] = [t for key, t in load_file(shard).items() if key.startswith("__lost")]
    assert lost.equal(torch.full((1000,), 7, dtype=torch.uint8))


def test_a_shard_cut_inside_its_blank_header_becomes_a_valid_empty_one(tmp_path):
    write_run(tmp_path / "run", [(record(), None)])
    for size in (0, 5, 8, 3000):
        shard = tmp_path / "run/rank00000/shard-00000.safetensors"
        shard.write_bytes((b"\x38\x00\x01\x00\x00\x00\x00\x00" + b" " * 65592)[:size])
        assert recover(tmp_path / "run").ranks[0].finished_shards == 1
        assert load_file(shard) == {}


def test_a_half_written_header_is_written_again(tmp_path):
    tensor = torch.randn(100)
    write_run(tmp_path / "run", [(record(tensor=tensor, seq=1), tensor)])
    shard = tmp_path / "run/rank00000/shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[60:400] = b" " * 340
    shard.write_bytes(data)
    assert recover(tmp_path / "run").ranks[0].finished_shards == 1
    assert load_file(shard)["layers.0.mlp/forward/output#1"].equal(tensor)


def test_recover_leaves_a_whole_run_as_it_is(tmp_path):
    small_run(tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    report = recover(tmp_path / "run")
    assert not report.lost
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert report.as_dict()["ranks"][0]["records"] == 12
    assert "12 records read back" in str(report)


def test_recover_rebuilds_a_missing_index(tmp_path):
    small_run(tmp_path / "run")
    index = tmp_path / "run/rank00000/index.bin"
    names = tmp_path / "run/rank00000/names.jsonl"
    before = index.read_bytes(), names.read_bytes()
    index.unlink()
    assert recover(tmp_path / "run").ranks[0].index_rebuilt
    assert (index.read_bytes(), names.read_bytes()) == before


def test_recover_refuses_a_run_that_is_being_written_and_nonsense(tmp_path):
    sink = RunDirectorySink(tmp_path / "run")
    sink.open(info())
    sink.write(record(tensor=torch.ones(3)), torch.ones(3))
    with pytest.raises(RunError, match="still being written"):
        recover(tmp_path / "run")
    with open_run(tmp_path / "run") as run:
        assert len(list(run.records())) == 1
        assert "still being written" in " ".join(run.problems)
    sink.close()
    assert not recover(tmp_path / "run").lost
    with pytest.raises(RunError, match="no run"):
        recover(tmp_path / "nowhere")


def test_a_forked_process_does_not_touch_the_run(tmp_path):
    sink = RunDirectorySink(tmp_path / "run")
    sink.open(info())
    sink.write(record(seq=0), None)  # still in memory, so a fork has it too
    child = os.fork()
    if child == 0:
        try:
            sink.write(record(seq=1), None)
        except CaptureError as failure:
            sink.close()
            os._exit(0 if "forked" in str(failure) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    sink.write(record(seq=2), None)
    sink.close()
    with open_run(tmp_path / "run") as run:
        assert [r.seq for r in run.records()] == [0, 2]
        assert run.complete
