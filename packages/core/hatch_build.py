"""Compile the kernel into the wheel; without a C compiler the wheel is pure Python."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src", "tensortap", "native")


class CustomBuildHook(BuildHookInterface):
    """Runs for wheels and, so that a checkout is fast as well, for editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Leave the library beside its sources and, if there is one, mark the wheel with it."""
        build = _load_compiler(Path(self.root) / NATIVE / "build.py")
        target = Path(self.root) / NATIVE / build.LIBRARY
        try:
            build.compile_library(target)
        except (build.CompileError, OSError) as problem:
            target.unlink(missing_ok=True)
            self.app.display_warning(_loud(problem))
            return
        build_data["artifacts"].append(str(NATIVE / build.LIBRARY))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"


def _load_compiler(path: Path) -> ModuleType:
    """The module the running package compiles with too; the package itself would need torch."""
    spec = importlib.util.spec_from_file_location("tensortap_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """Of the building machine; wheels to publish are relabelled by auditwheel or delocate."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _loud(problem: Exception) -> str:
    line = "*" * 78
    return (
        f"\n{line}\ntensortap: the kernel was NOT compiled: {problem}.\n"
        "This is a pure Python build. It is complete, but computes statistics with torch\n"
        "operations, several times slower, on machines without a C compiler. Set CC, or install\n"
        f"cc, gcc or clang, and build again.\n{line}"
    )
