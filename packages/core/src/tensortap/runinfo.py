"""`RunInfo`: everything a run says about itself before its first record."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

import tensortap
from tensortap.config import Settings
from tensortap.integration import Integration
from tensortap.launch import launch_id
from tensortap.records import RunInfo


def describe_run(
    settings: Settings,
    roots: Sequence[nn.Module],
    plugins: Sequence[Integration],
    place: tuple[int, int],
) -> RunInfo:
    """Collect versions, model, settings; an integration's description comes on top."""
    described: dict[str, Any] = {}
    for root, plugin in zip(roots, plugins, strict=True):
        described.update(plugin.describe(root))
    return RunInfo(
        launch_id=launch_id(place[1]),
        created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        rank=place[0],
        world_size=place[1],
        model_class=type(roots[0]).__name__,
        model_config=described.get("model_config", {}),
        mode=described.get("mode"),
        format=described.get("format"),
        parallel=described.get("parallel", {}),
        versions=_versions() | dict(described.get("versions", {})),
        settings=_settings(settings) | {"integration": [plugin.name for plugin in plugins]},
        metadata={**described.get("metadata", {}), **settings.metadata},
    )


_DEVICES = ("torch_xla", "torch_neuronx")
"""Modules that bring devices: their versions are noted where they are in use."""


def _versions() -> dict[str, str]:
    devices = {name: sys.modules[name] for name in _DEVICES if name in sys.modules}
    return {
        "tensortap": tensortap.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform}-{platform.machine()}",
        **{name: str(getattr(found, "__version__", "?")) for name, found in devices.items()},
    }


def _settings(settings: Settings) -> dict[str, Any]:
    return {
        "select": settings.select.text,
        "values": [[rule.text, values] for rule, values in settings.values.rules],
        "phases": list(settings.phases),
        "steps": settings.steps.text,
        "ranks": settings.ranks.text,
        "exponents": settings.exponents,
        "max_pending": settings.max_pending,
        "max_bytes": settings.max_bytes,
    }
