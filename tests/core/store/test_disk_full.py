"""The disk is full: one clear error, everything complete is readable, closing still works."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tests.core.store.building import info, record, statistics

from tensortap.errors import CaptureError
from tensortap.store import RunDirectorySink, open_run, recover

LIMITED = """
import resource, sys
import torch
from tensortap.errors import CaptureError
from tensortap.store import RunDirectorySink
from tests.core.store.building import info, record, statistics

limit, kind, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sink = RunDirectorySink(path)
sink.open(info())
messages = []
for seq in range(3000):
    try:
        tensor = torch.full((250,), float(seq)) if kind == "full" else None
        sink.write(record("a/forward/x", tensor, seq, seq, stats=statistics()), tensor)
        sink.end_step(seq)
    except CaptureError as failure:
        messages.append(str(failure))
        if len(messages) > 2:
            break
try:
    sink.cover({"complete": False})
    sink.close()
except CaptureError as failure:
    messages.append("close: " + str(failure))
print("\\n".join(messages))
"""


def limited(tmp_path, limit, kind):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), kind, tmp_path / "run"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("limit", [100_000, 123_457, 250_001])
@pytest.mark.parametrize("kind", ["full", "stats"])
def test_a_file_size_limit_leaves_whole_records(tmp_path, limit, kind):
    messages = limited(tmp_path, limit, kind)
    assert "File too large" in messages[0]
    assert "run" in messages[0]
    assert messages[1] == messages[0]  # later calls repeat the reason
    with open_run(tmp_path / "run") as run:
        found = list(run.records())
        assert len(found) > 20
        assert [r.seq for r in found] == list(range(len(found)))
        for one in found if kind == "full" else ():
            assert run.piece(one).equal(torch.full((250,), float(one.seq)))
        assert not run.complete
        assert "File too large" in " ".join(run.problems)
        assert (tmp_path / "run/rank00000/records.jsonl").read_bytes().endswith(b"\n")
    recover(tmp_path / "run")
    for shard in (tmp_path / "run/rank00000").glob("*.safetensors"):
        load_file(shard)


class Full:
    """Stands in for `os.write` on a disk that takes `left` more bytes."""

    def __init__(self, left, write):
        self.left = left
        self.write = write

    def __call__(self, descriptor, data):
        if self.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.write(descriptor, bytes(data)[: self.left])
        self.left -= taken
        return taken


@pytest.mark.parametrize("left", [*range(0, 900, 53), 70_000, 71_000, 72_000, 75_000])
def test_no_space_at_any_byte_leaves_a_run_that_opens(tmp_path, monkeypatch, left):
    tensors = [torch.full((100,), float(n)) for n in range(20)]
    sink = RunDirectorySink(tmp_path / "run")
    sink.open(info())
    for seq in range(3):
        sink.write(record(tensor=tensors[seq], seq=seq, step=seq), tensors[seq])
    sink.end_step(2)
    monkeypatch.setattr(os, "write", Full(left, os.write))
    reasons = []
    for seq in range(3, 20):
        try:
            sink.write(
                record(tensor=tensors[seq], seq=seq, step=seq, stats=statistics()), tensors[seq]
            )
            sink.end_step(seq)
        except CaptureError as failure:
            reasons.append(str(failure))
    closing = None
    try:
        sink.close()
    except CaptureError as failure:
        closing = str(failure)
    monkeypatch.undo()
    assert all("No space left" in reason for reason in reasons)
    assert reasons or closing or left > 20_000
    with open_run(tmp_path / "run") as run:
        found = list(run.records())
        assert len(found) >= 3
        assert [r.seq for r in found] == list(range(len(found)))
        assert all(run.piece(r).equal(tensors[r.seq]) for r in found)
        assert run.complete == (not reasons and closing is None)
    assert not recover(tmp_path / "run").ranks[0].bad_lines
    load_file(tmp_path / "run/rank00000/shard-00000.safetensors")


def test_a_full_tmpfs(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a small tmpfs; RLIMIT_FSIZE covers the same path")
    try:
        sink = RunDirectorySink(place / "run")
        sink.open(info())
        reason = fill(sink)
        assert "No space left" in reason
        sink.cover({"complete": False})
        with pytest.raises(CaptureError, match="No space left"):
            sink.close()
        with open_run(place / "run") as run:
            found = list(run.records())
            assert found
            assert all(run.piece(r).equal(torch.full((3000,), float(r.seq))) for r in found)
            assert not run.complete
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(sink):
    for seq in range(1000):
        tensor = torch.full((3000,), float(seq))
        try:
            sink.write(record(tensor=tensor, seq=seq, step=seq), tensor)
        except CaptureError as failure:
            return str(failure)
    return "never full"


def test_a_path_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    sink = RunDirectorySink(tmp_path / "file" / "run")
    with pytest.raises(CaptureError, match="file"):
        sink.open(info())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)  # this process was not limited
