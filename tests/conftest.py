"""What every test starts from: no network, no settings from outside, a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Callable

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


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run `tensortap ARGS`; returns (exit code, stdout, stderr)."""
    from tensortap.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tensortap", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return int(stopped.value.code or 0), printed.out, printed.err

    return run
