"""Compiling, loading and generating: the run of a traced model beside that of Hugging Face."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.neuron.traced import fake_nxdi
from tests.neuron.traced.fake_llama import huggingface

import tensortap
from tensortap.errors import ConfigError, NotSupported
from tensortap_analysis import compare
from tensortap_neuron import traced
from tensortap_neuron.traced.capture import FILE

SHORT = torch.tensor([[3, 1, 4, 1, 5]])
LONG = torch.tensor([[2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])
EVERYTHING = "*/forward/output,*/forward/input"


@pytest.fixture
def model():
    return huggingface()


@pytest.fixture
def kind(monkeypatch, model, tmp_path):
    model.config.save_pretrained(tmp_path / "model")
    return fake_nxdi.install(monkeypatch, model)


def generate(model, run, prompts, tokens=3, select=traced.EVERY_LAYER):
    """Hugging Face's own run: each `generate` is a step, its forwards are microbatches."""
    with tensortap.attach(model, run, select=select, values="full"):
        return [
            model.generate(
                ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
            )
            for ids in prompts
        ]


def moments(run):
    return {(str(r.name), r.at.step, r.at.microbatch) for r in run.records()}


def test_two_prompts_in_two_buckets_align_name_by_name_with_hugging_face(kind, model, tmp_path):
    prompts = [SHORT, LONG]
    wanted = generate(model, tmp_path / "hf", prompts)
    started = traced.application(tmp_path / "model", tmp_path / "compiled")
    with started.capture.hook(tmp_path / "neuron") as hook:
        found = [started.generate(ids, hook, max_new_tokens=3) for ids in prompts]
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    theirs, ours = (tensortap.open_run(tmp_path / run) for run in ("hf", "neuron"))
    assert moments(ours) == moments(theirs)
    assert len(moments(ours)) == 6 * 2 * 3
    for name, step, microbatch in moments(ours):
        one, two = (run.tensor(name, step=step, microbatch=microbatch) for run in (theirs, ours))
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    assert ours.coverage()["complete"]
    assert compare(tmp_path / "hf", tmp_path / "neuron").verdict == "agree"


def test_modules_inside_of_layers_and_their_inputs_align_too(kind, model, tmp_path):
    select = "layers.*.mlp/forward/*,layers.*.attn/forward/input,embed/forward/input"
    select += ",layers.*.attn.out/forward/output"
    generate(model, tmp_path / "hf", [SHORT], 2, select=select)
    started = traced.application(tmp_path / "model", tmp_path / "compiled", select=select)
    with started.capture.hook(tmp_path / "neuron") as hook:
        started.generate(SHORT, hook, max_new_tokens=2)
    theirs, ours = (tensortap.open_run(tmp_path / run) for run in ("hf", "neuron"))
    assert set(ours.names()) == {
        "embed/forward/input",
        *(
            f"layers.{n}.{tensor}"
            for n in range(3)
            for tensor in ("attn/forward/input", "attn.out/forward/output",
                           "mlp/forward/input", "mlp/forward/output")
        ),
    }  # fmt: skip
    assert ours.coverage()["complete"]
    for name in ours.names():
        for microbatch in range(2):
            one, two = (run.tensor(name, microbatch=microbatch) for run in (theirs, ours))
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_the_prompt_and_not_of_its_padding(kind, tmp_path):
    started = traced.application(tmp_path / "model", tmp_path / "compiled")
    sink = tensortap.MemorySink()
    with started.capture.hook(sink) as hook:
        started.generate(SHORT, hook)
    record, payload = sink.find("layers.1/forward/output")[0]
    assert record.shape == (1, 5, 32)
    assert record.stats.count == 5 * 32
    assert record.placement.valid == {1: 5}
    assert record.native == "layers.1 (cte, bucket 8)"
    assert record.stats.mean == pytest.approx(payload.double().mean().item(), rel=1e-9)
    assert sink.coverage["forwards"] == [
        {"step": 0, "microbatch": 0, "kind": "cte", "bucket": 8, "lengths": [5]}
    ]


def test_a_compiled_model_is_loaded_again_with_the_capture_it_was_compiled_with(kind, tmp_path):
    first = traced.application(tmp_path / "model", tmp_path / "compiled")
    again = traced.application(tmp_path / "model", tmp_path / "compiled", skip_compile=True)
    assert kind.compiled == [str(tmp_path / "compiled")]
    assert again.capture == first.capture == traced.Capture.load(tmp_path / "compiled")


def test_another_selection_than_was_compiled_is_refused_before_anything_is_loaded(kind, tmp_path):
    traced.application(tmp_path / "model", tmp_path / "compiled")
    with pytest.raises(
        ConfigError, match=r"also has layers\.0, layers\.1, layers\.2, norm and 1 more"
    ):
        traced.application(
            tmp_path / "model", tmp_path / "compiled", skip_compile=True, select="embed"
        )
    with pytest.raises(ConfigError, match="Compile it again, without skip_compile"):
        traced.application(tmp_path / "model", tmp_path / "empty", skip_compile=True)


def test_a_compilation_that_breaks_off_leaves_no_configuration(kind, tmp_path, monkeypatch):
    traced.application(tmp_path / "model", tmp_path / "compiled")

    def breaks(self, folder):
        assert not (Path(folder) / FILE).exists()
        raise RuntimeError("neuronx-cc ended with 70")

    monkeypatch.setattr(kind, "compile", breaks)
    with pytest.raises(RuntimeError, match="neuronx-cc"):
        traced.application(tmp_path / "model", tmp_path / "compiled")
    assert not (tmp_path / "compiled" / FILE).exists()


def test_a_module_the_model_has_not_is_nxds_error_before_compiling(kind, tmp_path):
    """What NxDI's model has beyond its configuration is known to NxD alone."""
    capture = traced.prepare(tmp_path / "model", "layers.0.gone", modules=["layers.0.gone"])
    neuron = fake_nxdi.NeuronConfig(
        on_device_sampling_config=object(), tensor_capture_config=capture.tensor_capture_config()
    )
    config = fake_nxdi.LlamaInferenceConfig(
        neuron, fake_nxdi.load_pretrained_config(str(tmp_path / "model"))
    )
    with pytest.raises(ValueError, match=r"not found in the model: \['layers\.0\.gone'\]"):
        kind("", config).compile(str(tmp_path / "compiled"))


def test_a_model_type_nxdi_has_not_is_named_with_those_it_has(kind, tmp_path):
    (tmp_path / "model" / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(NotSupported, match="no language model of type 'lama'; it has 'llama'"):
        traced.application(tmp_path / "model", tmp_path / "compiled")


def test_without_nxdi_the_error_says_where_to_get_it(tmp_path):
    huggingface().config.save_pretrained(tmp_path)
    with pytest.raises(NotSupported, match="neuronx-distributed-inference --extra-index-url"):
        traced.application(tmp_path, tmp_path / "compiled")


def test_pypis_stub_that_raises_on_import_counts_as_absent(monkeypatch, tmp_path):
    class Stub(ModuleType):
        def __getattr__(self, word):
            raise RuntimeError("this is a placeholder; see the Neuron repository")

    monkeypatch.setitem(
        sys.modules, "neuronx_distributed_inference.utils.constants", Stub("constants")
    )
    huggingface().config.save_pretrained(tmp_path)
    with pytest.raises(NotSupported, match="placeholder"):
        traced.application(tmp_path, tmp_path / "compiled")
