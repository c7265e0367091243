"""All eight modes of a Mamba: runs on one input, a table of their errors, and a picture.

python quamba_modes.py [MODEL] [--out DIR]

MODEL is a local path or the name of a MambaForCausalLM on the hub, unquantised; by default a small
one of random weights is made here. DIR (default: quamba_modes_runs) gets a run a mode, the
scales, and errors.png; what an earlier start of this script left there is replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

import tensortap
from tensortap_analysis import RunComparison, compare
from tensortap_hf import modes, quamba

TEXT = Path(__file__)
SELECT = "layers.*/forward/output,layers.*.mixer/forward/output,layers.*.mixer.scan/forward/*"
REFERENCE = "fp32"


def load(name: str | None) -> tuple[Any, list[int]]:
    """The model, and the token ids of a text."""
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(name)(TEXT.read_text())["input_ids"]
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=256, hidden_size=96, num_hidden_layers=6, time_step_rank=6)
    return MambaForCausalLM(config).eval(), list(TEXT.read_bytes())  # A byte is a token.


def capture(model: Any, scales: quamba.Scales, ids: torch.Tensor, out: Path) -> None:
    """One run a mode below `out`; a mode is undone before the next begins."""
    for name in modes.family("quamba").presets["all"]:
        with (
            modes.apply(model, name, family="quamba", calibration=scales),
            tensortap.attach(model, out / name, select=SELECT, values="full", overwrite=True),
            torch.no_grad(),
        ):
            model(ids, use_cache=False)


def layers(run: RunComparison, word: str = "") -> dict[int, Any]:
    """Layer -> what its outputs differ by; `word` chooses those of a part of it."""
    names = {f"layers.{n}{word}/forward/output": n for n in range(len(run.pairs))}
    return {names[pair.name]: pair.metrics for pair in run.pairs if pair.name in names}


def table(found: Mapping[str, RunComparison]) -> Table:
    """One row a mode: errors of its first and last mixer and layer, and modes it must be equal to.

    A mixer's output is what it adds to the residual stream, a layer's is the sum.
    """
    shown = Table("mode", title="MSE, and the last layer's correlation")
    for heading in ("first mixer", "first layer", "last mixer", "last layer", "correlation"):
        shown.add_column(heading)
    shown.add_column("equal to")
    for name, run in found.items():
        by_layer, by_mixer = layers(run), layers(run, ".mixer")
        ends = [
            metrics[place].mse
            for place in (min(by_layer), max(by_layer))
            for metrics in (by_mixer, by_layer)
        ]
        numbers = [*(f"{mse:.3e}" for mse in ends), f"{by_layer[max(by_layer)].correlation:.8f}"]
        shown.add_row(name, *numbers, ", ".join(modes.get(name, "quamba").equals))
    return shown


def different(found: Mapping[str, RunComparison]) -> dict[str, str]:
    """Modes that differ -> what to call them: equal ones are one line in a picture."""
    groups = {name: (name, *modes.get(name, "quamba").equals) for name in found}
    return {name: " = ".join(group) for name, group in groups.items() if name == min(group)}


def picture(found: Mapping[str, RunComparison], out: Path, path: Path) -> None:
    """How the error grows over the layers, and how it is distributed in the last one."""
    figure, (growth, spread) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    last = f"layers.{max(layers(next(iter(found.values()))))}/forward/output"
    with tensortap.open_run(out / REFERENCE) as run:
        exact = run.tensor(last)
    for name, label in different(found).items():
        by_layer = layers(found[name])
        growth.plot(list(by_layer), [m.rmse / m.ref.rms for m in by_layer.values()], label=label)
        with tensortap.open_run(out / name) as mine:
            error = (mine.tensor(last) - exact).flatten()
        spread.hist(error.numpy(), bins=100, histtype="step", label=label)
    growth.set(xlabel="layer", ylabel="relative error of its output", yscale="log")
    spread.set(xlabel=f"difference from {REFERENCE}, {last}", ylabel="values", yscale="log")
    growth.legend(title="mode")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="path or hub name; default: a small random one")
    parser.add_argument("--out", type=Path, default=Path("quamba_modes_runs"))
    arguments = parser.parse_args()
    console = Console()
    model, ids = load(arguments.model)

    # Samples of different lengths, none of them what is captured.
    samples = [torch.tensor(ids[256 + 200 * n :][: 100 + 40 * n]) for n in range(5)]
    scales = quamba.calibrate(model, samples)
    scales.save(arguments.out / "scales")
    capture(model, scales, torch.tensor([ids[:256]]), arguments.out)

    names = [name for name in modes.family("quamba").presets["all"] if name != REFERENCE]
    result = compare(arguments.out / REFERENCE, *(arguments.out / name for name in names))
    found = dict(zip(names, result.runs, strict=True))
    console.print(table(found))
    picture(found, arguments.out, arguments.out / "errors.png")
    console.print(f"runs, scales and errors.png: {arguments.out}")
    console.print(f"more pictures: tensortap plot {arguments.out}/0 --against {arguments.out}/fp32")


if __name__ == "__main__":
    main()
