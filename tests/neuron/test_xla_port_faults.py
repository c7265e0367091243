"""The same faults in a port that runs lazily on XLA."""

from __future__ import annotations

import pytest
import torch
from tests.neuron.port_faults import PortFaults

pytestmark = pytest.mark.xla


class TestPortFaultsOnXla(PortFaults):
    @pytest.fixture(scope="class")
    @classmethod
    def device(cls, xla) -> torch.device:
        return xla.device
