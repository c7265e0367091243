"""What is captured on XLA: the values and statistics a CPU has, whatever the model does to them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from tests.core.models import Inside
from tests.neuron.lazy import Block, Xla, assert_same_run, assert_same_statistics
from torch import nn

import tensortap
from tensortap.stats import statistics

pytestmark = pytest.mark.xla


def captured(model: nn.Module, step, **options) -> tensortap.MemorySink:
    """Two calls of `step` with all values kept."""
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise", **options):
        for _ in range(2):
            step()
    return sink


def on_both(xla: Xla, model: nn.Module, x: torch.Tensor, call=nn.Module.__call__, **options):
    """The run of a model on the CPU and that of its copy on XLA, where no hook runs a graph."""
    twin, there = xla.put(copy.deepcopy(model)), xla.put(x)

    def lazily():
        with xla.no_execution():
            call(twin, there)
        xla.sync()

    with torch.no_grad():
        return captured(model, lambda: call(model, x), **options), captured(twin, lazily, **options)


class Overwrites(nn.Module):
    """In-place operations on what hooks have seen: outputs, inputs, views and whole buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        y.add_(1)
        z = self.second(self.act(y))
        z.view(-1)[3:7].mul_(10)
        z.data.add_(2)
        y.zero_()
        return z


class Cached(nn.Module):
    """A key-value cache in buffers that each call writes a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(8, 8)
        self.register_buffer("cache", torch.zeros(4, 2, 8))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.read = Inside(lambda cache: cache * 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache.index_copy_(0, self.place.view(1), self.key(x).unsqueeze(0))
        self.place.add_(1)
        return self.read(self.cache)


@dataclass
class Outputs:
    hidden: torch.Tensor
    extra: dict[str, torch.Tensor]


class Many(nn.Module):
    """Tuples, dictionaries, dataclasses, integers, booleans and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Inside(lambda x: (x * 2, (x > 0, x.argmax(-1))))
        self.named = Inside(lambda x: {"a": x + 1, "none": x[:0]})
        self.whole = Inside(lambda x: Outputs(x.t(), {"z": x.sum()}))

    def forward(self, x: torch.Tensor) -> Outputs:
        a, _ = self.pair(x)
        return self.whole(self.named(a)["a"])


