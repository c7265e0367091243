"""What the tests of the analysis package's commands share."""

from __future__ import annotations

import pytest

from tensortap_analysis.plots.style import LOOK


@pytest.fixture
def coarse(monkeypatch):
    """Pictures of fewer pixels: most of the time goes into drawing them."""
    monkeypatch.setitem(LOOK, "figure.dpi", 50)
