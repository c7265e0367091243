"""The example where torch_xla is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from tests.neuron.command.example import run_example


@pytest.mark.skipif(find_spec("torch_xla") is not None, reason="torch_xla is installed")
def test_without_torch_xla_the_example_says_what_it_leaves_out(tmp_path):
    printed = run_example(tmp_path)
    assert "the port on XLA was LEFT OUT" in printed
    assert "the broken port (on cpu) is found out" in printed
