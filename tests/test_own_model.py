"""The README's profile of a model of one's own, word for word, on a Llama-shaped toy. Slow."""

import re

import pandas as pd
import pytest
import torch
from conftest import ROOT
from rungs import SMALL, environment, reproduce

from stetholib import fabricate, models, sae_features
from stetholib.mini import stories
from stetholib.workspace import CONTRACTS

pytestmark = pytest.mark.slow
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
        fabricate.tokenizer(folder / name)
        with torch.no_grad():
            for weight in models.edit_weights(model).values():
                weight.add_(0.02 * torch.randn_like(weight))


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
    """SAEs saved by SAELens itself, one folder a block, fitted to each block's activations."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    base = models.load(folder / "base")
    pairs = [(ids, 1) for ids, _ in models.tokenize(base, [("", text) for text in stories.generate(60, 1, "train")], 160)]
    for layer, x in fabricate._activations(base, pairs).items():
        one = sae_features.random_dictionary(x, 128, 9.0, layer)
        made = JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=128, apply_b_dec_to_input=False))
        made.load_state_dict({name: tensor.contiguous() for name, tensor in vars(one).items()})
        made.save_model(folder / "saes" / f"block_{layer}")


def test_the_readmes_profile_of_ones_own_model_runs_through_all_six_notebooks(tmp_path):
    import yaml

    mine = tmp_path / "mine"
    checkpoints(mine), texts(mine), saes(mine)
    (mine / "task.yaml").write_text(TASK)
    profile = yaml.safe_load(re.search(r"```yaml\n(extends:.*?)```", (ROOT / "README.md").read_text(), re.S)[1])
    for section, sizes in SMALL.items():  # small budgets; nothing that the README's example says is changed
        profile[section] = sizes | profile.get(section, {}) if isinstance(sizes, dict) else sizes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(profile))
    env = environment(tmp_path, "http://127.0.0.1:9", tmp_path / "cache", token=None)
    done = reproduce(tmp_path, "mine.yaml", env)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "figures" / "mine"
    assert {path.stem for path in made.glob("*.csv")} == set(CONTRACTS)
    accuracy = pd.read_csv(made / "05_minerva_math.csv").set_index(["variant", "subject"])
    assert set(accuracy.loc["base"].index) == {"all", "sums", "products"} and accuracy.loc[("full", "sums"), "n"] == 8
    ledger = pd.read_csv(made / "06_claims.csv").set_index("claim")
    assert set(ledger.loc[["C4", "C5"], "verdict"]) == {"not testable"} and ledger.loc["C8", "verdict"] == "consistent"
    features = pd.read_csv(made / "02_sae_features.csv")
    assert set(features["d_sae"]) == {128} and len(features) == 8
