"""What the fused kernel of a Mamba mixer hides."""

from __future__ import annotations

from collections.abc import Sequence

from tensortap.integration import Observer, Site
from tensortap_megatron.naming import is_a

_ONE_KERNEL = (
    "the convolution and the scan run as one kernel, which shows nothing in between: what goes in "
    "is mixer.in_proj/forward/output (z, x, B, C, dt), what comes out mixer.norm/forward/input"
)
_NO_MODULE = (
    "the scan is a function, which is not tapped: what goes in is mixer.in_proj/forward/output "
    "(z, x, B, C, dt) after the convolution, what comes out mixer.norm/forward/input"
)


def explain(sites: Sequence[Site], observer: Observer) -> None:
    """Say in the coverage report what no hook can see of the wanted mixers."""
    wanted = [site.name for site in sites if observer.wants(site)]
    for site in sites:
        if site.kind == "module" and is_a(site.module, "MambaMixer") and _any_in(wanted, site.name):
            fused = bool(getattr(site.module, "use_mem_eff_path", False))
            reason = _ONE_KERNEL if fused else _NO_MODULE
            for word in ("scan", "conv", "act") if fused else ("scan",):
                observer.note(f"{site.name}.{word}", reason)


def _any_in(names: Sequence[str], mixer: str) -> bool:
    return any(name == mixer or name.startswith(f"{mixer}.") for name in names)
