"""What every test starts from: no network, no settings from outside, a fixed seed."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# No test may reach a model hub, by accident or otherwise; read when transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# A slow machine is no failure: the deadline would make tests depend on what else is running.
settings.register_profile("tensortap", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tensortap")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each use every core only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _from_a_clean_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith(("TENSORTAP_", "TENSOR_SAVE_", "CUSTOM_QUANT_")):
            monkeypatch.delenv(variable)
    torch.manual_seed(0)
