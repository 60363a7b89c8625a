"""The stethoscope without a profile: against an independent computation, and what it refuses."""

import os
import re
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
import toys
from conftest import ROOT

from stetholib.adapters import saes
from stetholib.data.mini import stories
from stetholib.errors import UserError
from stetholib.listening import listen
from stetholib.models import loading

MATHS = [f"What is {i} + {i % 7}? It is {i + i % 7}." for i in range(60)]
GENERAL = list(stories.generate(50, 3, "validation"))
SMALL = dict(permutations=99, resamples=20, max_tokens=64, matched_minimum=2)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A model of one's own with SAEs: (folder, model, tokenizer, SAEs of SAELens by layer)."""
    folder = tmp_path_factory.mktemp("listen")
    toys.checkpoints(folder), toys.saes(folder)
    base = loading.load(folder / "base")
    return folder, base.model, base.tokenizer, {layer: saes.load(folder / "saes" / f"block_{layer}") for layer in range(4)}


@pytest.fixture(scope="module")
def table(mine):
    return listen(*mine[1:], MATHS, GENERAL, **SMALL)


def by_hand(model, tokenizer, sae, layer):
    """The mean of the ten largest Cohen's d, from every token's activation by transformers and SAELens alone."""
    heard = []
    for texts in (MATHS, GENERAL):
        parts = []
        for text in texts:
            ids = torch.tensor([tokenizer(text).input_ids[:64]])
            with torch.no_grad():
                states = model.model(ids, output_hidden_states=True).hidden_states if layer < 3 else None
            if states is not None:
                parts.append(sae.encode(states[layer + 1][0, 1:]).detach().double().numpy())
        heard.append(np.concatenate(parts))
    first, second = heard
    pooled = np.sqrt((first.var(0) + second.var(0)) / 2 + 1e-6)
    fires = np.maximum((first > 0).mean(0), (second > 0).mean(0)) >= 0.001
    d = (first.mean(0) - second.mean(0)) / pooled
    return np.sort(d[fires])[-10:].mean()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layers_score_is_that_of_plain_transformers_and_saelens(mine, table, layer):
    _, model, tokenizer, instruments = mine
    row = table.query("contrast == 'corpus' and layer == @layer").iloc[0]
    assert row["score"] == pytest.approx(by_hand(model, tokenizer, instruments[layer], layer), rel=1e-3)


def test_the_table_has_a_row_a_layer_and_contrast_with_its_null(table):
    assert table.groupby("contrast")["layer"].apply(list).to_dict() == {"corpus": [0, 1, 2, 3], "matched": [0, 1, 2, 3]}
    assert table.groupby("contrast")["selected"].sum().tolist() == [1, 1]
    corpus = table[table["contrast"] == "corpus"]
    assert (corpus["p_max"] == 0.01).all() and corpus["selection_share"].sum() == pytest.approx(1)
    chosen = corpus.loc[corpus["selected"] == 1, "score"].item()
    assert chosen == corpus["score"].max() and (corpus["fvu"] < 1).all()


def test_without_a_bos_the_first_word_is_not_heard_and_scores_are_still_those_of_plain_transformers(tmp_path):
    toys.checkpoints(tmp_path), toys.opening(tmp_path / "base", bos=None), toys.saes(tmp_path)
    base, sae = loading.load(tmp_path / "base"), saes.load(tmp_path / "saes" / "block_1")
    found = listen(base.model, base.tokenizer, {1: sae}, MATHS, GENERAL, **SMALL).set_index("contrast")
    assert found.loc["corpus", "score"] == pytest.approx(by_hand(base.model, base.tokenizer, sae, 1), rel=1e-3)
    with_a_word = listen(base.model, base.tokenizer, {1: sae}, [*MATHS, "A"], GENERAL, **SMALL).set_index("contrast")
    for contrast in ("corpus", "matched"):
        assert with_a_word.loc[contrast, "score"] == pytest.approx(found.loc[contrast, "score"], rel=1e-5)
    with pytest.raises(UserError, match="have one token each.*give longer ones"):
        listen(base.model, base.tokenizer, {1: sae}, MATHS, ["A", "B"], **SMALL)


