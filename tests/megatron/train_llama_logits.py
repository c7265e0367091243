"""Started by torch.distributed.run: Megatron's logits of the weights of Hugging Face models.

`train_llama_logits.py FOLDER TP`: for every `FOLDER/*/config.json`, writes `FOLDER/*/logits.pt`,
whole and without the vocabulary's padding, for the tokens in `FOLDER/tokens.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from examples.train_llama.cpu import leave, run_on_cpu

run_on_cpu()

from examples.train_llama import options as command_line  # noqa: E402
from examples.train_llama.hf_weights import load_hf_llama  # noqa: E402
from examples.train_llama.model import Llama, build_stage, make_config  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region  # noqa: E402


def logits(folder: Path, tokens: torch.Tensor, options: object) -> torch.Tensor:
    llama = Llama.from_folder(folder)
    model = build_stage(llama, make_config(llama, options), "local", tokens.shape[1])
    load_hf_llama(model, folder)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        piece = model(tokens, positions, None)
    return gather_from_tensor_model_parallel_region(piece)[..., : llama.vocab_size]


def main(folder: Path, tp: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(int(tp))
    options = command_line.parse(["--tp", tp])
    tokens = torch.load(folder / "tokens.pt")
    for config in folder.glob("*/config.json"):
        found = logits(config.parent, tokens, options)
        if dist.get_rank() == 0:
            torch.save(found, config.parent / "logits.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
