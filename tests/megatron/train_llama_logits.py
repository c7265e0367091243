"""Megatron's logits of the weights of Hugging Face models; as a script, one rank of several.

`train_llama_logits.py FOLDER TP`: for every `FOLDER/*/config.json`, writes `FOLDER/*/logits.pt`,
whole and without the vocabulary's padding, for the tokens in `FOLDER/tokens.pt`, and captures the
model's own logits as the run `FOLDER/*/run`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from examples.train_llama import options as command_line
from examples.train_llama.cpu import leave, run_on_cpu
from examples.train_llama.hf_weights import load_hf_llama
from examples.train_llama.model import Llama, build_stage, make_config
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

import tensortap


def write_logits(folder: Path, tp: int) -> None:
    options = command_line.parse(["--tp", str(tp)])
    tokens = torch.load(folder / "tokens.pt")
    for config in sorted(folder.glob("*/config.json")):
        found = logits(config.parent, tokens, options)
        if dist.get_rank() == 0:
            torch.save(found, config.parent / "logits.pt")


def logits(folder: Path, tokens: torch.Tensor, options: object) -> torch.Tensor:
    llama = Llama.from_folder(folder)
    model = build_stage(llama, make_config(llama, options), "local", tokens.shape[1])
    load_hf_llama(model, folder)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    select = {"select": "lm_head/forward/output", "values": "full"}
    with torch.no_grad(), tensortap.attach(model, folder / "run", **select):
        piece = model(tokens, positions, None)
    return gather_from_tensor_model_parallel_region(piece)[..., : llama.vocab_size]


def main(folder: Path, tp: int) -> None:
    torch.set_num_threads(1)
    run_on_cpu()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tp)
    write_logits(folder, tp)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
