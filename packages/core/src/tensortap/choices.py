"""`Choices`: which tensors of a model are recorded, and how; decided once a name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from tensortap.config import Settings
from tensortap.errors import CaptureWarning, SelectionError
from tensortap.integration import Site
from tensortap.records import Values
from tensortap.selection import closest


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

    def of(self, site: Site, phase: str, tensor: str) -> Values | None:
        """The same for a tensor of a site, which may be selected by the name of a part of it."""
        if not site.parts:
            return self(site.name, phase, tensor)
        found = [self(name, phase, tensor) for name in (site.name, *site.parts)]
        return next((values for values in _MOST_FIRST if values in found), None)

    def wants(self, site: Site) -> bool:
        """Could any tensor of the site be selected? Decides whether it is hooked at all."""
        for phase in ("forward", "backward"):
            if phase not in self._settings.phases:
                continue
            for word in tensors_of(site, phase):
                if self.of(site, phase, word) is not None:
                    return True
                if site.kind == "module" and self._may_match(site, phase, word):
                    return True
        return False

    def _may_match(self, site: Site, phase: str, word: str) -> bool:
        names = (site.name, *site.parts)
        return any(self._settings.select.may_match(f"{name}/{phase}/{word}.") for name in names)

    def sites_in(
        self, sites: Sequence[Site], parameters: Sequence[str], elsewhere: Sequence[str] = ()
    ) -> list[Site]:
        """The selected sites; none when all that is selected lies on other ranks.

        Raises `SelectionError` when nothing is selected at all, not even a parameter.
        """
        selected = [site for site in sites if self.wants(site)]
        if all(site.silent for site in selected) and not self.selects_any(
            (*parameters, *elsewhere)
        ):
            for site in selected:
                raise SelectionError(f"{site.name} cannot be captured: {site.silent}.")
            names = [name for site in sites for name in _names(site, "forward")]
            known = list(dict.fromkeys([*names, *parameters, *elsewhere]))
            raise self._settings.select.nothing_in(known, "this model", hint=self._hint(sites))
        return selected

    def _hint(self, sites: Sequence[Site]) -> str:
        """What a native path in the selection is called; empty when there is none."""
        text = self._settings.select.text
        named = [site for site in sites if site.native and site.native in text]
        best = max(named, key=lambda site: len(site.native), default=None)
        if best is None or best.native == best.name:
            return ""
        return f" {best.native!r} is called {best.name!r} here."

    def warn_of_dead(self, sites: Sequence[Site], parameters: Sequence[str]) -> None:
        """A pattern that matches nothing among others that do is most likely a typo."""
        both = ("forward", "backward")
        names = [name for site in sites for phase in both for name in _names(site, phase)]
        said = {"select": self._settings.select}
        said |= {f"values ({rule.text!r})": rule for rule, _ in self._settings.values.rules}
        for option, selection in said.items():
            for pattern in selection.dead([*names, *parameters], [f"{name}." for name in names]):
                close = ", ".join(map(repr, closest(pattern, [*names, *parameters])))
                warnings.warn(
                    f"{option}: the pattern {pattern!r} matches nothing in this model. "
                    f"Closest names: {close}.",
                    CaptureWarning,
                    stacklevel=6,
                )

    def selects_any(self, names: Iterable[str]) -> bool:
        """Is any of these names selected?"""
        return any(self(*name.split("/")) is not None for name in names)


_MOST_FIRST: tuple[Values, ...] = ("full", "sample", "stats")


def tensors_of(site: Site, phase: str) -> list[str]:
    """What the tensors of a site are called in a phase."""
    if phase == "forward":
        return list(site.tensors)
    watched = [tensor for tensor in site.tensors if tensor not in site.forward_only]
    return [f"grad_{tensor}" for tensor in watched] + list(site.backward)


def _names(site: Site, phase: str) -> list[str]:
    """Every name the tensors of a site can be selected by."""
    modules = (site.name, *site.parts)
    return [f"{name}/{phase}/{word}" for name in modules for word in tensors_of(site, phase)]
