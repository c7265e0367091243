"""Starting `spread.py` over several processes, each set of options once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("spread.py")


class Launches:
    """Runs of `spread.py` by their options."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._done: dict[str, Path] = {}

    def __call__(self, processes: int, *, fails: bool = False, **options: Any) -> Path:
        """The folder that one step over some processes wrote to."""
        key = json.dumps([processes, options], sort_keys=True)
        if key not in self._done:
            self._done[key] = self._run(processes, options, fails)
        return self._done[key]

    def _run(self, processes: int, options: dict[str, Any], fails: bool) -> Path:
        out = self._folders.mktemp("spread")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        script = [str(processes), str(SCRIPT), str(out), json.dumps(options)]
        result = subprocess.run(
            [sys.executable, "-W", "ignore", *launcher, *script],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert (result.returncode != 0) == fails, result.stderr[-4000:]
        return out
