"""Where the compiled kernel comes from, and what happens where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tensortap import native
from tensortap.errors import ConfigError
from tensortap.native import build, cache
from tensortap.native.binding import Library, StaleLibrary

VALUES = torch.tensor([3.0, 4.0])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without a compiled kernel, and an empty cache directory."""
    monkeypatch.setattr(native, "HERE", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    return tmp_path


@pytest.fixture
def compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real compiler behind a script that notes every run; skips where there is none."""
    try:
        real = build._compiler()
    except build.CompileError as none:
        pytest.skip(str(none))
    log, script = home / "runs", home / "cc"
    script.write_text(f'#!/bin/sh\necho run >> "{log}"\nexec {" ".join(real)} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    log.touch()
    return log


def test_without_a_prebuilt_kernel_it_is_compiled_once_and_kept(compiler: Path) -> None:
    for _ in range(2):
        library, status = native.load()
        assert library is not None
        assert library.statistics(VALUES, exponents=False).l2 == 5.0
        assert "compiled on this machine" in str(status)
    assert compiler.read_text().splitlines() == ["run"]
    assert library.path.parent.stat().st_mode & 0o777 == 0o700


def test_ranks_starting_at_once_compile_once(home: Path, compiler: Path) -> None:
    script = "from tensortap.native import cache; print(cache.library().path)"
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert len(printed) == 1
    assert compiler.read_text().splitlines() == ["run"]
    left = [path.name for path in (home / "cache" / "tensortap").iterdir()]
    assert sorted(Path(name).suffix for name in left) == [".lock", ".so"]


def test_a_prebuilt_kernel_is_used_without_a_compiler(
    home: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "package").mkdir()
    build.compile_library(home / "package" / build.LIBRARY)
    monkeypatch.setenv("CC", "no-such-compiler")
    library, status = native.load()
    assert library is not None
    assert library.path.parent == home / "package"
    assert "built with the package" in str(status)


def test_a_kernel_of_other_sources_is_not_used(
    home: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = home / "package" / build.LIBRARY
    stale.parent.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(build, "digest", lambda: "0123456789abcdef")
        build.compile_library(stale)
    with pytest.raises(StaleLibrary, match="0123456789abcdef"):
        Library(stale)
    library, _ = native.load()
    assert library is not None
    assert library.path.parent == home / "cache" / "tensortap"


def test_a_damaged_kernel_in_the_cache_is_compiled_again(compiler: Path) -> None:
    library, _ = native.load()
    assert library is not None
    damaged = library.path
    damaged.unlink()
    damaged.write_bytes(b"\x7fELF, but not for long")
    assert cache.library().statistics(VALUES, exponents=False).l2 == 5.0


def test_a_directory_others_can_write_is_no_place_for_code(home: Path, compiler: Path) -> None:
    shared = home / "cache" / "tensortap"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    library, _ = native.load()
    assert library is not None
    assert library.path.parent == home / "tmp" / f"tensortap-{os.getuid()}"
    assert not list(shared.iterdir())


def test_a_link_in_the_temporary_directory_is_not_followed(home: Path, compiler: Path) -> None:
    (home / "cache").write_text("not a directory")
    (home / "elsewhere").mkdir(mode=0o700)
    (home / "tmp" / f"tensortap-{os.getuid()}").symlink_to(home / "elsewhere")
    library, status = native.load()
    assert library is None
    assert "only this user can write" in status.reason


def test_without_a_compiler_torch_does_it_and_says_why(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler --with-an-option")
    library, status = native.load()
    assert library is None
    assert str(status).startswith("torch operations")
    assert "no-such-compiler" in status.reason


def test_a_compiler_that_fails_is_quoted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = home / "cc"
    broken.write_text("#!/bin/sh\necho 'error: out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    library, status = native.load()
    assert library is None
    assert "out of order" in status.reason
    assert not list((home / "cache" / "tensortap").glob("*.so"))


def test_an_old_compiler_builds_the_kernel_without_clones(home: Path, compiler: Path) -> None:
    script = home / "cc"
    old = 'case "$*" in *NO_CLONES*) ;; *) echo "unknown arch" >&2; exit 1;; esac\n'
    script.write_text(script.read_text().replace("exec", f"{old}exec"))
    library, _ = native.load()
    assert library is not None
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    chosen = native.library()
    if chosen is None:
        pytest.skip("nothing to compare with")
    plain, wide = (one.statistics(every, exponents=True) for one in (library, chosen))
    assert plain.exponents == wide.exponents
    assert plain.l2 == pytest.approx(wide.l2, rel=1e-13)


def test_the_environment_can_rule_the_kernel_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORTAP_NATIVE", "0")
    library, status = native.load()
    assert library is None
    assert "TENSORTAP_NATIVE=0" in str(status)


def test_a_setting_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORTAP_NATIVE", "perhaps")
    with pytest.raises(ConfigError, match="TENSORTAP_NATIVE='perhaps'"):
        native.load()
