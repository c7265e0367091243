"""Plugins: entry points of other packages, loaded once their version fits the core's."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from typing import Any

import tensortap
from tensortap.errors import PluginError

INTEGRATIONS = "tensortap.integrations"
BACKENDS = "tensortap.backends"
LAYOUTS = "tensortap.layouts"
COMMANDS = "tensortap.commands"
GROUPS = (INTEGRATIONS, BACKENDS, LAYOUTS, COMMANDS)
"""Every group of entry points that the core asks for."""


def load_plugin(entry: EntryPoint) -> Any:
    """Load an entry point; a broken plugin is an error, never treated as an absent one."""
    where = f"{entry.value} (entry point {entry.group}: {entry.name})"
    _check_version(entry, where)
    try:
        return entry.load()
    except Exception as error:
        raise PluginError(
            f"The plugin {where} fails to load: {type(error).__name__}: {error}. "
            "Repair or uninstall it."
        ) from error


def _check_version(entry: EntryPoint, where: str) -> None:
    if entry.dist is None or not entry.dist.name.startswith("tensortap-"):
        return
    core, plugin = tensortap.__version__, entry.dist.version
    if release(core) != release(plugin):
        raise PluginError(
            f"The plugin {where} has version {plugin}, the core {core}; "
            f'install both together: pip install -U "tensortap[all]=={core}".'
        )


def release(version: str) -> tuple[int, ...]:
    """`"5.23.0.dev0"` -> `(5, 23)`: patches, candidates and development count as their release."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
