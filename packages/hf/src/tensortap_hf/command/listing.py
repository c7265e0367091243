"""`tensortap modes list`."""

from __future__ import annotations

from tensortap_hf import modes
from tensortap_hf.command import printing
from tensortap_hf.command.options import AsJson


def list_modes(as_json: AsJson = False) -> None:
    """Print every mode: its family, what it does, its basis, and what it must be equal to.

    Exit code: 0.
    """
    found = [modes.get(name, family) for family in modes.families() for name in modes.names(family)]
    if as_json:
        printing.say_json({
            "families": [
                {"name": one.name, "description": one.description, "presets": one.presets}
                for one in map(modes.family, modes.families())
            ],
            "modes": [
                {
                    "name": mode.name,
                    "family": mode.family,
                    "basis": mode.basis,
                    "format": mode.format,
                    "needs_calibration": mode.needs_calibration,
                    "equals": mode.equals,
                    "description": mode.description,
                }
                for mode in found
            ],
        })  # fmt: skip
        return
    for family in map(modes.family, modes.families()):
        rows = [
            (mode.name, mode.description, mode.basis, ", ".join(mode.equals) or None)
            for mode in found
            if mode.family == family.name
        ]
        title = f"{family.name}: {family.description}"
        printing.say_table(("mode", "what it does", "basis", "bitwise equal to"), rows, title)
        for preset, names in family.presets.items():
            printing.say(f"  {preset} = {' '.join(names)}")
        printing.say()
