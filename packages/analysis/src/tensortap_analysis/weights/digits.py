"""Numbers with the digits that it takes to see on which side of a limit they are."""

from __future__ import annotations

_MOST = 6


def below(value: float, limit: float) -> str:
    """`29.976` beside 30 is `29.98`, and not 30.0; else one digit is enough."""
    digits = next((n for n in range(1, _MOST) if round(value, n) < limit), _MOST)
    return f"{value:.{digits}f}"
