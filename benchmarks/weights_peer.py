"""weightwatcher on a folder of safetensors; prints seconds, layers and peak MiB. See weights.py.

Runs in the peers' environment and imports nothing of tensortap. weightwatcher fits a power law to
each spectrum, which is a part of its time.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors import safe_open


def model_of(folder: Path) -> torch.nn.Module:
    """A module of linear layers with the matrices of the folder, which it keeps in memory."""
    layers = torch.nn.ModuleDict()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                weight = file.get_tensor(name)
                if weight.ndim == 2:
                    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], False, "meta")
                    layer.weight = torch.nn.Parameter(weight)
                    layers[name.replace(".", "_")] = layer
    return layers


def main() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    import weightwatcher

    start, busy = time.perf_counter(), time.process_time()
    watcher = weightwatcher.WeightWatcher(model=model_of(Path(sys.argv[1])))
    found = watcher.analyze(max_N=1 << 20)
    spent, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    known = {"version": weightwatcher.__version__, "layers": len(found)}
    print(json.dumps({**known, "seconds": spent, "cpu_seconds": busy, "peak_mib": peak}))


if __name__ == "__main__":
    main()
