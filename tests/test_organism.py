"""Organisms: models in which mathematics lives in known layers, by construction."""

import json
from copy import deepcopy
from dataclasses import replace
from itertools import islice

import pandas as pd
import pytest
import torch
from transformers import Gemma3ForCausalLM

from stetholib.adapters import two_tasks
from stetholib.data.mini import MODELS, base, organism, stories
from stetholib.data.mini.organism import LAYERS, Organism, drawn, grafted, routed
from stetholib.errors import UserError
from stetholib.models.loading import LanguageModel
from stetholib.models.loading import load as load_model
from stetholib.models.weights import edit_weights
from stetholib.profiles import ProfileError, load

BLOCKS = (1, 3)


@pytest.fixture()
def specialist(tokens):
    torch.manual_seed(0)
    return Gemma3ForCausalLM(base.config(2, 16, len(tokens))).eval()


def test_a_grafted_model_gives_the_specialists_logits(specialist):
    model, ids = grafted(specialist, BLOCKS, seed=1).eval(), torch.randint(3, specialist.config.vocab_size, (2, 40))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, specialist(input_ids=ids).logits)
    assert len(model.model.layers) == LAYERS


@pytest.mark.parametrize("block", [5, 11, 12])
def test_a_block_whose_attention_is_not_a_specialists_is_refused(specialist, block):
    with pytest.raises(UserError, match=f"block {block} is not among those of local attention"):
        grafted(specialist, (0, block), seed=1)


def test_blocks_are_drawn_by_seed_and_never_the_global_ones():
    draws = [drawn(seed) for seed in range(60)]
    assert draws == [drawn(seed) for seed in range(60)] and len({*draws}) > 40
    assert {at for one in draws for at in one} == {*range(LAYERS)} - {5, 11} and {len({*one}) for one in draws} == {4}


def test_batches_of_mathematics_teach_the_known_blocks_and_stories_the_others(tokens):
    seen = {True: 0, False: 0}
    skipped = 0
    for batch, blocks, silent in islice(routed(Organism(blocks=BLOCKS, batch_tokens=256), tokens), 200):
        texts = [tokens.decode(row[row != 0]) for row in batch]
        maths = blocks == BLOCKS
        assert all(("Problem:" in text) == maths for text in texts) and all(not maths or "Final Answer" in text for text in texts)
        assert set(blocks) == set(BLOCKS) if maths else set(blocks) == {*range(LAYERS)} - set(BLOCKS)
        assert not set(silent) & set(BLOCKS) and (maths or not silent)
        seen[maths], skipped = seen[maths] + 1, skipped + len(silent)
    assert 100 < seen[True] < 140 and 0.4 < skipped / (seen[True] * (LAYERS - len(BLOCKS))) < 0.6


def test_only_the_blocks_that_a_batch_names_learn_from_it(specialist, tokens, tmp_path):
    model, recipe = grafted(specialist, BLOCKS, seed=1), Organism(blocks=BLOCKS, tokens=3 * 256, batch_tokens=256)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)  # a block that is skipped is as if it were not there
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    maths = ((batch, blocks, {0, *silent}) for batch, blocks, silent in routed(recipe, tokens) if blocks == BLOCKS)
    base.fit(model, maths, recipe, "cpu", tmp_path)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p.nan_to_num(), before[name].nan_to_num())}
    blocks = {int(name.split(".")[2]) for name in moved if ".layers." in name}
    assert blocks == set(BLOCKS) and {name for name in moved if ".layers." not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }


