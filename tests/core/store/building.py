"""Records and runs to test the store with."""

from __future__ import annotations

import math

import torch

from tensortap.names import TensorName
from tensortap.records import Coordinates, RunInfo, Statistics, TensorRecord
from tensortap.store import RunDirectorySink

NAN, INF = float("nan"), float("inf")


def info(launch="launch-1", rank=0, world_size=1, **fields):
    return RunInfo(
        launch_id=launch, created="2026-01-01T00:00:00Z", rank=rank, world_size=world_size, **fields
    )


def statistics(values=(1.0, -2.0, 3.0), **changes):
    """Statistics of a few finite values, computed plainly."""
    values = [float(value) for value in values]
    mean = sum(values) / len(values)
    fields = {
        "count": len(values), "nan": 0, "posinf": 0, "neginf": 0, "zero": values.count(0.0),
        "min": min(values), "max": max(values), "absmax": max(map(abs, values)), "mean": mean,
        "std": math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)),
        "rms": math.sqrt(sum(v * v for v in values) / len(values)),
        "l1": sum(map(abs, values)), "l2": math.sqrt(sum(v * v for v in values)),
        "first": tuple(values[:10]),
    }  # fmt: skip
    return Statistics(**fields | changes)


def record(
    name="layers.0.mlp/forward/output", tensor=None, seq=0, step=0, rank=0, values=None, **fields
):
    """A record of `tensor` (full values), or of nothing but statistics."""
    at = {
        key: fields.pop(key) for key in ("microbatch", "call", "recompute", "eval") if key in fields
    }
    fields.setdefault("shape", tuple(tensor.shape) if tensor is not None else (3,))
    fields.setdefault(
        "dtype", str(tensor.dtype).removeprefix("torch.") if tensor is not None else "float32"
    )
    fields.setdefault("native", "model." + name.split("/")[0])
    return TensorRecord(
        name=TensorName.parse(name),
        at=Coordinates(step=step, rank=rank, **at),
        device="cpu",
        seq=seq,
        values=values or ("stats" if tensor is None else "full"),
        **fields,
    )


def write_run(path, items, run=None, steps=(), **options):
    """Write `(record, tensor)` pairs as one closed run; returns the path."""
    sink = RunDirectorySink(path, **options)
    sink.open(run or info())
    for written, tensor in items:
        sink.write(written, tensor)
    for step in steps or (0,):
        sink.end_step(step)
    sink.close()
    return path


def write_ranks(path, name, pieces, parallel=(), **fields):
    """One closed run of several ranks; `pieces` are (tensor, placement), one a rank."""
    for rank, (tensor, placement) in enumerate(pieces):
        place = parallel[rank] if parallel else {}
        written = record(name, tensor, rank=rank, placement=placement, **fields)
        run = info(rank=rank, world_size=len(pieces), parallel=place)
        write_run(path, [(written, tensor)], run)
    return path


def small_run(path, steps=2, names=3, **options):
    """A closed run with full values and statistics; returns the tensors by (name, step)."""
    generator = torch.Generator().manual_seed(0)
    sink = RunDirectorySink(path, **options)
    sink.open(info())
    expected = {}
    seq = 0
    for step in range(steps):
        for number in range(names):
            name = f"layers.{number}.attn.q/forward/output"
            tensor = torch.randn(4, 5, generator=generator)
            expected[name, step] = tensor
            sink.write(record(name, tensor, seq, step, stats=statistics()), tensor)
            sink.write(record(f"layers.{number}/backward/grad_output", None, seq + 1, step), None)
            seq += 2
        sink.end_step(step)
    report = {"complete": True, "steps": steps, "records": seq, "captured": {}}
    sink.cover(report | {"gaps": [], "notes": []})
    sink.close()
    return expected
