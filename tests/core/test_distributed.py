"""Several gloo processes: nothing waits, nothing changes, in-place collectives are seen."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import torch

import tensortap

SCRIPT = """
    import os, sys, time, torch, torch.distributed as dist, tensortap
    from torch import nn

    out, tapped = sys.argv[1], sys.argv[2] == "tapped"
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.after = nn.Identity(), nn.Identity()

        def forward(self, x):
            x = self.before(x).detach().clone()
            x = self.before(x)
            dist.all_reduce(x)
            return self.after(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.reduced = nn.Linear(4, 4), nn.Linear(4, 4), Reduced()

        def forward(self, x):
            return self.b(self.a(x)) + self.reduced(x)

    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(dist.get_rank())
    if tapped:
        tap = tensortap.attach(model, out + "/run", values="full", on_error="raise")
    for _ in range(3):
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if tapped:
        tap.detach()
    torch.save(model.state_dict(), f"{out}/{sys.argv[2]}{dist.get_rank()}.pt")
    dist.barrier()
    time.sleep(1)  # The other rank may still be inside the barrier.
    # gloo's threads now and then end the interpreter's shutdown with std::terminate.
    os._exit(0)
"""


def launch(tmp_path, kind):
    # The launcher itself finds a free port.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [tmp_path / "script.py", tmp_path, kind]
    done = subprocess.run(command, check=False, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(tmp_path / f"{kind}{rank}.pt") for rank in range(2)]


def test_data_parallel_training_is_bitwise_equal_and_every_rank_is_captured(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    plain, tapped = launch(tmp_path, "plain"), launch(tmp_path, "tapped")
    for before, after in zip(plain, tapped, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)

    run = tensortap.open_run(tmp_path / "run")
    assert run.complete
    assert sorted(run.ranks) == [0, 1]
    assert run.info.world_size == 2
    assert "a/forward/output" in run.names()
    for step in range(3):
        own = [
            run.piece(record)
            for rank in range(2)
            for record in run.records("reduced.before/forward/output", step=step, rank=rank)
            if record.at.call == 1
        ]
        summed = [
            run.piece(record) for record in run.records("reduced.after/forward/input", step=step)
        ]
        assert len(own) == len(summed) == 2
        assert not torch.equal(own[0], own[1])
        for found in summed:
            assert torch.equal(found, own[0] + own[1])
