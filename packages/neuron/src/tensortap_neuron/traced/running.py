"""What the run of a compiled model says about itself."""

from __future__ import annotations

import platform
import sys
from datetime import datetime, timezone

import torch

import tensortap
from tensortap.config import Settings
from tensortap.launch import launch_id
from tensortap.records import RunInfo
from tensortap_neuron.traced.capture import Capture

_PACKAGES = (
    "neuronx_distributed_inference",
    "neuronx_distributed",
    "torch_neuronx",
    "torch_xla",
    "transformers",
)


def describe_traced(capture: Capture, settings: Settings) -> RunInfo:
    """One process holds what rank 0 of the compiled model returned: the run has a single rank."""
    facts = capture.facts
    return RunInfo(
        launch_id=launch_id(1),
        created=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        model_class=facts.model_class or facts.model_type or "traced",
        model_config={"model_type": facts.model_type, "num_hidden_layers": facts.layers},
        parallel={"tp": facts.tp, "tp_rank": 0, "tp_first": 0},
        versions=_versions(),
        settings={
            "select": settings.select.text if settings.explicit else capture.select,
            "values": [[rule.text, values] for rule, values in settings.values.rules],
            "steps": settings.steps.text,
            "integration": ["nxd-traced"],
        },
        metadata={
            "traced": {**capture.nxdi_options(), "facts": facts.to_json()},
            **settings.metadata,
        },
    )


def _versions() -> dict[str, str]:
    loaded = {name: sys.modules[name] for name in _PACKAGES if name in sys.modules}
    return {
        "tensortap": tensortap.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: str(getattr(module, "__version__", "?")) for name, module in loaded.items()},
    }
