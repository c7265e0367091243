"""Several processes, restarts and old runs: never mixed, and nothing foreign is deleted."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.core.store.building import info, record, small_run, write_run

from tensortap.errors import RunError, RunExists
from tensortap.store import RunDirectorySink, open_run

RANKS = """
import sys
from tensortap.errors import RunExists
from tensortap.store import RunDirectorySink
from tests.core.store.building import info, record

path, launch, world, overwrite = sys.argv[1], sys.argv[2], int(sys.argv[4]), sys.argv[5] == "1"
for rank in map(int, sys.argv[3].split(",")):
    sink = RunDirectorySink(path, overwrite=overwrite)
    try:
        sink.open(info(launch, rank, world))
    except RunExists as failure:
        print("exists", failure)
        continue
    for seq in range(50):
        sink.write(record("a/forward/x", None, seq, rank=rank), None)
    sink.close()
    print("wrote", rank)
"""


def start(path, launch, ranks, world, overwrite=False):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    arguments = [path, launch, ranks, str(world), str(int(overwrite))]
    return subprocess.Popen(
        [sys.executable, "-c", RANKS, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True,
    )  # fmt: skip


def outputs(processes):
    found = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), found
    return found


@pytest.mark.parametrize("overwrite", [False, True])
def test_processes_of_one_launch_share_a_run(tmp_path, overwrite):
    if overwrite:
        small_run(tmp_path / "run")
    processes = [start(tmp_path / "run", "new", f"{r},{r + 3}", 6, overwrite) for r in range(3)]
    outputs(processes)
    with open_run(tmp_path / "run") as run:
        assert run.ranks == [0, 1, 2, 3, 4, 5]
        assert run.complete
        assert len(list(run.records())) == 300
        assert run.names() == ["a/forward/x"]
        assert run.info.launch_id == "new"
    assert sorted(os.listdir(tmp_path)) == ["run"]


def test_two_processes_that_believe_they_are_one_rank(tmp_path):
    results = outputs([start(tmp_path / "run", "same", "0", 1) for _ in range(2)])
    assert sorted(result.split()[0] for result in results) == ["exists", "wrote"]
    with open_run(tmp_path / "run") as run:
        assert len(list(run.records())) == 50
        assert run.complete


def test_two_launches_into_one_directory_do_not_mix(tmp_path):
    processes = [start(tmp_path / "run", f"launch{n}", "0,1,2", 3) for n in range(2)]
    results = outputs(processes)
    assert sorted(r.split()[0] for r in results) == ["exists", "wrote"]
    with open_run(tmp_path / "run") as run:
        assert run.complete
        assert {run.info_of(rank).launch_id for rank in run.ranks} == {run.info.launch_id}


def test_a_restarted_launch_is_refused_and_the_old_run_kept(tmp_path):
    expected = small_run(tmp_path / "run")
    for launch in ("launch-1", "launch-2"):
        with pytest.raises(RunExists, match=r"another path|Choose"):
            RunDirectorySink(tmp_path / "run").open(info(launch))
    with open_run(tmp_path / "run") as run:
        assert run.complete
        assert len([r for r in run.records() if r.payload]) == len(expected)


def test_overwrite_replaces_a_run_and_leaves_nothing_behind(tmp_path):
    small_run(tmp_path / "run")
    write_run(tmp_path / "run", [(record("new/forward/x"), None)], info("launch-2"), overwrite=True)
    with open_run(tmp_path / "run") as run:
        assert run.names() == ["new/forward/x"]
        assert run.complete
    assert os.listdir(tmp_path) == ["run"]


def test_overwrite_follows_a_link_to_the_directory_it_names(tmp_path):
    small_run(tmp_path / "real")
    (tmp_path / "run").symlink_to(tmp_path / "real")
    write_run(tmp_path / "run", [(record("new/forward/x"), None)], info("launch-2"), overwrite=True)
    assert (tmp_path / "run").is_symlink()
    with open_run(tmp_path / "run") as run:
        assert run.names() == ["new/forward/x"]


def test_overwrite_never_deletes_what_is_not_a_run(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(RunExists, match=r"thesis\.tex"):
        RunDirectorySink(tmp_path / "home", overwrite=True).open(info())
    assert (tmp_path / "home/thesis.tex").read_text() == "years of work"
    with pytest.raises(RunExists, match="is a file"):
        RunDirectorySink(tmp_path / "home/thesis.tex", overwrite=True).open(info())


def test_overwrite_leaves_a_run_alone_that_is_being_written(tmp_path):
    sink = RunDirectorySink(tmp_path / "run")
    sink.open(info())
    with pytest.raises(RunExists, match="still being written"):
        RunDirectorySink(tmp_path / "run", overwrite=True).open(info("launch-2"))
    sink.write(record(), None)
    sink.close()
    with open_run(tmp_path / "run") as run:
        assert run.complete


def test_a_run_with_damaged_run_json_is_refused_or_replaced(tmp_path):
    small_run(tmp_path / "run")
    (tmp_path / "run/run.json").write_text("{")
    os.utime(tmp_path / "run/run.json", (0, 0))
    with pytest.raises(RunExists, match="overwrite=True"):
        RunDirectorySink(tmp_path / "run").open(info("launch-2"))
    write_run(tmp_path / "run", [(record("new/forward/x"), None)], info("launch-2"), overwrite=True)
    with open_run(tmp_path / "run") as run:
        assert run.names() == ["new/forward/x"]


def test_several_readers_at_once_do_not_take_each_other_for_a_writer(tmp_path):
    small_run(tmp_path / "run")

    def probe(_):
        with open_run(tmp_path / "run") as run:
            return run.problems

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(probe, range(64))) == [[]] * 64


def test_a_run_is_read_while_it_is_written(tmp_path):
    sink = RunDirectorySink(tmp_path / "run")
    sink.open(info())
    tensors = [torch.full((10,), float(n)) for n in range(30)]
    for seq, tensor in enumerate(tensors):
        with open_run(tmp_path / "run") as before:
            sink.write(record("a/forward/x", tensor, seq, seq), tensor)
            if seq % 4 == 3:
                sink.end_step(seq)
            # What was written after the run was opened is not seen, and is no damage.
            assert [r.seq for r in before.records()] == list(range(seq))
            assert before.problems == [f"{tmp_path}/run/rank00000: is still being written"]
        with open_run(tmp_path / "run") as after:
            assert after.tensor("a/forward/x", step=seq).equal(tensor)
    sink.close()
    assert open_run(tmp_path / "run").complete


def test_more_ranks_than_a_process_may_open_files(tmp_path):
    write_run(tmp_path / "run", [(record(tensor=torch.ones(3)), torch.ones(3))])
    first = tmp_path / "run/rank00000"
    for rank in range(1, 120):
        shutil.copytree(first, tmp_path / f"run/rank{rank:05d}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    try:
        with open_run(tmp_path / "run") as run:
            assert len(run.ranks) == 120
            assert len(run.problems) >= 119  # copies say that they are of rank 0
            assert run.tensor("layers.0.mlp/forward/output", rank=0).sum() == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_empty_directory_is_used(tmp_path):
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", [(record(), None)])
    with open_run(tmp_path / "run") as run:
        assert run.complete


def test_what_is_no_run_says_so(tmp_path):
    with pytest.raises(RunError, match="no run at"):
        open_run(tmp_path / "absent")
    with pytest.raises(RunError, match="not a run"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="no run at"):
        open_run(tmp_path / "file")