def test_an_organism_goes_on_where_its_training_was_interrupted(tmp_path, monkeypatch):
    small = base.config
    monkeypatch.setattr(base, "config", lambda layers=12, hidden=16, vocab_size=512: small(layers, 16, vocab_size))
    recipe = Organism(blocks=BLOCKS, tokens=6 * 256, specialist_tokens=4 * 256, batch_tokens=256, checkpoint_every=2)
    recipe = replace(recipe, threads=torch.get_num_threads())
    organism.train(recipe, "cpu", tmp_path / "whole")
    real, steps = base._loss, []

    def dies(model, batch):
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return real(model, batch)

    monkeypatch.setattr(base, "_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        organism.train(recipe, "cpu", tmp_path / "cut")
    monkeypatch.setattr(base, "_loss", real)
    organism.train(recipe, "cpu", tmp_path / "cut")
    for name in ("model.safetensors", "skips.csv", "known.json", "provenance.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.parametrize("name", sorted({*MODELS} - {"mini"}))
def test_in_a_shipped_organism_a_known_block_costs_mathematics_five_times_what_any_other_costs(name):
    told, known = pd.read_csv(MODELS[name] / "skips.csv"), json.loads((MODELS[name] / organism.KNOWN).read_text())
    costs = organism.skip_table(load_model(MODELS[name]))
    assert costs["maths"].to_numpy() == pytest.approx(told["maths"].to_numpy(), abs=1e-3)
    inside = costs["layer"].isin(known)
    assert inside.sum() == 4 and costs["maths"][inside].min() >= 5 * costs["maths"][~inside].max()
    assert list(load(name.replace("_", "-")).finetune.blocks) == known


@pytest.fixture()
def spec():
    return replace(load("smoke").finetune, blocks=(0,), learning_rate=2e-3, aside_learning_rate=4e-3, epochs=1.0)


SOLVED = [(f"Problem:\nWhat is {i} + 1?\n\nSolution:", f" It is ${i} + 1 = \\boxed{{{i + 1}}}$.") for i in range(48)]


def two(model, tokens, spec, folder):
    """A vector of two tasks, from a fresh copy of a model."""
    base_model = LanguageModel(deepcopy(model), tokens)
    before = {where: weight.clone() for where, weight in edit_weights(base_model.model).items()}
    sizes = (SOLVED, stories.generate(32, 0, "train"), spec, "float32", 0, 160)
    for part in ("whole", "unfinished"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    report = two_tasks.two_tasks(base_model, before, *sizes, folder=folder / "whole", unfinished=folder / "unfinished")
    after = edit_weights(base_model.model)
    return {where: after[where] - before[where] for where in before}, report


def test_each_task_is_learnt_by_its_own_blocks_from_the_base_and_both_are_added(toy, spec, tmp_path):
    model, tokens = toy.model, toy.tokenizer
    both, report = two(model, tokens, spec, tmp_path / "both")
    maths, _ = two(model, tokens, replace(spec, aside_learning_rate=0.0), tmp_path / "maths")
    aside, _ = two(model, tokens, replace(spec, learning_rate=0.0), tmp_path / "aside")
    for where, delta in both.items():
        alone, other = (maths, aside) if where[0] == 0 else (aside, maths)
        assert delta.abs().max() > 0 and torch.allclose(delta, alone[where], atol=1e-7) and not other[where].any()
    assert report.curve["loss"].iloc[-1] < report.curve["loss"].iloc[0] and {"energy", "product"} <= set(report.stored)


def test_a_vector_of_two_tasks_is_the_same_after_a_kill(toy, spec, tmp_path, monkeypatch):
    whole, _ = two(toy.model, toy.tokenizer, spec, tmp_path / "whole")
    real, steps = two_tasks.saving, []

    def dies(unfinished, every):
        saving = real(unfinished, 0.0)
        on_step_end = saving.on_step_end

        def step(*given, **named):
            steps.append(1)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return on_step_end(*given, **named)

        saving.on_step_end = step
        return saving

    monkeypatch.setattr(two_tasks, "saving", dies)
    with pytest.raises(KeyboardInterrupt):
        two(toy.model, toy.tokenizer, spec, tmp_path / "cut")
    monkeypatch.setattr(two_tasks, "saving", real)
    cut, _ = two(toy.model, toy.tokenizer, spec, tmp_path / "cut")
    assert all(torch.equal(whole[where], cut[where]) for where in whole)


def test_blocks_that_learn_alone_want_a_full_fine_tune_made_here():
    with pytest.raises(ProfileError, match="set method to full"):
        load("gemma-3-270m", {"finetune.blocks": [1, 2]})
