"""The old fork's words for a tensor, and the canonical names they stand for.

`{timestamp}_{counter}_{layer_type}_{operation}_{quant_type}_{tensor_name}.pt`: `layer_type` is
followed by `_L<n>` where the tensor belongs to a layer (counted from 0), and by nothing where it
does not (embedding, final norm, output layer), as the fork did it. No word holds an underscore,
so that a script that splits the name by `_` finds its fields:

- layer_type: `attention` (the core: query, key, value and the context) and `linear` (every
  projection of a layer, told apart by the counter) are the fork's own; every other module has
  the last word of its canonical name without underscores: `inputnorm`, `router`, `embed`.
- operation: `forward` and `backward` hold what the fork wrote there. Parameters and their
  gradients are `param` and `grad`, so that a script that asks for one of the fork's operations
  gets nothing it did not expect.
- tensor_name: the context is `output`. In backward the fork named what the operation is given
  and gives: `input` is grad_output, `output` is grad_input. Names the fork did not have keep
  theirs with `-` for whatever is no letter or digit: `grad-query`, `grad-input-local`, `input-1`.
  Evenly strided elements in place of the tensor (`values="sample"`) end in `-sample`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tensortap.names import TensorName
from tensortap.records import TensorRecord

_FILE = re.compile(
    r"(?P<timestamp>\d{8}_\d{6})_(?P<counter>\d{1,12})_(?:iter(?P<step>\d{1,9})_)?"
    r"(?P<layer_type>[A-Za-z][A-Za-z0-9_-]*?)(?:_L(?P<layer>\d{1,9}))?"
    r"_(?P<operation>forward|backward|param|grad)(?:_(?:pre|post|unknown)_[A-Za-z]+)?"
    r"_(?P<quant_type>[A-Za-z0-9-]+)(?:_rank(?P<rank>\d{1,6}))?"
    r"(?:_sample(?P<microbatch>\d{1,9}))?(?:_group\d+)?"
    r"_(?P<tensor>[A-Za-z0-9_.-]+)\.pt",
    re.ASCII,
)
"""Also the longer names of later versions: iteration, pre/post and component, rank, sample."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
_CORE = re.compile(r"(?:^|\.)(?:(?:cross_)?attn\.core|core_attention)$")
_LINEAR = re.compile(
    r"(?:^|\.)(?:(?:cross_)?attn\.(?:q|k|v|kv|qkv|out)|mlp\.(?:.+\.)?(?:gate|up|gate_up|down)"
    r"|mixer\.(?:in_proj|x_proj|dt_proj|out_proj)"
    r"|linear_(?:q|kv|qkv|q_proj|proj|fc1|fc2)|output_layer)$"
    r"|^lm_head$"
)

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_OLD_TENSORS = {
    "forward": {"context": "output"},
    "backward": {"grad_output": "input", "grad_context": "input", "grad_input": "output"},
}
_GIVEN_AND_GIVES = {"input": "grad_output", "output": "grad_input"}
_IN_A_LAYER = {
    "attention": "attn.core", "inputnorm": "input_norm", "postattnnorm": "post_attn_norm",
    "qnorm": "attn.q_norm", "knorm": "attn.k_norm", "router": "mlp.router", "act": "mlp.act",
    "conv": "mixer.conv", "scan": "mixer.scan", "layer": "",
}  # fmt: skip
_OUTSIDE = {"finalnorm": "final_norm"}


@dataclass(frozen=True, slots=True)
class OldName:
    """The fields of one file name; `layer` is `None` outside the layers.

    `rank`, `step` and `microbatch` are in the names of later versions only; they are read, and
    never written.
    """

    timestamp: str
    counter: int
    layer_type: str
    layer: int | None
    operation: str
    quant_type: str
    tensor: str
    rank: int | None = None
    step: int = 0
    microbatch: int = 0

    @property
    def file_name(self) -> str:
        """As the fork wrote it; the counter has at least four digits."""
        layer = "" if self.layer is None else f"_L{self.layer}"
        return (
            f"{self.timestamp}_{self.counter:04d}_{self.layer_type}{layer}_{self.operation}"
            f"_{self.quant_type}_{self.tensor}.pt"
        )


def old_name(record: TensorRecord, run_format: str | None, timestamp: str, counter: int) -> OldName:
    """The file name of a record; `run_format` counts where the record has no format."""
    module = record.name.module
    layer = _LAYER.search(module)
    return OldName(
        timestamp=timestamp,
        counter=counter,
        layer_type=_layer_type(module),
        layer=int(layer.group(1)) if layer else None,
        operation=record.name.phase,
        quant_type=_quant_type(record, run_format),
        tensor=_tensor(record),
    )


def _layer_type(module: str) -> str:
    if _CORE.search(module):
        return "attention"
    if _LINEAR.search(module):
        return "linear"
    words = [word for word in module.split(".") if not word.isdigit()]
    word = "layer" if words[-1:] == ["layers"] else "".join(words[-1:])
    plain = re.sub(r"[^A-Za-z0-9]", "", word)[:40]
    return plain if plain[:1].isalpha() else "module"


def _quant_type(record: TensorRecord, run_format: str | None) -> str:
    word = record.format.name if record.format else run_format
    return _dashed(word or _DTYPES.get(record.dtype, record.dtype))[:40]


def _tensor(record: TensorRecord) -> str:
    name = record.name
    word = _OLD_TENSORS.get(name.phase, {}).get(name.tensor, name.tensor)
    return _dashed(word)[:80] + ("-sample" if record.values == "sample" else "")


def _dashed(word: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "-", word)


def parse(file_name: str) -> OldName | None:
    """The fields of a file name, or `None` when it is no name of this layout."""
    found = _FILE.fullmatch(file_name)
    if found is None:
        return None
    fields = found.groupdict()
    layer, rank = fields["layer"], fields["rank"]
    return OldName(
        timestamp=fields["timestamp"],
        counter=int(fields["counter"]),
        layer_type=fields["layer_type"],
        layer=None if layer is None else int(layer),
        operation=fields["operation"],
        quant_type=fields["quant_type"],
        tensor=fields["tensor"],
        rank=None if rank is None else int(rank),
        step=int(fields["step"] or 0),
        microbatch=int(fields["microbatch"] or 0),
    )


def canonical(old: OldName) -> TensorName:
    """What a file name alone tells, and nothing it does not.

    `attention_L0` is `layers.0.attn.core`. Which linear `linear_L1` is cannot be known, so it is
    `layers.1.linear`, which is no canonical module. Both traditions of naming gradients are
    understood: `input` and `grad_output`, `output` and `grad_input`.
    """
    return TensorName(_module(old), old.operation, _canonical_tensor(old))


def _module(old: OldName) -> str:
    if old.layer is None:
        return _OUTSIDE.get(old.layer_type, old.layer_type)
    inner = _IN_A_LAYER.get(old.layer_type, old.layer_type)
    return f"layers.{old.layer}.{inner}".rstrip(".")


def _canonical_tensor(old: OldName) -> str:
    word = re.sub(r"-(\d+)$", r".\1", old.tensor).replace("-", "_")
    attention = old.layer_type == "attention"
    if old.operation == "backward":
        word = _GIVEN_AND_GIVES.get(word, word)
        return "grad_context" if attention and word == "grad_output" else word
    if old.operation == "forward" and attention and word == "output":
        return "context"
    return word