class Narrow(nn.Module):
    """A linear whose operands pass through fp8."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.quantize = Inside(lambda x: x.to(kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.quantize(x).to(x.dtype))


@pytest.mark.parametrize("make", [Overwrites, Cached, Many, lambda: Block(8)])
def test_values_and_statistics_are_those_of_the_cpu(xla, make):
    assert_same_run(*on_both(xla, make(), torch.randn(2, 8)))


def test_exponents_are_counted_as_on_the_cpu(xla):
    expected, found = on_both(xla, nn.Identity(), 1e3 * torch.randn(50, 8), exponents=True)
    for (record, _), (other, _) in zip(
        expected.find("root/forward/output"), found.find("root/forward/output"), strict=True
    ):
        assert other.stats.exponents == record.stats.exponents
        assert len(record.stats.exponents) > 5


def test_what_an_inplace_op_overwrites_was_captured_before(xla):
    _, found = on_both(xla, Overwrites(), 10 * torch.randn(2, 8))
    assert found.find("act/forward/input")[0][1].min() < 0
    assert found.find("act/forward/output")[0][1].min() == 0
    assert not found.find("second/forward/input")[0][1].eq(0).all()
    first, later = (value for _, value in found.find("second/forward/output"))
    assert torch.equal(first, later)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_keeps_its_bits(xla, kind):
    expected, found = on_both(xla, Narrow(kind), torch.randn(2, 8))
    for (record, value), (other, fetched) in zip(
        expected.find("quantize/forward/output"), found.find("quantize/forward/output"), strict=True
    ):
        assert fetched.dtype is kind
        assert torch.equal(fetched.view(torch.uint8), value.view(torch.uint8))
        assert other.stats.first == record.stats.first
        assert_same_statistics(record.stats, other.stats, 1e-6)


def test_bf16_and_autocast_differ_by_bf16_rounding_only(xla):
    eps = torch.finfo(torch.bfloat16).eps
    model = nn.Sequential(Block(8), Block(8))
    half, halved = on_both(xla, copy.deepcopy(model).bfloat16(), torch.randn(4, 8).bfloat16())
    assert_same_run(half, halved, rtol=4 * eps)
    assert halved.find("0.up/forward/output")[0][1].dtype is torch.bfloat16

    def cast(model, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return model(x)

    mixed, lazily = on_both(xla, model, torch.randn(4, 8), cast)
    assert lazily.find("0.up/forward/output")[0][1].dtype is torch.bfloat16
    names = [name for name in mixed.names() if not name.startswith(("0.act", "1.act"))]
    for name in names:
        value, fetched = mixed.find(name)[0][1], lazily.find(name)[0][1]
        scale = value.float().abs().max().item()
        assert torch.allclose(value.float(), fetched.float(), atol=4 * eps * scale), name


def test_complex_numbers_are_captured_unless_torch_xla_garbles_them(xla):
    model = nn.Identity()
    x = torch.randn(3, 4, dtype=torch.complex64)
    expected, found = on_both(xla, model, x)
    assert_same_run(expected, found)
    sink = tensortap.MemorySink()
    there = xla.put(nn.Linear(2, 2))
    with tensortap.attach(there, sink) as tap:
        there(torch.ones(2, device=xla.device))
        tap.record("wide/forward/x", x.to(torch.complex128).to(xla.device))
    [gap] = sink.coverage["gaps"]
    assert gap["name"] == "wide/forward/x"
    assert "complex128" in gap["reason"]


def test_a_compiled_training_step_is_captured_as_on_the_cpu(xla):
    model, x = nn.Sequential(Block(8), Block(8)), torch.randn(4, 8)
    twin, there = xla.put(copy.deepcopy(model)), xla.put(x)

    def step(model, x):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def run():
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    expected = captured(model, step(model, x))
    compiled = xla.torch_xla.compile(step(twin, there), full_graph=True)
    costs = []
    found = captured(twin, lambda: costs.append(xla.cost(compiled)))
    assert_same_run(expected, found)
    assert [(cost.executions, cost.transfers) for cost in costs] == [(1, 1), (1, 1)]


def small_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_a_hugging_face_model_is_captured_under_its_names(xla):
    model = small_llama()
    tokens = torch.randint(0, 32, (2, 5))
    twin, there = xla.put(copy.deepcopy(model)), xla.put(tokens)

    def step(model, tokens):
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        xla.sync()

    expected = captured(model, lambda: step(model, tokens))
    found = captured(twin, lambda: step(twin, there))
    assert "layers.0.attn.q/backward/grad_output" in found.names()
    assert_same_run(expected, found)


def test_generating_gives_the_same_tokens_and_the_records_of_the_cpu(xla):
    model = small_llama()
    tokens = torch.randint(0, 32, (1, 4))
    twin, there = xla.put(copy.deepcopy(model)), xla.put(tokens)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    plain = twin.generate(there, **options).cpu()
    expected, found = tensortap.MemorySink(), tensortap.MemorySink()
    tap = {"values": "full", "select": "layers.0.mlp.down/forward/*"}
    with tensortap.attach(model, expected, **tap):
        model.generate(tokens, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tensortap.CaptureWarning)  # generate() reads values.
        with tensortap.attach(twin, found, **tap):
            tapped = twin.generate(there, **options).cpu()
    assert torch.equal(tapped, plain)
    name = "layers.0.mlp.down/forward/output"
    assert [record.at.microbatch for record, _ in found.find(name)] == [0, 1, 2]
    for (_, value), (_, fetched) in zip(expected.find(name), found.find(name), strict=True):
        assert torch.allclose(fetched, value, atol=1e-5)


def test_a_sample_and_a_tensor_recorded_by_hand(xla):
    model, x = xla.put(nn.Linear(8, 8)), torch.randn(200, 100)
    sink = tensortap.MemorySink()
    with torch.no_grad(), tensortap.attach(model, sink, values="sample", on_error="raise") as tap:
        tap.record("mine/forward/x", x.to(xla.device))
        model(x[:, :8].to(xla.device))
    [(record, value)] = sink.find("mine/forward/x")
    assert record.values == "sample"
    assert torch.equal(value, x.flatten()[:: record.stride])
    assert_same_statistics(statistics(x), record.stats, 1e-6)
