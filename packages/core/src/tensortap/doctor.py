"""`examine`: is everything here that tensortap needs, and is it what it seems?"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch

from tensortap import native
from tensortap.config import Settings
from tensortap.errors import TensortapError
from tensortap.plugins import GROUPS, load_plugin

_LIBRARIES = ("torch", "numpy", "safetensors", "xxhash", "typer", "rich")
_FRAMEWORKS = ("transformers", "megatron-core", "torch-xla")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    what: str
    found: str
    fine: bool = True

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def examine() -> list[Finding]:
    """All findings; none of them changes anything."""
    return [
        Finding("tensortap", f"{version('tensortap')}, Python {platform.python_version()}"),
        *(_library(name) for name in _LIBRARIES),
        *(_framework(name) for name in _FRAMEWORKS),
        Finding("devices", _devices()),
        Finding("compiled kernel", str(native.status())),
        *_plugins(),
        *_environment(),
    ]


def _library(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, f"not installed; pip install {name}", fine=False)


def _framework(name: str) -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        return Finding(name, "not installed (optional)")


def _devices() -> str:
    if not torch.cuda.is_available():
        return f"cpu ({torch.get_num_threads()} threads)"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"cpu ({torch.get_num_threads()} threads), {', '.join(names)}"


def _plugins() -> list[Finding]:
    findings = []
    for group in GROUPS:
        for entry in entry_points(group=group):
            what = f"{group}: {entry.name}"
            try:
                load_plugin(entry)
            except TensortapError as error:
                findings.append(Finding(what, str(error), fine=False))
            else:
                dist = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
                findings.append(Finding(what, dist))
    return findings


def _environment() -> list[Finding]:
    used = {k: v for k, v in os.environ.items() if k.startswith(("TENSORTAP_", "TENSOR_SAVE_"))}
    try:
        Settings.resolve({})
    except TensortapError as error:
        return [Finding("environment", str(error), fine=False)]
    shown = ", ".join(f"{key}={value}" for key, value in sorted(used.items()))
    return [Finding("environment", shown or "no TENSORTAP_ variables set")]
