"""`MegatronPtSink`: the old fork's files straight from a model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from tests.core.models import Mlp
from tests.core.store.building import info, record

import tensortap
from tensortap import CaptureError, CaptureWarning, RunExists, TensorSink
from tensortap.testing import SinkContract, example_record, example_run
from tensortap_megatron.layout import MEGATRON_PT, MegatronPtSink


@pytest.mark.filterwarnings("ignore:.*have no file:tensortap.CaptureWarning")
class TestMegatronPtSink(SinkContract):
    @pytest.fixture
    def make_sink(self, tmp_path):
        return lambda: MegatronPtSink(tmp_path / "tensor_logs")

    def test_records_after_the_end_of_their_step_are_taken(self, make_sink) -> None:
        """The contract's test writes statistics alone, which have no place in this layout."""
        sink = make_sink()
        sink.open(example_run())
        sink.end_step(0)
        payload = torch.ones(2)
        sink.write(example_record(0, payload), payload)
        sink.end_step(1)
        sink.close()
        assert len(list(sink.path.glob("*.pt"))) == 1


def test_a_tapped_model_writes_the_old_files(tmp_path):
    model = Mlp()
    x = torch.randn(3, 8)
    # Full values without being asked: of statistics this sink makes nothing.
    with tensortap.attach(model, MegatronPtSink(tmp_path / "logs"), on_error="raise"):
        model(x).sum().backward()
    files = sorted((tmp_path / "logs").glob("*.pt"))
    for number, file in enumerate(files, start=1):
        assert re.match(
            rf"\d{{8}}_\d{{6}}_{number:04d}_[a-z]+_(forward|backward|grad|param)_fp32_", file.name
        )
    [up] = [f for f in files if torch.load(f)["metadata"]["name"] == "up/forward/output"]
    assert torch.equal(torch.load(up)["tensor"], model.up(x).detach())
    MEGATRON_PT.load(
        tmp_path / "logs", tensortap.RunDirectorySink(tmp_path / "b"), lambda done: None
    )
    run = tensortap.open_run(tmp_path / "b")
    assert run.complete, run.problems
    assert run.info.model_class == "Mlp"
    assert torch.equal(run.tensor("up/forward/output"), model.up(x).detach())


def test_the_sink_and_the_run_directory_hold_the_same(tmp_path):
    model = Mlp()
    sink = tensortap.TeeSink(
        tensortap.RunDirectorySink(tmp_path / "run"), MegatronPtSink(tmp_path / "l")
    )
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        model(torch.randn(3, 8)).sum().backward()
    MEGATRON_PT.load(tmp_path / "l", tensortap.RunDirectorySink(tmp_path / "b"), lambda done: None)
    ours, back = tensortap.open_run(tmp_path / "run"), tensortap.open_run(tmp_path / "b")
    assert ours.names() == back.names()
    for mine, other in zip(ours.records(), back.records(), strict=True):
        assert (mine.at, mine.seq, mine.stats) == (other.at, other.seq, other.stats)
        assert torch.equal(ours.piece(mine), back.piece(other))


def test_a_capture_of_statistics_alone_is_an_error_and_leaves_nothing(tmp_path):
    model, sink = Mlp(), MegatronPtSink(tmp_path / "logs")
    with pytest.warns(CaptureWarning, match=r"have no file .*values='full'"):
        with pytest.raises(CaptureError, match="nothing was written"):
            with tensortap.attach(model, sink, values="stats", on_error="raise") as tap:
                model(torch.randn(3, 8))
                tap.step()
    assert not (tmp_path / "logs").exists()


def test_statistics_beside_values_are_gaps_that_are_said(tmp_path):
    model = Mlp()
    with pytest.warns(CaptureWarning, match="have no file"):
        with tensortap.attach(model, MegatronPtSink(tmp_path / "logs"), values={"up/*": "full"}):
            model(torch.randn(3, 8))
    MEGATRON_PT.load(
        tmp_path / "logs", tensortap.RunDirectorySink(tmp_path / "b"), lambda done: None
    )
    gaps = tensortap.open_run(tmp_path / "b").coverage()["gaps"]
    assert [gap["count"] for gap in gaps if gap["name"] == "down/forward/output"] == [1]
    assert all("statistics only" in gap["reason"] for gap in gaps)


def test_ranks_share_a_folder_without_collisions(tmp_path):
    def one(rank):
        sink = MegatronPtSink(tmp_path / "logs")
        sink.open(info(rank=rank, world_size=4))
        for seq in range(20):
            tensor = torch.full((4,), float(100 * rank + seq))
            sink.write(record("layers.0.attn.q/forward/output", tensor, seq, seq, rank), tensor)
        sink.close()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((tmp_path / "logs").glob("*.pt"))) == 20
    assert len(list((tmp_path / "logs").rglob("*.pt"))) == 80
    MEGATRON_PT.load(
        tmp_path / "logs", tensortap.RunDirectorySink(tmp_path / "b"), lambda done: None
    )
    run = tensortap.open_run(tmp_path / "b")
    for rank in range(4):
        assert run.complete, run.problems
        found = run.tensor("layers.0.attn.q/forward/output", step=7, rank=rank)
        assert found.tolist() == [100.0 * rank + 7] * 4


