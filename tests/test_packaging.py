"""The five packages, built and installed the way a user gets them."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tensortap_hf.integration
import tensortap_megatron.integration

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "tensortap": "core",
    "tensortap-hf": "hf",
    "tensortap-megatron": "megatron",
    "tensortap-neuron": "neuron",
    "tensortap-analysis": "analysis",
}
PLUGINS = sorted(set(FOLDERS) - {"tensortap"})
DRAWN_WITH = {"tensortap-analysis": ("matplotlib", "plotly")}
EVERY = pytest.mark.parametrize("dist", FOLDERS)

# One worker builds and installs once, instead of each worker for itself.
pytestmark = pytest.mark.xdist_group("packaging")


@dataclass(frozen=True)
class Wheel:
    """A wheel on disk, opened: what is in it and what it says about itself."""

    path: Path
    files: frozenset[str]
    metadata: Message
    entry_points: configparser.ConfigParser

    @classmethod
    def open(cls, path: Path) -> Wheel:
        entries = configparser.ConfigParser()
        entries.optionxform = str  # type: ignore[assignment,method-assign]
        with zipfile.ZipFile(path) as archive:
            files = frozenset(archive.namelist())
            info = next(name.partition("/")[0] for name in files if ".dist-info/" in name)
            metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
            if f"{info}/entry_points.txt" in files:
                entries.read_string(archive.read(f"{info}/entry_points.txt").decode())
        return cls(path, files, metadata, entries)

    def read(self, suffix: str) -> str:
        (name,) = [name for name in self.files if name.endswith(suffix)]
        return zipfile.ZipFile(self.path).read(name).decode()

    def requires(self, extra: str | None = None) -> dict[str, Requirement]:
        """Requirements by name: those of `extra`, or those that always hold."""
        found = [Requirement(text) for text in self.metadata.get_all("Requires-Dist") or []]
        return {r.name: r for r in found if needed_for(r, extra)}


def needed_for(requirement: Requirement, extra: str | None) -> bool:
    if extra is None or requirement.marker is None:
        return extra is None and requirement.marker is None
    return requirement.marker.evaluate({"extra": extra})


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed, without settings or sources from outside."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    clean |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done


def build(folder: Path, target: str, out: Path) -> Path:
    """Build a wheel or an sdist with the hatchling that is installed here; nothing is fetched."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.iterdir())
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out, cwd=folder)
    (made,) = set(out.iterdir()) - before
    return made


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    out = tmp_path_factory.mktemp("wheels")
    return {
        dist: Wheel.open(build(ROOT / "packages" / folder, "wheel", out))
        for dist, folder in FOLDERS.items()
    }


