"""The integration as the core sees it: found, described, and true to its contract."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tensortap
from tensortap.testing import IntegrationContract
from tensortap_hf.integration import TESTED, integration

PYPROJECT = Path(__file__).parents[2] / "packages" / "hf" / "pyproject.toml"


class TestHuggingFace(IntegrationContract):
    @pytest.fixture(params=["llama", "gpt2", "mixtral", "bert", "mamba", "mamba2"])
    def model(self, request: pytest.FixtureRequest, build: Any) -> nn.Module:
        return build(request.param).eval()  # type: ignore[no-any-return]

    @pytest.fixture
    def integration(self) -> Any:
        return integration

    @pytest.fixture
    def batch(self, inputs: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": inputs()["input_ids"]}


def test_a_transformers_model_is_named_by_it_without_asking(build: Any, capture: Any) -> None:
    assert capture(build("llama"), backward=False).has("layers.0.attn.q/forward/output")


def test_another_model_keeps_native_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        model(torch.zeros(1, 2))
    assert "0/forward/output" in sink.names()


def test_asking_for_it_with_another_model_says_why_not() -> None:
    with pytest.raises(tensortap.NotSupported, match="holds no transformers PreTrainedModel"):
        tensortap.attach(nn.Linear(2, 2), tensortap.MemorySink(), using="hf")


def test_the_run_says_which_model_ran(build: Any, capture: Any) -> None:
    run = capture(build("llama", "eager"), backward=False).sink.run
    assert run.model_class.endswith("LlamaForCausalLM")
    assert run.versions["transformers"] == transformers.__version__
    assert run.model_config["num_hidden_layers"] == 2
    assert run.model_config["attn_implementation"] == "eager"


def test_what_is_described_can_be_written_as_json(any_family: str, build: Any) -> None:
    model = build(any_family).to(torch.bfloat16)
    described = integration.describe(model)
    assert json.loads(json.dumps(described))["model_config"]["model_type"] == (
        model.config.model_type
    )


def test_native_names_stay_on_the_records(build: Any, capture: Any) -> None:
    found = capture(build("gpt2"), backward=False)
    ((record, _),) = found.sink.find("layers.1.mlp.up/forward/output")
    assert record.native == "transformer.h.1.mlp.c_fc"


def test_named_axes_fit_the_tensors(any_family: str, build: Any, capture: Any) -> None:
    found = capture(build(any_family))
    assert any(record.dims for record in found.sink.records)
    for record in found.sink.records:
        if record.dims:
            axes = record.dims.replace("(head dim)", "heads").split()
            assert len(axes) == len(record.shape), f"{record.name}: {record.dims}"


def test_every_family_captures_both_directions_and_parameters(
    any_family: str, build: Any, capture: Any
) -> None:
    found = capture(build(any_family))
    report = found.sink.coverage
    assert report["gaps"] == []
    phases = {record.name.phase for record in found.sink.records}
    assert phases == {"forward", "backward", "param", "grad"}


def test_parameters_are_captured_under_the_names_of_their_modules(
    family: str, build: Any, capture: Any
) -> None:
    model = build(family)
    found = capture(model)
    for site in integration.sites(model):
        if site.kind == "module":
            for name, parameter in site.module.named_parameters(recurse=False):
                assert torch.equal(found(f"{site.name}/param/{name}"), parameter)


def test_the_range_of_versions_is_the_one_of_the_extra() -> None:
    oldest, newest = TESTED
    assert f'"transformers>={oldest},<{newest}"' in PYPROJECT.read_text()
    assert integration.refuse(nn.Linear(2, 2)) is not None


@pytest.mark.parametrize("version", ["5.20.0", "5.23.1.dev0", "5.24rc1", "6.0.0"])
def test_versions_of_every_spelling_are_understood(
    version: str, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    assert integration.refuse(model) is None


def test_a_newer_transformers_is_used_and_noted(
    build: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch, captured: Any
) -> None:
    model = build("llama")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "6.1.0")
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        model(**inputs())
    assert "6.1.0 is newer" in captured(sink).notes()["root"]
    assert "layers.0.attn.core/forward/query" in sink.names()
