"""Everything imported from neuronx-distributed-inference, by name and only where it is there."""

from __future__ import annotations

import importlib
from typing import Any

from tensortap.errors import NotSupported

INDEX = "https://pip.repos.neuron.amazonaws.com"


def real(module: str, attribute: str) -> Any:
    """An attribute of the real package; raises `NotSupported` for PyPI's stub or nothing at all.

    The stubs on PyPI raise on import, in their own way each; so a real attribute is the test.
    """
    package = module.partition(".")[0].replace("_", "-")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as failure:  # Whatever it is, the package cannot be used.
        raise NotSupported(
            f"{module}.{attribute} cannot be imported ({type(failure).__name__}: {failure}). "
            f"Compiling and running NxDI models needs AWS Neuron's {package}: "
            f"pip install {package} --extra-index-url {INDEX} on a Neuron machine (PyPI itself "
            "has only a stub of that name)."
        ) from failure
