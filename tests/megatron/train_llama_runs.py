"""Starting examples/train_llama as its README does, and small Hugging Face Llamas to start from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_llama"
SMALL = ["--micro-batch", "2", "--global-batch", "4", "--seq-length", "32"]


class Ran(NamedTuple):
    """What one launch printed: a loss and a norm of each step."""

    losses: list[float]
    norms: list[float]
    out: str
    err: str
    status: int


def launch(command: list[Any], **environment: str) -> Ran:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TENSOR", "CUSTOM_QUANT"))}
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [str(word) for word in command],
        env=kept,
        check=False,
        timeout=240,
        capture_output=True,
        text=True,
    )
    losses = re.findall(r"step +\d+  loss ([\d.]+)", done.stdout)
    norms = re.findall(r"grad norm ([\d.]+)", done.stdout)
    numbers = [[float(text) for text in column] for column in (losses, norms)]
    return Ran(*numbers, done.stdout, done.stderr, done.returncode)


def python(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun]


def train(*arguments: Any, processes: int = 1, **environment: str) -> Ran:
    ran = launch([*python(processes), EXAMPLE / "train.py", *SMALL, *arguments], **environment)
    assert ran.status == 0, ran.err
    return ran


def refusal(*arguments: Any, **environment: str) -> str:
    """What train.py says when it refuses: one line."""
    ran = launch([sys.executable, EXAMPLE / "train.py", *SMALL, *arguments], **environment)
    assert ran.status == 2, ran.err
    assert ran.losses == []
    (line,) = ran.err.splitlines()
    return line


def save_llama(folder: Path, **changes: Any) -> Any:
    """A Hugging Face Llama whose weights are large enough for errors to show."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name else 0, 0.2)
    model.save_pretrained(folder)
    return model
