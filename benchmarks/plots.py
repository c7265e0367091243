"""How long `tensortap plot` and `tensortap formats` take on a run of a 24-layer Llama shape.

    python benchmarks/plots.py [--layers 24] [--hidden 128]

The run is captured here, into a temporary folder: two training steps, every tensor with all its
values. The commands run in processes of their own, so that imports count. Budget: 30 s for plot.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tensortap

BUDGET_S = 30.0


def capture(path: Path, layers: int, hidden: int, dtype: torch.dtype) -> None:
    """Two steps of 256 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, num_hidden_layers=layers, hidden_size=hidden,
        intermediate_size=hidden * 11 // 4, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    ids = torch.arange(256).view(2, 128)
    with tensortap.attach(model, path, values="full"):
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def seconds(*arguments: str) -> float:
    """Wall time of one `tensortap` command, which must succeed."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "tensortap", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    """Print a table; exit 1 when plot misses its budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, ref = Path(folder) / "bf16", Path(folder) / "fp32"
        capture(ref, options.layers, options.hidden, torch.float32)
        capture(run, options.layers, options.hidden, torch.bfloat16)
        with tensortap.open_run(ref) as opened:
            size = sum(r.payload.nbytes for r in opened.records() if r.payload) / 2**20
            print(
                f"{options.layers} layers, {len(opened.names()):,} names, {size:,.0f} MiB in fp32"
            )
        alone = seconds("plot", str(ref), "--out", f"{folder}/alone")
        rows = (
            ("plot", alone),
            ("plot --against", seconds("plot", str(run), "--against", str(ref),
                                       "--out", f"{folder}/against")),
            ("formats, five of them", seconds("formats", str(ref), "--limit", "1")),
        )  # fmt: skip
    print("\n| command | seconds |\n|---|---:|")
    for what, took in rows:
        print(f"| {what} | {took:.1f} |")
    sys.exit(alone > BUDGET_S)


if __name__ == "__main__":
    main()
