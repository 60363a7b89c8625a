"""A model of one's own, small and Llama-shaped: two checkpoints, SAEs, texts and a task, and the README's profile of them."""

import json
import re
from dataclasses import replace

import pandas as pd
import torch
import yaml
from conftest import ROOT
from rungs import with_small

from stetholib import profiles
from stetholib.adapters import saes as adapter
from stetholib.commands import fabricate
from stetholib.data.mini import stories
from stetholib.models import loading, streams, weights

TASK = """
task: mine
output_type: generate_until
test_split: test
doc_to_text: "Q: {{problem}}\\nA:"
doc_to_target: "{{solution}}"
generation_kwargs: {until: ["\\n", "Q:"], do_sample: false}
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: "(-?[0-9]+)"}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def checkpoints(folder):
    """An untrained Llama of four blocks with a tokenizer, and a second one that differs a little in every block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(vocab_size=1024, bos_token_id=2, eos_token_id=1, pad_token_id=0, initializer_range=0.2, **shape)
    model = LlamaForCausalLM(config)
    for name in ("base", "finetuned"):
        model.save_pretrained(folder / name)
        fabricate.tokenizer(folder / name, 1000)
        with torch.no_grad():
            for weight in weights.edit_weights(model).values():
                weight.add_(0.02 * torch.randn_like(weight))


def opening(folder, *marks, bos="<bos>"):
    """Make a saved tokenizer open every text with these marks, and call `bos` its BOS, which many have and never add."""
    for name, change in (
        (
            "tokenizer.json",
            lambda said: said["post_processor"].update(single=[*map(_mark, marks), {"Sequence": {"id": "A", "type_id": 0}}]),
        ),
        ("tokenizer_config.json", lambda said: said.update(bos_token=bos)),
    ):
        said = json.loads((folder / name).read_text())
        change(said)
        (folder / name).write_text(json.dumps(said))


def _mark(name):
    return {"SpecialToken": {"id": name, "type_id": 0}}


def texts(folder):
    for subject, sign in (("sums", "+"), ("products", "*")):
        for split, start in (("train", 0), ("test", 200)):
            rows = [(f"What is {i} {sign} {i % 7}?", f"It is {eval(f'{i} {sign} {i % 7}')}.") for i in range(start, start + 40)]
            fabricate._parquet(
                pd.DataFrame(rows, columns=["problem", "solution"]), folder / "problems" / subject / f"{split}-0.parquet"
            )
    rows = pd.DataFrame({"text": [" ".join(stories.generate(3, i, "validation")) for i in range(120)]})
    fabricate._parquet(rows, folder / "general" / "data" / "validation-0.parquet")


def saes(folder):
    """SAEs trained and saved by SAELens itself, one folder a block."""
    base = loading.load(folder / "base")
    pairs = [(ids, 1) for ids, _ in streams.tokenize(base, [("", text) for text in read()], 160)]
    spec = replace(profiles.load("smoke").sae, d_sae=128, k=9, training_tokens=8192)
    for layer, x in streams.collected(base, pairs, 2048, range(4)).items():
        adapter.train(x, spec, layer, folder / "saes" / f"block_{layer}")


def read():
    """Stories and sums in turn."""
    sums = [" ".join(f"What is {i} + {i % 7}? It is {i + i % 7}." for i in range(at, at + 6)) for at in range(60)]
    return [text for both in zip(stories.generate(60, 1, "train"), sums, strict=True) for text in both]


def profile():
    """The README's example, word for word, with small budgets for what it leaves open."""
    return with_small(yaml.safe_load(re.search(r"```yaml\n(extends:.*?)```", (ROOT / "README.md").read_text(), re.S)[1]))


def world(folder):
    """All of it below `folder/mine`, as the README's paths say."""
    mine = folder / "mine"
    checkpoints(mine), texts(mine), saes(mine)
    (mine / "task.yaml").write_text(TASK)
    return folder
