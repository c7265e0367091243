"""What the README prints is what runs: its Python blocks in order, then its commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()

pytest.importorskip("transformers")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands():
    """Lines `$ tensortap …` of the console blocks that need only what the blocks before made."""
    lines = [line for block in blocks("console") for line in block.splitlines()]
    return [
        line[2:].split("  #")[0]
        for line in lines
        if re.match(r"\$ tensortap .*(runs/|import )", line)
    ]


def test_every_block_and_command_of_the_readme_runs(tmp_path):
    python = [block for block in blocks("python") if "tensortap.attach(model)" not in block]
    assert len(python) >= 4
    program = "".join(python)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "layers.1.mlp.down/backward/grad_output" in done.stdout
    assert len(commands()) >= 5
    for command in commands():
        words = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(
            words, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip()


def test_relative_links_of_the_readmes_lead_somewhere():
    for readme in [ROOT / "README.md", *ROOT.glob("packages/*/README.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)\)", readme.read_text()):
            assert (readme.parent / target).exists(), f"{readme}: {target}"
