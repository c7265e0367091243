"""Where a process stands in its job: rank, world size, launch id."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch

from tensortap.errors import ConfigError

_LAUNCHER = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def rank_and_world() -> tuple[int, int]:
    """From `torch.distributed` where initialised, else the launcher's environment, else (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{variable}={text!r} is not a number; the launcher should set it.")
    return int(text)


def launch_id(world: int, environ: Mapping[str, str] = os.environ) -> str:
    """The same in every rank of one launch, another one after a restart; no collective needed.

    Ranks of one machine share their launcher process, whose start time tells launches apart;
    ranks of several machines have the launcher's variables only.
    """
    if world == 1:
        return uuid.uuid4().hex[:16]
    parts = [environ.get(variable, "") for variable in _LAUNCHER]
    if environ.get("LOCAL_WORLD_SIZE", str(world)) == str(world):
        parts.append(_parent())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _parent() -> str:
    """Parent process and when it started, where /proc tells."""
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        started = ""
    return f"{parent}/{started}"
