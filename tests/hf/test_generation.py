"""`generate` of a tapped model: one step, the same tokens, nothing left behind."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch

import tensortap

PROMPT = torch.tensor([[5, 6, 7], [8, 9, 10]])
DECODERS = ("llama", "gpt2", "opt", "mixtral", "mamba", "mamba2")


def generate(model: Any, tokens: int = 4) -> torch.Tensor:
    made: torch.Tensor = model.generate(PROMPT, max_new_tokens=tokens, min_new_tokens=tokens)
    return made


@pytest.mark.parametrize("decoder", DECODERS)
def test_each_generate_is_one_step_and_each_token_a_microbatch(decoder: str, build: Any) -> None:
    model = build(decoder).eval()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        generate(model)
        generate(model, tokens=2)
    at = [record.at for record, _ in sink.find("layers.0/forward/output")]
    assert [(a.step, a.microbatch) for a in at] == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1),
    ]  # fmt: skip
    assert sink.steps == [0, 1]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_tapped_model_generates_the_same_tokens(decoder: str, build: Any) -> None:
    model = build(decoder).eval()
    plain = generate(model)
    with tensortap.attach(model, tensortap.MemorySink(), values="full", on_error="raise"):
        assert torch.equal(generate(model), plain)


def test_sampling_draws_the_same_random_numbers(build: Any) -> None:
    model = build("llama").eval()

    def sample() -> torch.Tensor:
        torch.manual_seed(3)
        made: torch.Tensor = model.generate(PROMPT, max_new_tokens=6, do_sample=True)
        return made

    plain = sample()
    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        assert torch.equal(sample(), plain)


def test_key_and_value_grow_with_the_cache(build: Any, captured: Any) -> None:
    model = build("llama", "eager").eval()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        generate(model)
    found = captured(sink)
    name = "layers.0.attn.core/forward"
    assert [found(f"{name}/query", i).shape[2] for i in range(4)] == [3, 1, 1, 1]
    assert [found(f"{name}/key", i).shape[2] for i in range(4)] == [3, 4, 5, 6]
    assert torch.equal(found(f"{name}/key", 3)[:, :, :3], found(f"{name}/key", 0))
    assert found(f"{name}/probs", 3).shape == (2, 4, 1, 6)


def test_beams_are_one_step_as_well(build: Any) -> None:
    model = build("llama").eval()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        model.generate(PROMPT, max_new_tokens=3, num_beams=2)
    assert sink.steps == [0]


def test_a_generate_that_fails_ends_its_step(build: Any) -> None:
    model = build("llama").eval()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        with pytest.raises(IndexError):
            model.generate(torch.tensor([[5, 99]]), max_new_tokens=2)  # No such token.
        generate(model, tokens=1)
    assert [record.at.step for record, _ in sink.find("lm_head/forward/output")] == [1]


def test_generate_during_training_is_evaluation_inside_the_step(build: Any, inputs: Any) -> None:
    model = build("llama").train()
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        model(**inputs()).loss.backward()
        generate(model, tokens=2)
    at = [record.at for record, _ in sink.find("layers.0/forward/output")]
    assert [(a.step, a.eval) for a in at] == [(0, False), (0, True), (0, True)]


def test_generate_is_documented_as_before_and_gone_after_detach(build: Any) -> None:
    model = build("llama")
    signature = inspect.signature(model.generate)
    tap = tensortap.attach(model, tensortap.MemorySink(), on_error="raise")
    assert inspect.signature(model.generate) == signature
    assert model.generate.__doc__ == type(model).generate.__doc__
    generate(model, tokens=1)
    tap.detach()
    assert "generate" not in vars(model)


def deep_copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("again", [deep_copied, pickled])
@pytest.mark.parametrize("decoder", ["llama", "mamba"])
def test_a_copy_generates_by_itself_and_is_not_tapped(again: Any, decoder: str, build: Any) -> None:
    model = build(decoder).eval()
    plain = generate(model)
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        twin = again(model)
        assert twin.generate.__self__ is twin
        assert torch.equal(generate(twin), plain)
        generate(model, tokens=1)
    assert len(sink.find("layers.0/forward/output")) == 1
    assert torch.equal(generate(twin), plain)


def test_a_foreign_generate_on_the_instance_is_put_back(build: Any) -> None:
    model = build("llama").eval()

    def shout(*args: Any, **kwargs: Any) -> torch.Tensor:
        return type(model).generate(model, *args, **kwargs)  # type: ignore[no-any-return]

    model.generate = shout
    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        generate(model, tokens=1)
    assert model.generate is shout
