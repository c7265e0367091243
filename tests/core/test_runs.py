"""attach to a run directory: refusals, a full disk, and what the environment chooses."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from tests.core.models import Mlp, Stack

import tensortap

X = torch.randn(4, 8)


def test_a_run_is_read_back_as_it_was_captured(tmp_path):
    model, sink = Stack().eval(), tensortap.MemorySink()
    both = tensortap.TeeSink(sink, tensortap.RunDirectorySink(tmp_path / "run"))
    with tensortap.attach(model, both, values="full", on_error="raise"):
        model(X).sum().backward()
    with tensortap.open_run(tmp_path / "run") as run:
        assert run.names() == sink.names()
        assert run.complete
        for record in run.records():
            [payload] = [
                p
                for r, p in sink.find(str(record.name))
                if (r.at, r.seq) == (record.at, record.seq)
            ]
            assert torch.equal(run.piece(record), payload)
        assert run.info.model_class == "Stack"
        assert run.coverage()["gaps"] == []


def test_an_existing_run_is_refused_and_overwritten_when_asked(tmp_path):
    for _ in range(2):
        with tensortap.attach(model := Mlp(), tmp_path / "run", overwrite=True):
            model(X)
    before = Mlp()
    with pytest.raises(tensortap.RunExists, match="overwrite=True"):
        tensortap.attach(before, tmp_path / "run")
    assert not before._forward_hooks


def test_an_unwritable_directory_is_said_before_anything_is_hooked(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    model = Mlp()
    with pytest.raises(tensortap.TensortapError, match="file"):
        tensortap.attach(model, blocked / "run")
    assert not model._forward_hooks


def test_a_capture_of_nothing_leaves_no_directory(tmp_path):
    with pytest.raises(tensortap.CaptureError, match="captured nothing"):
        tensortap.attach(Mlp(), tmp_path / "run").detach()
    assert not (tmp_path / "run").exists()


def test_a_bare_attach_says_where_it_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with tensortap.attach(model := Mlp()) as tap:
        model(X)
    assert tap.path.parent == Path("tensortap_runs")
    assert tap.path.name.endswith("Z-Mlp")
    assert str(tap.path) in capsys.readouterr().err
    assert tensortap.open_run(tap.path).complete


def test_the_older_variables_write_full_payloads(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSOR_SAVE_ENABLED", "1")
    monkeypatch.setenv("TENSOR_SAVE_DIR", str(tmp_path / "logs"))
    with tensortap.attach(model := Mlp()) as tap:
        output = model(X)
    assert tap.path.parent == tmp_path / "logs"
    assert torch.equal(tensortap.open_run(tap.path).tensor("root/forward/output"), output)


def test_the_size_limit_stops_the_capture_and_not_the_model(tmp_path):
    model = Stack()
    with pytest.warns(tensortap.CaptureWarning, match="max_bytes"):
        with tensortap.attach(model, tmp_path / "run", values="full", max_bytes="400KiB"):
            for _ in range(30):
                model(X).sum().backward()
    run = tensortap.open_run(tmp_path / "run")
    assert not run.complete
    size = sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file())
    assert size <= (400 + 128) << 10  # What closing the run adds comes on top.
    assert sum(1 for _ in run.records()) > 5


def test_a_full_disk_does_not_kill_the_training_run(tmp_path):
    script = f"""
        import resource, signal, torch, tensortap
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        tap = tensortap.attach(model, {str(tmp_path / "run")!r}, values="full")
        for step in range(40):
            model(torch.randn(32, 64)).sum().backward()
            optimizer.step()
        tap.detach()
        print("trained", step + 1)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "trained 40" in done.stdout, done.stderr
    assert done.stderr.count("CaptureWarning") == 1
    run = tensortap.open_run(tmp_path / "run")
    assert not run.complete
    read = [run.piece(record) for record in run.records() if record.payload]
    assert len(read) > 3


def test_ranks_of_one_launch_share_a_default_directory(tmp_path):
    script = """
        import torch, tensortap
        model = torch.nn.Linear(4, 4)
        with tensortap.attach(model) as tap:
            model(torch.ones(2, 4))
        print(tap.path)
    """
    environ = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    environ["TENSORTAP_DIR"] = str(tmp_path)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=environ | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    paths = {rank.communicate(timeout=120)[0].strip() for rank in ranks}
    assert len(paths) == 1
    run = tensortap.open_run(paths.pop())
    assert sorted(run.ranks) == [0, 1]
    assert {record.at.rank for record in run.records("root/forward/output")} == {0, 1}
    assert run.complete


def test_a_forked_child_does_not_touch_the_run(tmp_path):
    model = Mlp()
    tap = tensortap.attach(model, tmp_path / "run")
    model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        tap._at_exit()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    model(X)
    tap.detach()
    run = tensortap.open_run(tmp_path / "run")
    assert sum(1 for _ in run.records("root/forward/output")) == 2
