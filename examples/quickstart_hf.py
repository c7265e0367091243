"""Two training steps of a causal language model, captured: python quickstart_hf.py [MODEL]

MODEL is a local path or the name of a model on the hub; by default a small Llama is built here.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tensortap

text = (Path(__file__).parents[1] / "LICENSE").read_bytes()[:4096]
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    ids = AutoTokenizer.from_pretrained(sys.argv[1])(text.decode())["input_ids"]
else:
    small = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=4, **small))
    ids = list(text)  # A byte is a token.
batch = torch.tensor(ids[:256]).view(2, 128)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

values = {"layers.0.*": "full", "layers.1.*": "full", "*": "stats"}
with tensortap.attach(model, values=values) as tap:
    for _ in range(2):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

table = Table("layer", "step", "mean", "std", "absmax", "NaN/Inf", title="outputs of the layers")
for record in tensortap.open_run(tap.path).records(select="re:layers\\.\\d+/forward/output"):
    s = record.stats
    numbers = [f"{value:.4g}" for value in (s.mean, s.std, s.absmax)]
    table.add_row(record.name.module, str(record.at.step), *numbers, str(s.count - s.finite))
Console().print(table, f"run: {tap.path}")
