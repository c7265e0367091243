"""`Choices`: which tensors of a model are recorded, and how; decided once a name."""

from __future__ import annotations

from collections.abc import Sequence

from tensortap.config import Settings
from tensortap.errors import SelectionError
from tensortap.integration import Site
from tensortap.records import Values


class Choices:
    """Selection, phases and values put together; called for every tensor seen, so it remembers."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[tuple[str, str, str], Values | None] = {}

    def __call__(self, module: str, phase: str, tensor: str) -> Values | None:
        """How the tensor is to be recorded, or `None` when it is not selected."""
        key = (module, phase, tensor)
        try:
            return self._made[key]
        except KeyError:
            name = f"{module}/{phase}/{tensor}"
            chosen = phase in self._settings.phases and self._settings.select.matches(name)
            values = self._settings.values(name) if chosen else None
            self._made[key] = values
            return values

    def wants(self, site: Site) -> bool:
        """Could any tensor of the site be selected? Decides whether it is hooked at all."""
        for phase, prefix in (("forward", ""), ("backward", "grad_")):
            if phase not in self._settings.phases:
                continue
            for tensor in site.tensors:
                word = f"{prefix}{tensor}"
                if self(site.name, phase, word) is not None:
                    return True
                several = f"{site.name}/{phase}/{word}."
                if site.kind == "module" and self._settings.select.may_match(several):
                    return True
        return False

    def sites_in(self, sites: Sequence[Site], parameters: Sequence[str]) -> list[Site]:
        """The selected sites; raises `SelectionError` when not even a parameter is selected."""
        selected = [site for site in sites if self.wants(site)]
        if all(site.silent for site in selected) and not self._any(parameters):
            for site in selected:
                raise SelectionError(f"{site.name} cannot be captured: {site.silent}.")
            names = [f"{site.name}/forward/{tensor}" for site in sites for tensor in site.tensors]
            raise self._settings.select.nothing_in([*names, *parameters], "this model")
        return selected

    def _any(self, names: Sequence[str]) -> bool:
        return any(self(*name.split("/")) is not None for name in names)
