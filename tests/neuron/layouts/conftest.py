"""Fixtures of the tests of layouts."""

from __future__ import annotations

import pytest
from tests.neuron.layouts.commands import Command


@pytest.fixture
def tt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`tensortap …`"""
    return Command(capsys, monkeypatch)