@pytest.fixture(scope="session")
def fresh(wheels: dict[str, Wheel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment into which only `pip install "tensortap[hf,megatron]"` was run.

    Third-party packages, pip among them, are lent to it from here, to save time and the network.
    Ours are not: the wheels are their only source.
    """
    home = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)})
    lent = lend_third_party(home / "lent")
    Path(packages, "lent.pth").write_text(f"{lent}\n")
    folder = wheels["tensortap"].path.parent
    run(python, "-m", "pip", "install", "--no-index", "--find-links", folder,
        "tensortap[hf,megatron]", cwd=home)  # fmt: skip
    return python


def lend_third_party(folder: Path) -> Path:
    """Links to everything that is installed here, but for our own packages."""
    folder.mkdir()
    for installed in dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib")):
        for entry in Path(installed).iterdir():
            ours = "tensortap" in entry.name or entry.suffix == ".pth"
            if not ours and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@EVERY
def test_every_package_has_the_same_version(dist: str, wheels: dict[str, Wheel]) -> None:
    assert wheels[dist].metadata["Version"] == wheels["tensortap"].metadata["Version"]


@EVERY
def test_a_wheel_says_what_it_is_and_carries_license_types_and_no_tests(
    dist: str, wheels: dict[str, Wheel]
) -> None:
    wheel, module = wheels[dist], dist.replace("-", "_")
    assert wheel.metadata["Name"] == dist
    assert wheel.metadata["License-Expression"] == "Apache-2.0"
    assert wheel.metadata["Requires-Python"] == ">=3.10"
    assert "Typing :: Typed" in wheel.metadata.get_all("Classifier", [])
    assert wheel.read("licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    assert f"# {dist}\n" in str(wheel.metadata.get_payload())
    assert f"{module}/py.typed" in wheel.files
    assert f"{module}/__init__.py" in wheel.files
    outside = {name for name in wheel.files if name.split("/")[0] != module}
    assert all(".dist-info/" in name for name in outside)
    assert not [name for name in wheel.files if "test_" in name or "conftest" in name]


def test_the_core_needs_nothing_but_six_libraries(wheels: dict[str, Wheel]) -> None:
    needed = wheels["tensortap"].requires()
    assert set(needed) == {"torch", "numpy", "safetensors", "xxhash", "typer", "rich"}
    assert str(needed["torch"].specifier) == ">=2.4"


@pytest.mark.parametrize("dist", PLUGINS)
def test_a_plugin_and_its_extra_ask_for_the_same_minor_version_and_nothing_else(
    dist: str, wheels: dict[str, Wheel]
) -> None:
    version = str(wheels["tensortap"].metadata["Version"])
    major, minor = (int(part) for part in version.split(".")[:2])
    same_minor = Requirement(f"x>={major}.{minor},<{major}.{minor + 1}").specifier
    needed = wheels[dist].requires()
    assert set(needed) == {"tensortap", *DRAWN_WITH.get(dist, ())}
    assert needed["tensortap"].specifier == same_minor
    extra = wheels["tensortap"].requires(dist.removeprefix("tensortap-"))
    assert {name: r.specifier for name, r in extra.items()} == {dist: same_minor}


def test_the_extra_all_names_every_plugin(wheels: dict[str, Wheel]) -> None:
    assert sorted(wheels["tensortap"].requires("all")) == PLUGINS


def test_the_integration_is_found_under_the_name_of_its_framework(wheels: dict[str, Wheel]) -> None:
    for dist, framework in (
        ("tensortap-hf", "transformers"),
        ("tensortap-megatron", "megatron.core"),
    ):
        assert list(wheels[dist].entry_points["tensortap.integrations"]) == [framework]
    assert list(wheels["tensortap-megatron"].entry_points["tensortap.layouts"]) == ["megatron-pt"]
    assert wheels["tensortap"].entry_points["console_scripts"]["tensortap"] == "tensortap.cli:main"
    commands = wheels["tensortap-analysis"].entry_points["tensortap.commands"]
    assert sorted(commands) == ["compare", "diff-weights", "formats", "plot", "report", "scan"]
    layouts = wheels["tensortap-hf"].entry_points["tensortap.layouts"]
    assert sorted(layouts) == ["first-layer-npz", "layer-npy"]
    assert list(wheels["tensortap-hf"].entry_points["tensortap.commands"]) == ["modes"]
    neuron = wheels["tensortap-neuron"].entry_points
    assert list(neuron["tensortap.integrations"]) == ["neuronx_distributed"]
    assert sorted(neuron["tensortap.backends"]) == ["neuron", "xla"]
    assert sorted(neuron["tensortap.layouts"]) == ["layers-pt", "nxdi", "vllm-neuron"]
    assert list(neuron["tensortap.commands"]) == ["neuron"]


@pytest.mark.parametrize(
    ("dist", "framework", "tested"),
    [
        ("tensortap-hf", "transformers", tensortap_hf.integration.TESTED),
        ("tensortap-megatron", "megatron-core", tensortap_megatron.integration.TESTED),
    ],
)
def test_the_framework_is_an_extra_that_states_the_range_the_integration_checks(
    wheels: dict[str, Wheel], dist: str, framework: str, tested: tuple[str, str]
) -> None:
    oldest, newest = tested
    needed = wheels[dist].requires("framework")
    assert set(needed) == {framework}
    assert needed[framework].specifier == Requirement(f"x>={oldest},<{newest}").specifier
    assert version(framework) in needed[framework].specifier


@EVERY
def test_an_sdist_builds_the_same_wheel(
    dist: str, wheels: dict[str, Wheel], tmp_path: Path
) -> None:
    sdist = build(ROOT / "packages" / FOLDERS[dist], "sdist", tmp_path)
    run(sys.executable, "-m", "tarfile", "-e", sdist, tmp_path, cwd=tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert not list(unpacked.rglob("*.so")), "a library of this machine in the sources for others"
    rebuilt = Wheel.open(build(unpacked, "wheel", tmp_path / "again"))
    assert rebuilt.files == wheels[dist].files


CAPTURE = """
import sys, tensortap, torch
assert not {"transformers", "megatron", "torch_xla"} & set(sys.modules), "a framework was imported"
model = torch.nn.Sequential(torch.nn.Linear(4, 3))
with tensortap.attach(model, "run", values="full"): y = model(torch.ones(2, 4))
assert tensortap.open_run("run").tensor("0/forward/output", step=0).equal(y)
print(tensortap.__file__)
"""

LLAMA = """
import tensortap, tensortap_hf, torch
from transformers import LlamaConfig, LlamaForCausalLM
small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **small))
with tensortap.attach(model, tensortap.MemorySink()) as tap: model(torch.arange(8)[None])
print(tensortap_hf.__file__)
"""


def test_installed_from_wheels_a_three_line_script_captures_and_reads_back(
    fresh: Path, tmp_path: Path
) -> None:
    where = run(fresh, "-c", CAPTURE, cwd=tmp_path).stdout.strip()
    assert Path(where).is_relative_to(fresh.parent.parent)


def test_installed_from_wheels_a_transformers_model_has_canonical_names(
    fresh: Path, tmp_path: Path
) -> None:
    script = LLAMA.replace("tensortap.MemorySink()", "sink := tensortap.MemorySink()")
    script += 'assert "layers.0.attn.core/forward/query" in sink.names(), sink.names()\n'
    where = run(fresh, "-c", script, cwd=tmp_path).stdout.strip()
    assert Path(where).is_relative_to(fresh.parent.parent)


MEGATRON = """
import sys, tensortap, tensortap_megatron, torch
assert "megatron" not in sys.modules, "importing the plugin imported the framework"
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
class Model(MegatronModule):
    def __init__(self):
        super().__init__(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
        self.output_layer = torch.nn.Linear(8, 3)
    def forward(self, x): return self.output_layer(x)
model = Model()
with tensortap.attach(model, sink := tensortap.MemorySink()): model(torch.ones(2, 8))
assert "lm_head/forward/output" in sink.names(), sink.names()
print(tensortap_megatron.__file__)
"""


def test_installed_from_wheels_a_megatron_model_has_canonical_names(
    fresh: Path, tmp_path: Path
) -> None:
    where = run(fresh, "-W", "ignore", "-c", MEGATRON, cwd=tmp_path).stdout.strip()
    assert Path(where).is_relative_to(fresh.parent.parent)


def test_installing_a_plugin_installs_no_framework(fresh: Path) -> None:
    """Nobody wants pip to change their Megatron: what pip put there are our own packages."""
    installed = (fresh.parent.parent / "lib").glob("python*/site-packages/*.dist-info")
    assert {path.name.partition("-")[0] for path in installed} == {
        "tensortap",
        "tensortap_hf",
        "tensortap_megatron",
    }


def test_installed_from_wheels_the_command_line_answers(fresh: Path, tmp_path: Path) -> None:
    command = fresh.parent / "tensortap"
    assert "coverage" in run(command, "--help", cwd=tmp_path).stdout
    assert "tensortap-hf" in run(command, "doctor", cwd=tmp_path).stdout