def test_a_rank_that_captured_nothing_is_not_missed_by_the_others(tmp_path):
    for rank in range(2):
        sink = MegatronPtSink(tmp_path / "logs")
        sink.open(info(rank=rank, world_size=2))
        if rank == 1:
            sink.write(record("a/forward/x", torch.ones(1), rank=1), torch.ones(1))
        sink.close()
    MEGATRON_PT.load(tmp_path / "logs", tensortap.RunDirectorySink(tmp_path / "b"), print)
    run = tensortap.open_run(tmp_path / "b")
    assert (run.ranks, run.complete) == ([0, 1], True)


def test_a_folder_of_another_run_is_left_alone(tmp_path):
    for content in ("20250908_092156_0001_linear_L1_forward_bf16_input.pt", "run.json"):
        folder = tmp_path / content.replace(".", "-")
        folder.mkdir()
        (folder / content).write_text("theirs")
        with pytest.raises(RunExists, match="holds the tensor files of another run"):
            tensortap.attach(Mlp(), MegatronPtSink(folder), values="full")
        assert [path.name for path in folder.iterdir()] == [content]


def test_a_sink_is_opened_once_and_closed_any_number_of_times(tmp_path):
    sink = MegatronPtSink(tmp_path / "logs")
    with pytest.raises(CaptureError, match="is not open"):
        sink.write(record("a/forward/x", torch.ones(1)), torch.ones(1))
    sink.open(info())
    with pytest.raises(CaptureError, match="is open already"):
        sink.open(info())
    sink.close()
    sink.close()
    assert isinstance(sink, TensorSink)
    assert not (tmp_path / "logs").exists()


def test_max_bytes_is_shared_by_the_ranks(tmp_path):
    sink = MegatronPtSink(tmp_path / "logs", max_bytes=2000)
    sink.open(info(world_size=2))
    tensor = torch.ones(200)
    sink.write(record("a/forward/x", tensor), tensor)
    with pytest.raises(CaptureError, match=r"share of max_bytes \(1000 bytes\)"):
        sink.write(record("a/forward/x", tensor, 1), tensor)
    sink.close()
    assert len(list((tmp_path / "logs").glob("*.pt"))) == 1


def python(code, *arguments, **variables):
    environment = os.environ | variables
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


TAPPED = """
import sys, torch, tensortap
from tests.core.models import Mlp
from tensortap_megatron.layout import MegatronPtSink

torch.manual_seed(0)
model = Mlp()
with tensortap.attach(model, MegatronPtSink(sys.argv[1]), values="full", on_error="raise"):
    model(torch.full((2, 8), float(sys.argv[2]))).sum().backward()
"""


def test_two_processes_of_one_launch_write_one_folder_that_imports_as_one_run(tmp_path):
    processes = [
        python(TAPPED, tmp_path / "logs", rank, RANK=str(rank), WORLD_SIZE="2", MASTER_PORT="1")
        for rank in range(2)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    MEGATRON_PT.load(tmp_path / "logs", tensortap.RunDirectorySink(tmp_path / "b"), print)
    run = tensortap.open_run(tmp_path / "b")
    assert run.complete, run.problems
    torch.manual_seed(0)
    model = Mlp()
    for rank in range(2):
        found = run.tensor("up/forward/output", rank=rank)
        torch.testing.assert_close(found, model.up(torch.full((2, 8), float(rank))).detach())


WRITER = """
import itertools, sys, torch
from tests.core.store.building import info, record
from tensortap_megatron.layout import MegatronPtSink

sink = MegatronPtSink(sys.argv[1])
sink.open(info())
tensor = torch.ones(300_000)
for seq in itertools.count():
    sink.write(record("layers.0.attn.q/forward/output", tensor * seq, seq, seq), tensor * seq)
    print(seq, flush=True)
"""


def test_killed_at_any_moment_every_file_is_whole(tmp_path):
    process = python(WRITER, tmp_path / "logs")
    for _ in range(8):
        process.stdout.readline()
    process.kill()
    process.communicate()
    sink = tensortap.MemorySink()
    moved = MEGATRON_PT.load(tmp_path / "logs", sink, lambda done: None)
    assert moved.records >= 8
    for step, payload in enumerate(sink.payloads):
        assert torch.equal(payload, torch.full((300_000,), float(step)))
    [gap] = sink.coverage["gaps"]
    assert "the process ended before it wrote its coverage" in gap["reason"]
    assert not sink.coverage["complete"]


FULL = """
import resource, sys, torch
from tensortap import CaptureError
from tests.core.store.building import info, record
from tensortap_megatron.layout import MegatronPtSink

sink = MegatronPtSink(sys.argv[1])
sink.open(info())
small, large = torch.ones(10), torch.ones(100_000)
sink.write(record("a/forward/x", small), small)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    sink.write(record("a/forward/x", large, 1), large)
except CaptureError as failure:
    print(failure)
sink.close()
"""


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_no_part_of_it(tmp_path):
    process = python(FULL, tmp_path / "logs")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "_0002_a_forward_fp32_x.pt could not be written" in out
    assert sorted(path.suffix for path in (tmp_path / "logs").iterdir()) == [
        ".json",
        ".json",
        ".pt",
    ]
    sink = tensortap.MemorySink()
    MEGATRON_PT.load(tmp_path / "logs", sink, lambda done: None)
    assert [gap["name"] for gap in sink.coverage["gaps"]] == ["a/forward/x"]
