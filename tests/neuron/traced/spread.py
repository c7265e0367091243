"""A Llama on fake NxD layers over several processes, and Hugging Face's own: captured by attach.

    python tests/neuron/traced/spread.py OUT '{"ranks": 4, "sequence_parallel_enabled": true}'

Writes OUT/whole (transformers, one process) and OUT/pieces (fake NxD, gloo between `ranks`).
The processes are forked, so that torch is imported once; the collectives are real.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tests.neuron.traced import fake_nxd
from tests.neuron.traced.fake_llama import FakeNeuronLlama, huggingface

import tensortap

SELECT = "*/forward/output,*/forward/input,*/param/*,!rotary/*,!model.rotary_emb/*"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def one_rank(rank: int, options: dict[str, Any], out: Path) -> None:
    ranks = options["ranks"]
    store = dist.FileStore(str(out / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    neuron = SimpleNamespace(
        sequence_parallel_enabled=options.get("sequence_parallel_enabled", False),
        qkv_kernel_fuse_residual_add=False,
        on_device_sampling_config=object(),
    )
    theirs = huggingface()
    model = FakeNeuronLlama(theirs.config, neuron, dist.group.WORLD).load(theirs)
    positions = torch.arange(IDS.shape[1])[None]
    with tensortap.attach(model, out / "pieces", select=SELECT, values="full"):
        model(IDS, torch.ones_like(IDS), positions)
    dist.barrier()
    dist.destroy_process_group()


def main(out: Path, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(options["ranks"]):
        child = os.fork()
        if child == 0:
            sys.modules.update(fake_nxd.modules())
            one_rank(rank, options, out)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    with tensortap.attach(model := huggingface(), out / "whole", select=SELECT, values="full"):
        with torch.no_grad():
            model(IDS, logits_to_keep=1)
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    sys.exit(len(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
