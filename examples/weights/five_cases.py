"""Five things that go wrong with weights, each planted in a small model, and what a scan says.

python examples/weights/five_cases.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tensortap_analysis.weights import Scope
from tensortap_analysis.weights.health import health_check
from tensortap_analysis.weights.recommend import compression_plan, quant_plan

State = dict[str, torch.Tensor]
LAYERS, HIDDEN = 6, 128


def model() -> State:
    """Weights of a small transformer, as a fresh one has them."""
    torch.manual_seed(0)
    state = {"embed_tokens.weight": torch.randn(512, HIDDEN) * 0.02}
    for index in range(LAYERS):
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.up_proj", (4 * HIDDEN, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, 4 * HIDDEN)),
        ):
            state[f"layers.{index}.{name}.weight"] = torch.randn(shape) * 0.02
    return state


def unstable(state: State) -> str:
    """Directions that all but vanish: what was small becomes noise in the next layer."""
    q, _, p = torch.linalg.svd(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64))
    spectrum = torch.logspace(0, -6.3, HIDDEN, dtype=torch.float64)
    state["layers.2.self_attn.o_proj.weight"] = (q * spectrum @ p).float()
    return "1. Numerically unstable: layers.2.self_attn.o_proj"


def hard_to_quantise(state: State) -> str:
    """Some values a hundred times the others: a scale that holds them loses the rest."""
    weight = state["layers.4.mlp.down_proj.weight"]
    weight[:, 7] = 2.0
    weight[:, 70] = -3.0
    return "2. Hard to quantise: layers.4.mlp.down_proj"


def exploded(state: State) -> str:
    """A norm far from those of the same layer in other depths: training went wrong there."""
    state["layers.1.mlp.up_proj.weight"] *= 30
    state["layers.5.mlp.up_proj.weight"] /= 30
    return "3. Exploded and vanished: layers.1.mlp.up_proj, layers.5.mlp.up_proj"


def redundant(state: State) -> str:
    """A rank far below the size: two thin matrices would do."""
    thin = torch.randn(4 * HIDDEN, 8) @ torch.randn(8, HIDDEN)
    state["layers.3.mlp.up_proj.weight"] = thin * 0.007
    return "4. Redundant: layers.3.mlp.up_proj"


def dead(state: State) -> str:
    """Units whose weights are all zero: they never fire."""
    state["layers.0.mlp.up_proj.weight"][::4] = 0
    return "5. Dead neurons: layers.0.mlp.up_proj"


CASES: tuple[Callable[[State], str], ...] = (unstable, hard_to_quantise, exploded, redundant, dead)


def main() -> None:
    """Scan each sick model and print what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        for plant in CASES:
            state = model()
            print(f"\n{plant(state)}")
            path = Path(folder) / f"{plant.__name__}.safetensors"
            save_file(state, path)
            show(path)


def show(path: Path) -> None:
    """Score, issues, and what is recommended where something is."""
    result = Scope(path).scan(parallel=True)
    score, issues = health_check(result)
    print(f"   score {score:.0f}")
    for severity, found in issues.items():
        for issue in found:
            print(f"   {severity}: {issue}")
    for plan in compression_plan(result):
        print(f"   {plan.layer}: rank {plan.rank} leaves {plan.error:.1%}, saves {plan.share:.0%}")
    formats = quant_plan(result, sqnr_db=20).by_format()
    counts = ", ".join(f"{name} for {len(layers)}" for name, layers in formats.items())
    print(f"   formats that keep 20 dB: {counts}")


if __name__ == "__main__":
    main()
