"""Which releases of megatron-core are served, and what differs between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.megatron import quantize_layers as built

import tensortap
from tensortap import MemorySink
from tensortap.errors import NotSupported
from tensortap_megatron import parallel

megatron = pytest.importorskip("megatron.core")
pytestmark = pytest.mark.xdist_group("megatron-versions")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


def coverage(model: Any) -> list[str]:
    sink = MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        model(**built.batch()).sum().backward()
    assert sink.coverage is not None
    return [note["reason"] for note in sink.coverage["notes"]]


@pytest.mark.parametrize("version", ["0.13.1", "0.9.0", "0.13.0rc3"])
def test_an_older_release_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(megatron, "__version__", version)
    sentence = rf"megatron-core {version} found; 0\.14 to 0\.16 are supported\. Update it"
    with pytest.raises(NotSupported, match=sentence):
        tensortap.attach(built.gpt(num_layers=1), MemorySink(), using="megatron")


@pytest.mark.parametrize("version", ["0.17.0", "1.0", "0.17.0rc0"])
def test_a_newer_release_is_served_with_a_note(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(megatron, "__version__", version)
    assert f"megatron-core {version} is newer than was tested" in coverage(built.gpt(num_layers=1))


@pytest.mark.parametrize("version", ["0.14.0", "0.15.3", "0.16.1", "0.16.0rc0"])
def test_a_tested_release_is_served_without_one(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(megatron, "__version__", version)
    assert not [reason for reason in coverage(built.gpt(num_layers=1)) if "newer" in reason]


@pytest.mark.parametrize("word", ["pg_collection", "model_comm_pgs"])
def test_a_model_is_placed_by_the_groups_it_was_built_with(word: str) -> None:
    """0.14 calls the collection `model_comm_pgs`; what the model lacks is Megatron's global one."""
    model = built.gpt(num_layers=1)
    everything = parallel.parallel_of(model)
    for module in model.modules():
        for name in ("pg_collection", "model_comm_pgs"):
            vars(module).pop(name, None)
    assert parallel.parallel_of(model) == everything

    class Own:
        tp = torch.distributed.new_group([0])

    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_global", lambda name: asked.append(name))
        setattr(model, word, Own())
        assert dict(parallel.parallel_of(model).groups) == {"tp": parallel.Group()}
    assert "tp" not in asked
    assert "cp" in asked
