"""Files that are written at the end of long work, and therefore checked at its beginning.

One rule for all commands: a file goes into a folder that exists, since a mistyped path must not
become a new folder; only a folder that is itself what a command writes (`plot --out`) is made.
"""

from __future__ import annotations

import os
from pathlib import Path

from tensortap.errors import ConfigError


def require_writable(out: Path, option: str = "--out") -> None:
    """Raise `ConfigError` where a file cannot be made, before anything is computed for it.

    The error names the `option` that gave it, if there is one.
    """
    said = f"{option} {out}".lstrip()
    if out.is_dir():
        raise ConfigError(f"{said} is a directory; name a file.")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{said}: there is no directory {out.parent}.")
    existed = out.exists()
    try:
        with open(out, "ab"):
            pass
    except OSError as failure:
        raise ConfigError(f"{said} cannot be written: {failure.strerror}.") from failure
    if not existed:
        os.unlink(out)
