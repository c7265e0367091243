"""Before a model is released: scan, health, formats, quantise, scan again, compare.

python examples/weights/before_release.py path/to/model --out release [--sqnr 30]

Works on any folder or file that `tensortap scan` reads, a few tensors at a time. The quantised
copy holds the values that the chosen formats leave, in the dtype of the model (in bfloat16, where
that was stored quantised), so that everything that loads the model can try them. It has the
weights alone: buffers of integers are left out, and tied names, which Hugging Face models make
anew. Exit code 1: something critical, before or after.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from tensortap import formats
from tensortap_analysis.weights import Scope, Weight
from tensortap_analysis.weights.health import Health, health
from tensortap_analysis.weights.recommend import quant_plan

SHARD = 2 << 30
"""Bytes of a file of the quantised copy, about."""


def main() -> int:
    """Run the steps; the exit code."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    scope = Scope(options.model)

    before = scope.scan(parallel=True, output=options.out / "before.json")
    found = health(before)
    say("before", found)

    plan = quant_plan(before, sqnr_db=options.sqnr)
    (options.out / "quantization.json").write_text(json.dumps(plan.to_json(), indent=1))
    chosen = {layer: name for name, layers in plan.by_format().items() for layer in layers}
    bits = "" if plan.bits is None else f", to {plan.bits:.2f} bits a value on the average"
    print(f"{len(chosen)} layers are quantised{bits}")

    copy = options.out / "quantised"
    write(scope, chosen, copy)
    after = Scope(copy).scan(parallel=True, output=options.out / "after.json")
    judged = health(after)
    say("after", judged)

    compared = scope.compare_with(Scope(copy), parallel=True)["layer_comparisons"]
    changes = {layer: one["relative_change"] or 0.0 for layer, one in compared.items()}
    for layer in sorted(changes, key=lambda layer: -changes[layer])[:5]:
        print(f"  {layer}: changed by {changes[layer]:.2%}")
    return 1 if found.issues["critical"] or judged.issues["critical"] else 0


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Is this model fit to be released, quantised?")
    parser.add_argument("model", help="a path, or a hub name that is in the local cache")
    parser.add_argument("--out", type=Path, default=Path("release"))
    parser.add_argument("--sqnr", type=float, default=30.0, help="dB that every layer keeps")
    return parser.parse_args()


def say(when: str, found: Health) -> None:
    """Score and counts, and what is critical."""
    counts = ", ".join(f"{len(issues)} {one}" for one, issues in found.issues.items())
    print(f"{when}: score {found.score:.0f}, {found.verdict} ({counts})")
    for issue in found.issues["critical"]:
        print(f"  {issue}")


def write(scope: Scope, chosen: Mapping[str, str], folder: Path) -> None:
    """A copy in shards with an index; layers in `chosen` are rounded to their format."""
    folder.mkdir(exist_ok=True)
    beside(Path(scope.source.label), folder)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards(scope, chosen), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def beside(model: Path, folder: Path) -> None:
    """Configuration and tokenizer, so that the copy loads as the model does."""
    for path in sorted(model.glob("*")) if model.is_dir() else ():
        if path.suffix in (".json", ".txt", ".model") and not path.name.endswith(".index.json"):
            shutil.copy(path, folder / path.name)
    config = folder / "config.json"
    if config.exists():
        # The copy holds values: with the original's codes described, it would be read as those.
        facts = json.loads(config.read_text())
        facts.pop("quantization_config", None)
        config.write_text(json.dumps(facts, indent=1))


def shards(scope: Scope, chosen: Mapping[str, str]) -> Iterator[dict[str, torch.Tensor]]:
    """Weights in groups of at most `SHARD` bytes, or one."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for weight in scope.weights():
        if shard and size + weight.nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        shard[weight.name] = rounded(weight, chosen.get(weight.layer))
        size += weight.nbytes
    yield shard


def rounded(weight: Weight, name: str | None) -> torch.Tensor:
    """The values, as the format leaves them; blocks lie along the inputs."""
    values = weight.read()
    if weight.dtype.itemsize == 1 or not weight.dtype.is_floating_point:
        values = values.to(torch.bfloat16)
    if name is None:
        return values.contiguous()
    codec = formats.get(name, scale="channel") if name == "int8" else formats.get(name)
    return codec.fake_quantize(values, axis=0 if weight.transposed else -1).contiguous()


if __name__ == "__main__":
    raise SystemExit(main())
