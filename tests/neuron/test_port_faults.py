"""Faults in a port that runs on the CPU: eager attention instead of the reference's."""

from __future__ import annotations

import pytest
import torch
from tests.neuron.port_faults import PortFaults


class TestPortFaultsOnTheCpu(PortFaults):
    @pytest.fixture(scope="class")
    @classmethod
    def device(cls) -> torch.device:
        return torch.device("cpu")
