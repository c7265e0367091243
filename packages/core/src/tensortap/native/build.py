"""Compile the kernel with the system's C compiler; imported by the wheel's build hook as well.

Standard library only: at build time neither torch nor tensortap can be imported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = "libtensortap.so"
_SOURCES = (
    "clones.h", "threads.h", "blocks.h", "walk.h", "stats.c",
    "grid.h", "hifloat8.h", "tasks.h", "formats.c", "decode.c", "pairs.h",
    "totals.h", "compare.c", "select.c", "codes.c", "change.c",
    "survey.c",
)  # fmt: skip
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fopenmp-simd")
_TIMEOUT = 120.0
"""Seconds; compiling takes a few."""


class CompileError(Exception):
    """There is no C compiler, or it refused; the text says which and why."""


def digest() -> str:
    """What a library must have been built from to be used; it carries this word in itself."""
    whole = hashlib.sha256(" ".join(_FLAGS).encode())
    for name in _SOURCES:
        whole.update((HERE / name).read_bytes())
    return whole.hexdigest()[:16]


def compile_library(target: Path) -> None:
    """Build `target`; it appears complete or not at all. Raises `CompileError`, `OSError`."""
    if sys.platform == "win32":
        raise CompileError("the kernel is not built on Windows")
    command = _compiler()
    handle, draft = tempfile.mkstemp(prefix=".building-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        _compile(command, draft)
        os.chmod(draft, 0o755)
        os.replace(draft, target)
    finally:
        Path(draft).unlink(missing_ok=True)


def _compiler() -> list[str]:
    wanted = os.environ.get("CC")
    for command in [wanted] if wanted else ["cc", "gcc", "clang"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise CompileError(f"no C compiler found (looked for {wanted or 'cc, gcc, clang'})")


def _compile(command: list[str], target: str) -> None:
    """Older compilers do not know the processor levels of the clones: then without clones."""
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    problem = ""
    for extra in (wide, ["-DTENSORTAP_NO_CLONES"]):
        problem = _run([
            *command, *_FLAGS, *extra, f'-DTENSORTAP_SOURCE="{digest()}"',
            "-o", target, *(str(HERE / name) for name in _SOURCES if name.endswith(".c")), "-lm",
        ])  # fmt: skip
        if not problem:
            return
    raise CompileError(f"{command[0]} failed: {problem}")


def _run(command: list[str]) -> str:
    """Run a compiler; the last lines it printed if it failed, else nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no result within {_TIMEOUT:g} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()[-3:]
    return " / ".join(lines) or f"exit status {done.returncode}"
