"""Names of the files that pictures are written to; tensor names are data and never become paths."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_LONGEST = 120


def picture(folder: Path, name: str, more: str = "") -> Path:
    """`layers.0.attn.q/forward/input` -> `layers.0.attn.q__forward__input.png` in `folder`.

    A name with other characters than letters, digits, `.`, `_` and `-`, or a very long one, gets
    a digest, so that no two share a file.
    """
    text = name.replace("/", "__") + (f"__{more}" if more else "")
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip(".")[:_LONGEST]
    if safe != text:
        safe += "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return folder / f"{safe}.png"
