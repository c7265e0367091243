"""Models on NxD's layers under ordinary `attach`: named, placed, and joined over four ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.neuron.traced import fake_nxd
from tests.neuron.traced.fake_llama import FakeNeuronLlama, huggingface
from torch import nn

import tensortap
from tensortap.testing import IntegrationContract
from tensortap_neuron.traced.integration import Nxd

SCRIPT = Path(__file__).with_name("spread.py")
NEURON = SimpleNamespace(
    sequence_parallel_enabled=False,
    qkv_kernel_fuse_residual_add=False,
    on_device_sampling_config=object(),
)


def fake_model():
    theirs = huggingface()
    return FakeNeuronLlama(theirs.config, NEURON).load(theirs)


class Flat(nn.Module):
    """The contract calls a model with one tensor."""

    def __init__(self):
        super().__init__()
        self.model = fake_model()

    def forward(self, ids):
        return self.model(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None])


@pytest.fixture(autouse=True)
def nxd(monkeypatch):
    fake_nxd.install(monkeypatch)


class TestContract(IntegrationContract):
    @pytest.fixture
    def integration(self):
        return Nxd()

    @pytest.fixture
    def model(self):
        return Flat()

    @pytest.fixture
    def batch(self):
        return {"ids": torch.tensor([[3, 1, 4, 1]])}


def test_attach_finds_it_through_its_entry_point():
    sink = tensortap.MemorySink()
    with tensortap.attach(fake_model(), sink, select="layers.1.attn.q/forward/output") as tap:
        ids = torch.tensor([[3, 1, 4]])
        tap._session.roots[0](ids, torch.ones_like(ids), torch.arange(3)[None])
    assert sink.names() == ["layers.1.attn.q/forward/output"]
    assert sink.run.settings["integration"] == ["nxd"]
    assert sink.run.versions["neuronx-distributed"] == "0.16.fake"
    assert sink.run.model_config["num_hidden_layers"] == 3


def test_a_model_inside_of_an_application_has_the_names_of_the_model():
    app = nn.ModuleDict({"context_encoding_model": nn.ModuleDict({"model": fake_model()})})
    names = {site.name for site in Nxd().sites(app)}
    assert {"embed", "layers.2.mlp.down", "final_norm", "lm_head"} <= names
    assert "context_encoding_model" in names


class Adapter(nn.Module):
    """HuggingFaceGenerationAdapter around an application: each token is a forward."""

    def __init__(self):
        super().__init__()
        self.neuron_model = Flat()

    @torch.no_grad()
    def generate(self, ids, tokens):
        for _ in range(tokens):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], 1)
        return ids

    def forward(self, ids):
        return self.neuron_model(ids)


def test_generating_on_the_cpu_is_a_step_with_a_microbatch_for_each_token():
    sink, adapter = tensortap.MemorySink(), Adapter()
    with tensortap.attach(adapter, sink, select="layers.1/forward/output"):
        adapter.generate(torch.tensor([[3, 1]]), 3)
        adapter.generate(torch.tensor([[4]]), 1)
    moments = [(record.at.step, record.at.microbatch) for record in sink.records]
    assert moments == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert "generate" not in vars(adapter)


def test_a_model_without_parallel_layers_is_refused_with_a_sentence():
    assert "no parallel layer" in Nxd().refuse(nn.Linear(2, 2))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four processes, forked from one that has torch; Hugging Face's model beside them."""
    folder = tmp_path_factory.mktemp("spread")
    environ = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), "4"]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def apart(whole, pieces):
    """Names whose values differ by more than rounding, and those that cannot be put together."""
    differing, unplaced = [], set()
    for name in sorted(set(whole.names()) & set(pieces.names())):
        try:
            joined = pieces.tensor(name, padded=False)
        except tensortap.RunError:
            unplaced.add(name)
            continue
        if not torch.allclose(joined, whole.tensor(name), rtol=1e-5, atol=1e-6):
            differing.append(name)
    return differing, unplaced


def test_the_pieces_of_four_ranks_are_the_whole_tensors_of_hugging_face(runs):
    """Activations and parameters; two key heads replicated to four ranks; padded widths."""
    whole, pieces = (tensortap.open_run(runs / word) for word in ("whole", "pieces"))
    assert apart(whole, pieces) == ([], set())
    assert set(whole.names()) - set(pieces.names()) == {"model/forward/input"}
    assert len(pieces.names()) > 110
    cut = {str(r.name): r.shape for r in pieces.records(select="layers.0.mlp.gate/*")}
    assert cut["layers.0.mlp.gate/forward/output"] == (1, 8, 13)  # 50 padded to 52, over 4.


def test_a_sequence_split_over_ranks_is_joined_too(runs):
    whole, pieces = (tensortap.open_run(runs / word) for word in ("whole", "split"))
    differing, unplaced = apart(whole, pieces)
    assert differing == []
    assert unplaced == {f"layers.{n}.{m}/forward/input" for n in range(3) for m in ("attn", "mlp")}
    split = {str(r.name): r.shape for r in pieces.records(select="layers.1/forward/output")}
    assert split["layers.1/forward/output"] == (1, 2, 32)
