"""Is a port to Neuron right? Every layer of a small Llama, in three ways.

python run.py [--out DIR]

The model is made here, and nothing is downloaded. DIR (default: neuron_layers_runs) gets the model,
a folder for each run, and the reports; what an earlier start of this script left there is
replaced. torch_xla on the CPU stands for the Neuron device: the same lazy tensors and graphs.
Without torch_xla the port is left out.

Exit code: 0 the port agrees, and the broken port is found out; 1 otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tensortap_neuron.command import app

PROMPTS = ("The capital of France is", "def area(radius):")
BROKEN = 5
"""The layer that has a fault in the broken port."""
SHAPE = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 8}


def make_models(good: Path, broken: Path) -> None:
    """A Llama of 12 layers and random weights, and the same with one weight that is wrong."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, num_hidden_layers=12, num_key_value_heads=4, **SHAPE)
    model = LlamaForCausalLM(config)
    model.save_pretrained(good)
    with torch.no_grad():
        model.model.layers[BROKEN].mlp.down_proj.weight[3, 7] += 4
    model.save_pretrained(broken)


def tensortap_neuron(*words: object) -> int:
    """Say and run `tensortap neuron …`; returns its exit code."""
    arguments = [str(word) for word in words]
    print(f"\n$ tensortap neuron {shlex.join(arguments)}", flush=True)
    code: int = app(arguments, standalone_mode=False) or 0
    return code


def layers(model: Path, out: Path, device: str, dtype: str) -> int:
    """Capture every layer for each prompt."""
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return tensortap_neuron(
        "layers", "--model", model, *prompts, "--device", device, "--dtype", dtype,
        "--out", out, "--overwrite",
    )  # fmt: skip


def compare(out: Path, port: str) -> int:
    """Compare a port with the reference in fp32; the reference in bf16 is what it may differ by."""
    return tensortap_neuron(
        "compare", "--gpu-path", out / "fp32", "--neuron-path", out / port,
        "--noise", out / "bf16", "--report-path", out / f"{port}-report",
    )  # fmt: skip


def accused(out: Path, port: str) -> set[str]:
    """What the report calls the first local divergence, of each prompt."""
    report = json.loads((out / f"{port}-report.json").read_text())
    return {prompt["first_local_divergence"] for prompt in report["prompts"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("neuron_layers_runs"))
    out = parser.parse_args().out
    make_models(out / "model", out / "broken-model")
    layers(out / "model", out / "fp32", "cpu", "fp32")
    layers(out / "model", out / "bf16", "cpu", "bf16")

    lazy = importlib.util.find_spec("torch_xla") is not None
    device = "xla" if lazy else "cpu"
    found = []
    if lazy:
        os.environ.setdefault("PJRT_DEVICE", "CPU")
        layers(out / "model", out / "port", device, "bf16")
        agrees = compare(out, "port") == 0
        found.append(f"the port {'agrees' if agrees else 'DIFFERS'}")
    else:
        agrees = True
        found.append("torch_xla is not installed: the port on XLA was LEFT OUT, nothing is said")
    layers(out / "broken-model", out / "broken-port", device, "bf16")
    caught = compare(out, "broken-port") == 1
    caught = caught and accused(out, "broken-port") == {f"layers.{BROKEN}/forward/output"}
    where = "is found out, in the right layer" if caught else "is NOT found out"
    found.append(f"the broken port (on {device}) {where}")
    print(f"\n{'; '.join(found)}. Reports: {out}/*-report*")
    raise SystemExit(0 if agrees and caught else 1)


if __name__ == "__main__":
    main()
