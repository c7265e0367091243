"""The example on torch_xla."""

from __future__ import annotations

import pytest
from tests.neuron.command.example import run_example

pytestmark = pytest.mark.xla


def test_the_example_finds_a_port_right_and_a_broken_one_broken(tmp_path):
    printed = run_example(tmp_path)
    assert printed.splitlines()[-1].startswith(
        "the port agrees; the broken port (on xla) is found out, in the right layer."
    )
