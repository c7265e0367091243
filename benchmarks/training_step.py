"""What capturing and fake quantisation cost a Megatron-core training step, on the CPU.

    python benchmarks/training_step.py [--rounds 5] [--steps 3]

The 8-layer shape of the capture benchmark as a `GPTModel` of the local spec, in one process. All
lanes take turns in every round; a lane's ratio is its median step over the median of the untapped
steps just before and after it, and the table shows the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", module="megatron")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from examples.train_llama.cpu import CPU_CONFIG, run_on_cpu  # noqa: E402

import tensortap  # noqa: E402
from tensortap_megatron import quantize  # noqa: E402

BATCH, TOKENS, VOCABULARY = 4, 256, 8000
Lane = Callable[[Any, Path], AbstractContextManager[Any]]


def build() -> tuple[Any, Callable[[], None]]:
    """The model, and one forward, backward and AdamW step of it."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=8,
        hidden_size=512,
        ffn_hidden_size=1376,
        num_attention_heads=8,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **CPU_CONFIG,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, VOCABULARY, TOKENS, position_embedding_type="rope")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    positions = torch.arange(TOKENS).expand(BATCH, -1)
    mask = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).triu(1)

    def step() -> None:
        model(tokens, positions, mask, labels=tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def tapped(**options: Any) -> Lane:
    """A tap with these options."""
    return lambda model, path: tensortap.attach(model, path, on_error="raise", **options)


def quantised(format: str) -> Lane:
    """Every linear and attention product in a format."""
    return lambda model, path: quantize(model, format)


@contextmanager
def both(model: Any, path: Path) -> Iterator[None]:
    """Quantised, and its statistics recorded."""
    with ExitStack() as stack:
        stack.enter_context(quantize(model, "mxfp4"))
        stack.enter_context(tensortap.attach(model, path, on_error="raise", phases=PASSES))
        yield


PASSES = ("forward", "backward")
LANES: dict[str, Lane] = {
    "nothing selected": tapped(ranks="1"),
    "statistics": tapped(phases=PASSES),
    "statistics of modules alone": tapped(phases=PASSES, using="native"),
    "statistics, four phases": tapped(),
    "full values": tapped(phases=PASSES, values="full"),
    **{f"quantised to {name}": quantised(name) for name in ("bf16", "hifp8", "mxfp8", "mxfp4")},
    "quantised to mxfp4, statistics": both,
}


def seconds(step: Callable[[], None], steps: int) -> float:
    """The median step, after one that warms up."""
    step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """Ratios of every lane, one a round."""
    model, step = build()
    ratios: dict[str, list[float]] = {name: [] for name in LANES}
    before = seconds(step, steps)
    for _ in range(rounds):
        for name, lane in LANES.items():
            with tempfile.TemporaryDirectory() as scratch, lane(model, Path(scratch) / "run"):
                taken = seconds(step, steps)
            after = seconds(step, steps)
            ratios[name].append(taken / ((before + after) / 2))
            before = after
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    with run_on_cpu():
        ratios = measure(options.rounds, options.steps)
    print("| lane | ratio to the untapped step | range |\n|---|---|---|")
    for name, found in ratios.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle:.2f}x | {min(found):.2f} to {max(found):.2f} |")


if __name__ == "__main__":
    main()
