"""A Llama on fake NxD layers over several processes, and Hugging Face's own: captured by attach.

    python tests/neuron/traced/spread.py OUT RANKS

Writes OUT/whole (transformers, one process), OUT/pieces (fake NxD, gloo between the ranks) and
OUT/split (the same with sequence parallelism). The processes are forked, so that torch is
imported once; the collectives are real.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tests.neuron.traced import fake_nxd
from tests.neuron.traced.fake_llama import FakeNeuronLlama, huggingface

import tensortap

SELECT = r"*/forward/output,*/forward/input,*/param/*,!re:(rotary|model\.rotary_emb)/.*"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def one_rank(rank: int, ranks: int, out: Path) -> None:
    store = dist.FileStore(str(out / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    theirs = huggingface()
    for run, split in (("pieces", False), ("split", True)):
        neuron = SimpleNamespace(
            sequence_parallel_enabled=split,
            qkv_kernel_fuse_residual_add=False,
            on_device_sampling_config=object(),
        )
        model = FakeNeuronLlama(theirs.config, neuron, dist.group.WORLD).load(theirs)
        with tensortap.attach(model, out / run, select=SELECT, values="full"):
            model(IDS, torch.ones_like(IDS), torch.arange(IDS.shape[1])[None])
    dist.barrier()
    dist.destroy_process_group()


def main(out: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            sys.modules.update(fake_nxd.modules())
            one_rank(rank, ranks, out)
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    with tensortap.attach(model := huggingface(), out / "whole", select=SELECT, values="full"):
        with torch.no_grad():
            model(IDS, logits_to_keep=1)
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    sys.exit(len(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
