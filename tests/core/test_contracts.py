"""The contract classes, on what the core ships."""

from __future__ import annotations

import pytest
import torch
from tests.core.models import Stack

from tensortap import MemorySink, RunDirectorySink, TeeSink
from tensortap.backends import for_device
from tensortap.discovery import NativeIntegration
from tensortap.testing import BackendContract, IntegrationContract, SinkContract


class TestMemorySink(SinkContract):
    @pytest.fixture
    def make_sink(self):
        return MemorySink


class TestRunDirectorySink(SinkContract):
    @pytest.fixture
    def make_sink(self, tmp_path):
        return lambda: RunDirectorySink(tmp_path / "run")


class TestTeeSink(SinkContract):
    @pytest.fixture
    def make_sink(self, tmp_path):
        return lambda: TeeSink(MemorySink(), RunDirectorySink(tmp_path / "run"))

    def test_all_sinks_are_closed_even_when_one_fails(self):
        class Stubborn(MemorySink):
            def close(self):
                raise OSError("stuck")

        last = MemorySink()
        with pytest.raises(OSError, match="stuck"):
            TeeSink(Stubborn(), last).close()
        assert last.closed
        with pytest.raises(RuntimeError, match="stuck; stuck"):
            TeeSink(Stubborn(), Stubborn()).close()


class TestNativeIntegration(IntegrationContract):
    @pytest.fixture
    def integration(self):
        return NativeIntegration()

    @pytest.fixture
    def model(self):
        return Stack().eval()

    @pytest.fixture
    def batch(self):
        return {"x": torch.randn(2, 8)}


class TestCpuBackend(BackendContract):
    @pytest.fixture
    def device(self):
        return torch.device("cpu")

    @pytest.fixture
    def backend(self, device):
        return for_device(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCudaBackend(BackendContract):
    @pytest.fixture
    def device(self):
        return torch.device("cuda")

    @pytest.fixture
    def backend(self, device):
        return for_device(device)
