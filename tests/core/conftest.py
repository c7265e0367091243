"""Fixtures of the tests of core."""

from __future__ import annotations

import pytest

from tensortap.cli import main


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run `tensortap ARGS`; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["tensortap", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return stopped.value.code or 0, printed.out, printed.err

    return run
