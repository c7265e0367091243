"""Modes: numeric variants of a loaded transformers model, undone bitwise.

    from tensortap_hf import modes
    with modes.apply(model, "mxfp4"), tensortap.attach(model, "runs/mxfp4", values="full"):
        model(**batch)

Apply the mode before the tap, so that the run knows which mode it shows.
"""

from tensortap_hf.modes.applied import Applied, State, apply, state_of
from tensortap_hf.modes.registry import (
    Changes,
    Family,
    Mode,
    Options,
    families,
    families_of,
    family,
    get,
    names,
    refusals,
    register,
    register_family,
    resolve,
)

__all__ = [
    "Applied",
    "Changes",
    "Family",
    "Mode",
    "Options",
    "State",
    "apply",
    "families",
    "families_of",
    "family",
    "get",
    "names",
    "refusals",
    "register",
    "register_family",
    "resolve",
    "state_of",
]
