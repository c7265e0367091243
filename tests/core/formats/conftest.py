"""Every test of a format runs twice: with the compiled kernel and with torch operations alone."""

from __future__ import annotations

import pytest

from tensortap import native


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two rounds float32 and bfloat16 on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(str(native.status()))
    return str(request.param)