def test_texts_of_one_kind_on_both_sides_are_not_told_apart(mine):
    found = listen(*mine[1:], GENERAL[::2], GENERAL[1::2], **SMALL)
    assert found["p_max"].min() > 0.01


def test_groups_that_fit_into_less_memory_and_some_layers_alone_give_the_same(mine, table):
    _, model, tokenizer, instruments = mine
    pd.testing.assert_frame_equal(listen(model, tokenizer, instruments, MATHS, GENERAL, memory_gib=1e-6, **SMALL), table)
    two = listen(model, tokenizer, {layer: instruments[layer] for layer in (3, 1)}, MATHS, GENERAL, **SMALL)
    assert two["layer"].tolist() == [1, 3] * 2
    columns = ["layer", "contrast", "l0", "fvu", "refused", "score", "score_random"]
    alike = table[table["layer"].isin([1, 3])].reset_index(drop=True)
    pd.testing.assert_frame_equal(two[columns], alike[columns])


def test_the_readmes_lines_run_as_they_stand(mine, table, tmp_path, monkeypatch):
    (tmp_path / "mine").symlink_to(mine[0])
    for name, texts in (("maths", MATHS), ("general", GENERAL)):
        (mine[0] / f"{name}.txt").write_text("\n".join(texts))
    lines = re.search(r"```python\n(from pathlib.*?)```", (ROOT / "stetholib" / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(lines, found := {})
    assert found["table"]["layer"].tolist() == table["layer"].tolist() and found["table"]["selected"].sum() == 2


def test_what_cannot_be_listened_to_is_refused(mine):
    _, model, tokenizer, instruments = mine
    elsewhere = deepcopy(instruments[0])
    elsewhere.cfg.metadata.hook_name = "blocks.0.hook_mlp_out"
    for layers, maths, general, said in (
        ({}, MATHS, GENERAL, "SAEs are given for layers \\[\\]"),
        ({4: instruments[0]}, MATHS, GENERAL, "the model has 4"),
        (instruments, "one text", GENERAL, "maths must be a list"),
        (instruments, MATHS, ["", "a"], "general must be a list"),
        ({0: elsewhere}, MATHS, GENERAL, "layer 0: it says that it reads blocks.0.hook_mlp_out; the output of block 0"),
        ({0: instruments[3]}, MATHS, GENERAL, "better than its own|features fire"),
    ):
        with pytest.raises(UserError, match=said):
            listen(model, tokenizer, layers, maths, general, **SMALL)
    model.train()
    try:
        with pytest.raises(UserError, match="training mode"):
            listen(model, tokenizer, instruments, MATHS, GENERAL, **SMALL)
    finally:
        model.eval()


def test_a_shell_gives_the_same_table_and_one_line_for_what_is_wrong(mine, tmp_path):
    folder, model, tokenizer, instruments = mine
    (tmp_path / "maths.txt").write_text("\n".join(MATHS))
    pd.DataFrame({"text": GENERAL}).to_json(tmp_path / "general.jsonl", orient="records", lines=True)

    def shell(**changed):
        asked = dict(model=folder / "base", saes=folder / "saes", sae_id="block_{layer}")
        asked |= dict(maths="maths.txt", general="general.jsonl", into="table.csv") | changed
        options = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-m", "stetholib", "listen", *options]
        return subprocess.run(command, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)

    done = shell()
    assert done.returncode == 0, done.stderr
    written = pd.read_csv(tmp_path / "table.csv")
    ours = listen(model, tokenizer, instruments, MATHS, GENERAL)
    assert np.allclose(written["score"], ours["score"], rtol=1e-5) and done.stdout.count("corpus") == 4
    for changed, said in (
        (dict(maths="none.txt"), "no file of texts"),
        (dict(general="maths.txt.csv"), "no file of texts"),
        (dict(sae_id="block_3"), "must hold {layer}"),
        (dict(sae_id="layer_{layer}"), "no other block's"),
        (dict(into="nowhere/table.csv"), "no folder"),
    ):
        failed = shell(**changed)
        assert failed.returncode == 2 and said in failed.stderr and failed.stderr.count("\n") == 1
