"""Faults in a port, each named by the three-way comparison; run on the CPU and on XLA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.neuron.ports import DEPTH, Fault, Trusted, capture, in_bf16, perturbed, poisoned, port

BF16, FP32 = torch.bfloat16, torch.float32
FAULTS: list[tuple[str, torch.dtype, Fault]] = [
    ("one weight off by 4 in a port in bf16", BF16, perturbed(4.0)),
    ("one weight off by a thousandth in a port in fp32", FP32, perturbed(1e-3)),
    ("one layer in bf16 in a port in fp32", FP32, in_bf16),
    ("a NaN in a port in bf16", BF16, poisoned),
    ("a NaN in a port in fp32", FP32, poisoned),
]


class PortFaults:
    """Subclass it with a fixture `device`."""

    @pytest.fixture(scope="class")
    @classmethod
    def trusted(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Trusted]:
        return {
            dtype: Trusted.made(dtype, tmp_path_factory.mktemp("trusted")) for dtype in (BF16, FP32)
        }

    @pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
    def test_a_port_without_fault_agrees(self, device, trusted, dtype, tmp_path: Path):
        run = capture(port(device, dtype, 0, None), tmp_path / "port")
        found = trusted[dtype].judge(run)
        assert found.verdict == "agree"
        assert len(found.pairs) == DEPTH + 2
        assert not found.unpaired
        assert any(pair.error > 0 for pair in found.pairs), "a port rounds in another order"
        assert not any("the same in every tensor" in warning for warning in found.warnings)

    @pytest.mark.parametrize("layer", [0, DEPTH // 2, DEPTH - 1])
    @pytest.mark.parametrize(
        ("dtype", "fault"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS]
    )
    def test_a_fault_is_the_first_divergence_and_local(
        self, device, trusted, dtype, fault, layer, tmp_path: Path
    ):
        run = capture(port(device, dtype, layer, fault), tmp_path / "port")
        found = trusted[dtype].judge(run)
        broken = f"layers.{layer}/forward/output"
        assert found.verdict == "differ"
        assert found.first_divergence is not None
        assert (found.first_divergence.name, found.first_divergence.origin) == (broken, "local")
        assert [one.name for one in found.local] == [broken], "what follows has inherited it"
