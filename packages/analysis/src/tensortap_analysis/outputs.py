"""Files that are written at the end of long work, and therefore checked at its beginning."""

from __future__ import annotations

import os
from pathlib import Path

from tensortap.errors import ConfigError


def require_writable(out: Path) -> None:
    """Raise `ConfigError` where a file cannot be made, before anything is computed for it."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; name a file.")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no directory {out.parent}.")
    existed = out.exists()
    try:
        with open(out, "ab"):
            pass
    except OSError as failure:
        raise ConfigError(f"--out {out} cannot be written: {failure.strerror}.") from failure
    if not existed:
        os.unlink(out)
