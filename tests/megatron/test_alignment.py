"""The same weights in Hugging Face's Llama and in Megatron-core: equal names, equal numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tests.megatron.launching import Launches

import tensortap

pytest.importorskip("megatron.core")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("megatron-alignment")

HIDDEN, HEADS, GROUPS, FFN, VOCAB, SEQ, BATCH, LAYERS = 32, 4, 2, 48, 96, 16, 2, 4
CLOSE = 1e-4
WORDS = (
    "embed",
    "layers.N",
    *(f"layers.N.{word}" for word in ("input_norm", "post_attn_norm", "attn", "mlp")),
    *(f"layers.N.attn.{word}" for word in ("q", "k", "v", "core", "out")),
    *(f"layers.N.mlp.{word}" for word in ("gate", "up", "down")),
    "final_norm",
    "lm_head",
)


@pytest.fixture(scope="module")
def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=SEQ,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.2,
        attn_implementation="eager",
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


@pytest.fixture(scope="module")
def runs(
    llama: transformers.LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tensortap.Run]:
    """The step of `spread.py` in transformers, and in Megatron in one and in two processes."""
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder / "weights")
    with tensortap.attach(llama, folder / "hf", values="full", on_error="raise"):
        for microbatch in (0, 1):
            generator = torch.Generator().manual_seed(100 + microbatch)
            tokens = torch.randint(0, 90, (BATCH, SEQ + 1), generator=generator)
            logits = llama(input_ids=tokens[:, :-1]).logits
            (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / 2).backward()
    launch = Launches(tmp_path_factory)
    weights = str(folder / "weights")
    return {
        "hf": tensortap.open_run(folder / "hf"),
        "megatron": tensortap.open_run(launch(1, hf=weights) / "run"),
        "tp": tensortap.open_run(launch(2, hf=weights, tp=2, sequence_parallel=True) / "run"),
    }


def common(one: tensortap.Run, other: tensortap.Run) -> list[str]:
    """Canonical names that both have; attention masks and positions are each framework's own."""
    every = [{*run.names(), *run.part_names()} for run in (one, other)]
    canonical = [name for name in every[0] & every[1] if _word(name) in WORDS]
    return sorted(name for name in canonical if "input." not in name)


def _word(name: str) -> str:
    return re.sub(r"layers\.\d+", "layers.N", name.split("/")[0])


def moments(name: str) -> Iterator[dict[str, int]]:
    if "/grad/" in name:
        yield {"step": 0}
    else:
        yield from ({"step": 0, "microbatch": n} for n in ((0,) if "/param/" in name else (0, 1)))


def aligned(run: tensortap.Run, name: str, **moment: int) -> torch.Tensor:
    """As [batch, seq, everything else]; the axes are put in order by their names."""
    tensor = run.tensor(name, **moment)
    axes = re.findall(r"\([^)]*\)|\S+", _dims(run, name))
    assert len(axes) == tensor.dim(), (name, axes)
    if "batch" not in axes:
        return tensor
    first = [axes.index("batch"), axes.index("seq")]
    rest = [n for n in range(len(axes)) if n not in first]
    return tensor.permute(*first, *rest).reshape(*(tensor.shape[n] for n in first), -1)


def _dims(run: tensortap.Run, name: str) -> str:
    """Of the record, or of the fused one that the name is a part of."""
    fused = re.sub(
        r"\.attn\.[qkv]/", ".attn.qkv/", re.sub(r"\.mlp\.(gate|up)/", ".mlp.gate_up/", name)
    )
    found = name if name in run.names() else fused
    dims = next(iter(run.records(found))).dims
    assert dims is not None, name
    return dims


@pytest.mark.parametrize("side", ["megatron", "tp"])
def test_every_common_name_has_the_same_numbers(runs: dict[str, tensortap.Run], side: str) -> None:
    names = common(runs["hf"], runs[side])
    worst = 0.0
    for name in names:
        for moment in moments(name):
            a = aligned(runs["hf"], name, **moment).double()
            b = aligned(runs[side], name, **moment).double()
            assert a.shape == b.shape, name
            if a.numel():
                worst = max(worst, (a - b).abs().max().item() / a.abs().max().item())
                assert worst <= CLOSE, name
    assert len(names) > 200


def test_the_common_names_are_those_of_all_that_both_compute(
    runs: dict[str, tensortap.Run],
) -> None:
    names = common(runs["hf"], runs["megatron"])
    for layer in range(LAYERS):
        for word in WORDS:
            module = word.replace("N", str(layer))
            assert f"{module}/forward/{'context' if 'core' in word else 'output'}" in names
            assert f"{module}/backward/grad_{'context' if 'core' in word else 'output'}" in names
            projection = re.search(r"(attn|mlp)\.(?!core)|norm|embed|lm_head", word)
            for phase in ("param", "grad") if projection else ():
                assert f"{module}/{phase}/weight" in names
    for layer in range(LAYERS):
        for word in ("query", "key", "value", "probs"):
            assert f"layers.{layer}.attn.core/forward/{word}" in names
            assert f"layers.{layer}.attn.core/backward/grad_{word}" in names
        for word in ("q", "k", "v"):
            assert f"layers.{layer}.attn.{word}/forward/input" in names
            assert f"layers.{layer}.attn.{word}/backward/grad_input" in names
