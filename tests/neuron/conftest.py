"""Fixtures of the tests on lazy devices."""

from __future__ import annotations

import pytest
from tests.neuron.lazy import Xla


@pytest.fixture(scope="session")
def xla() -> Xla:
    return Xla()
