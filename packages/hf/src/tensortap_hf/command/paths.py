"""Mistakes with paths that are told before any model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from tensortap.errors import ConfigError


def require_folder(path: Path, option: str) -> None:
    """Raise `ConfigError` unless `path` is a folder that can be written to, or can become one."""
    nearest = path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"{option}: {nearest} is not a folder.")
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"{option}: {nearest} cannot be written to.")


def require_file(path: Path | None, option: str) -> None:
    """Raise `ConfigError` unless `path` is a file, or not given."""
    if path is not None and not path.is_file():
        raise ConfigError(f"{option}: there is no file {path}.")
