"""An instrument is believed only after a test that it could have failed: what is noise, or of another place, is refused."""

import re
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from math import nan

import numpy as np
import pandas as pd
import pytest
import runs
import torch
import toys

from stetholib import layer_selection, profiles, sae_features
from stetholib.adapters import saes
from stetholib.belief import Declared, check_enough, refusals
from stetholib.errors import UserError
from stetholib.layer_selection import plain_scores, score_layers, spearman
from stetholib.layer_sets import planned_sets, select
from stetholib.minerva_math import NEEDED, variants
from stetholib.models import loading, streams
from stetholib.sae_features import Listening, ScoreRule, change_score, hear, hear_again

SOUND = dict(fvu=0.09, fvu_random=0.5, l0=9.0, l0_random=9.0, largest=3.0, fvu_here=0.2, fvu_neighbour=0.3)
TRAINED, FETCHED = Declared.trained(6, 8), Declared(dict.fromkeys(range(6), 8.0))


def self_tests(**changed):
    """Six sound layers, the third of which is changed."""
    if "l0" in changed:
        changed.setdefault("l0_random", changed["l0"])
    return pd.DataFrame([dict(layer=layer) | SOUND | (changed if layer == 2 else {}) for layer in range(6)])


CASES = {  # what is wrong -> (the third layer's self-test, whose SAEs, the reason)
    "it says nothing": (dict(largest=0.0, l0=0.0), TRAINED, "no feature fires on these texts"),
    "worse than the mean": (dict(fvu=4.2, fvu_random=9.0), TRAINED, "it leaves 4.20 of the variance unexplained, the mean leaves 1"),
    "as good as chance": (dict(fvu=0.5), TRAINED, "it leaves 0.50 of the variance unexplained, .* a random dictionary of its L0 0.50"),
    "not a number": (dict(fvu=nan), FETCHED, "it leaves nan of the variance"),
    "a random dictionary of another L0": (dict(l0_random=8.7), TRAINED, "9.0 features fire a token, 8.7 of a random dictionary at most"),
    "another L0 than k": (dict(l0=16.5), TRAINED, "16.5 features fire a token, 8 are declared"),
    "another L0 than the registry's": (dict(l0=2.6), FETCHED, "2.6 features fire a token, 8 are declared"),
    "a neighbour's": (dict(fvu_here=0.4), FETCHED, r"it explains a layer beside it better than its own \(unexplained 0.30 against 0.40\)"),
    "after the final norm": (dict(l0=45.0, fvu=0.29), Declared(), "it stands apart from the layers beside it .L0 45.0 against 9.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_layer_that_cannot_be_believed_is_refused_alone_and_with_its_reason(name):
    changed, declared, reason = CASES[name]
    found = refusals(self_tests(**changed), declared)
    assert list(found) == [2] and pd.Series(found[2]).str.fullmatch(f".*{reason}.*").all(), found


def test_what_may_be_so_is_believed():
    """L0 within its factor, denser or less explained than its neighbours but not both, a trained SAE that a neighbour's stream is easy
    for, and the last layer."""
    for changed, declared in (
        ({}, TRAINED),
        (dict(l0=15.9), TRAINED),
        (dict(l0=23.0), FETCHED),
        (dict(l0=45.0), Declared()),
        (dict(fvu=0.4), Declared()),
        (dict(fvu_here=0.4), TRAINED),
    ):
        assert refusals(self_tests(**changed), declared) == {}


def test_a_run_stops_where_fewer_than_two_thirds_pass_and_says_what_to_do():
    check_enough({1: "a"}, 3, TRAINED)
    check_enough({}, 1, TRAINED)
    with pytest.raises(
        UserError, match=r"SAEs of 2 of 5 layers cannot be believed; layer 1: noise; train on more tokens \(sae.train"
    ):
        check_enough({1: "noise", 4: "b"}, 5, TRAINED)
    with pytest.raises(UserError, match="cannot be believed; layer 0: noise; mend sae.release or sae.sae_id"):
        check_enough({0: "noise"}, 1, FETCHED)


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """what four layers hear, layer 2 with another dictionary; over SAEs that were trained on a toy's own streams."""
    mine, folder = toys.world(tmp_path_factory.mktemp("toy")) / "mine", tmp_path_factory.mktemp("saes")
    base = loading.load(mine / "base")
    texts = toys.stories.generate(120, 1, "train")
    pairs = [(ids, 1) for ids, _ in streams.tokenize(base, [("", text) for text in texts], 160)]
    spec = replace(profiles.load("smoke").sae, d_sae=96, k=8, training_tokens=8192, batch_size=16, learning_rate=0.01)
    found = {}
    for layer, x in streams.collected(base, pairs, 2048, range(4)).items():
        saes.train(x, spec, layer, folder / str(layer))
        found[layer] = saes.dictionary(saes.load(folder / str(layer)))
    listening = Listening(texts, [0] * 60 + [1] * 60, 160, 2048, 2, 0, 1, {layer: layer for layer in range(4)})

    @cache
    def one(change=lambda own, _: own):
        return hear(base, listening, found | {2: change(found[2], found)}, ScoreRule(minimum=3), range(4))

    one.known = base, listening, found
    return one


def test_what_saes_hear_of_the_same_model_again_is_the_same_and_of_a_changed_one_its_change(heard):
    (base, listening, found), rule, maths = heard.known, ScoreRule(minimum=3), torch.arange(120) < 60
    before, tests = heard(), heard().tests
    same = hear_again(base, listening, found, tests, range(4))
    for layer in range(4):
        known = before.sums[f"corpus.{layer}"]
        assert torch.allclose(same[layer].total, known.total[:60], atol=1e-3)
        assert change_score(known, same[layer], maths, rule) == pytest.approx(0, abs=1e-3)
    tuned = deepcopy(base)
    with torch.no_grad():
        tuned.model.model.layers[2].mlp.down_proj.weight.add_(0.5 * torch.randn(32, 64))
    scores = [
        change_score(before.sums[f"corpus.{layer}"], one, maths, rule)
        for layer, one in hear_again(tuned, listening, found, tests, range(4)).items()
    ]
    assert scores[0] == pytest.approx(0, abs=1e-3) and scores[1] == pytest.approx(0, abs=1e-3) and min(scores[2:]) > 0.1
    assert change_score(known, same[3], maths, replace(rule, kind="auroc")) == pytest.approx(0, abs=1e-3)


NOISE = {
    "untrained": lambda one, _: replace(one, **{n: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in vars(one).items()}),
    "shuffled": lambda one, _: replace(one, W_dec=one.W_dec[torch.randperm(96, generator=torch.Generator().manual_seed(1))]),
    "of another layer": lambda one, every: every[0],
    "of another scale": lambda one, _: replace(one, W_enc=30 * one.W_enc, b_enc=30 * one.b_enc),
    "silent": lambda one, _: replace(one, threshold=one.threshold + 1e6),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISE)
def test_an_instrument_that_is_noise_is_refused_and_a_trained_one_is_not(heard, kind):
    assert refusals(heard().tests, Declared.trained(4, 8)) == {}
    found = heard(NOISE[kind])
    assert list(refusals(found.tests, Declared.trained(4, 8))) == [2], found.tests
    check_enough(refusals(found.tests, Declared.trained(4, 8)), 4, TRAINED)


def test_a_refused_layer_has_no_score_is_never_selected_and_no_chance_draws_it(heard):
    found, rule = heard(NOISE["shuffled"]), ScoreRule(minimum=3)
    corpus_of = torch.tensor([0] * 60 + [1] * 60)
    whole = [found.sums[f"corpus.{layer}"] for layer in range(4)]
    part = [None if layer == 2 else one for layer, one in enumerate(whole)]
    every, scores = (score_layers(one, corpus_of, rule, False, 2, 20, 10, 0) for one in (whole, part))
    for name, values in asdict(scores).items():
        assert np.isnan(values[2]).all(), name
        if name not in ("p_max", "selection_share"):
            assert np.array_equal(np.delete(values, 2, 0), np.delete(getattr(every, name), 2, 0)), name
    assert 2 not in select(scores.score, 3) and 2 not in select(-scores.score, 3)
    assert np.isnan(plain_scores(part, corpus_of, rule, False)[2])
    with pytest.raises(UserError, match="4 layers are wanted but 3 have a score"):
        select(scores.score, 4)
    plan = planned_sets({"stethoscope": ("corpus", (0, 1))}, np.ones(4), [0, 1, 3], 9, 0)
    assert sorted(one.layers for one in plan if one.selector == "random") == [(0, 1), (0, 3), (1, 3)]
    specific = list(sae_features.specificities(part, corpus_of, "cohen_d", 0.0, False))
    table = sae_features.measure(found.tests, {"corpus": specific, "matched": specific}, {2: "noise"})
    row = table[table["layer"] == 2].iloc[0]
    assert row["refused"] == "noise" and row["top_feature"] == -1 and (table[table["layer"] != 2]["refused"] == "").all()
    assert "**1 of 4 SAEs cannot be believed**, and their layers are left out" in sae_features.summary(table)
    assert 2 not in [layer for layer, _ in sae_features.best_features(table).values()]


def test_layers_without_a_score_do_not_count_in_a_correlation():
    x, y = [1.0, nan, 2.0, 3.0, 5.0], [2.0, 9.0, 1.0, 4.0, 8.0]
    some = [one for one in zip(x, y, strict=True) if one[0] == one[0]]
    assert spearman(x, y) == spearman(*zip(*some, strict=True))
    depth = np.array([2.0, 0.0, 4.0, 1.0, 3.0])
    kept = layer_selection.partial_spearman(*zip(*some, strict=True), [np.delete(depth, 1)])
    assert layer_selection.partial_spearman(x, y, [depth]) == kept == kept


def test_the_scalpel_and_its_controls_are_of_the_layers_that_can_be_believed():
    chosen = dict.fromkeys(("stethoscope", "stethoscope_matched", "least_specific", "largest_norm"), (2,))
    found = variants(3, [0, 2], chosen, [(0,)], [*NEEDED, "scalpel_rescaled", "raw_shrunk"], 0.5)
    assert {found[name].layers for name in ("scalpel", "scalpel_rescaled", "raw_shrunk")} == {(0, 2)}
    assert found["full"].layers == found["full_shrunk"].layers == (0, 1, 2)
    with pytest.raises(UserError, match="unknown variant 'random_2', since 2 layers make 1 random sets"):
        variants(3, [0, 2], chosen, [(0,)], [*NEEDED, "random_2"], 0.5)


SPOILT = """
    if layer == 1:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "sae_weights.safetensors")
        save_file(tensors | {"W_dec": tensors["W_dec"].flip(0).contiguous()}, folder / "sae_weights.safetensors")
    return curve
"""


@pytest.mark.slow
def test_all_six_notebooks_leave_out_a_layer_whose_sae_is_noise_and_say_so(tmp_path):
    folder, starts, ends = runs.clone(tmp_path), "return train(heard[layer]", 'hook_resid_post", model_name=model)\n'
    module = folder / "stetholib" / "adapters" / "saes.py"
    assert module.read_text().count(starts) == module.read_text().count(ends) == 1
    module.write_text(module.read_text().replace(starts, starts.replace("return", "curve =")).replace(ends, ends + SPOILT))
    profile = folder / "stetholib" / "profiles" / "smoke.yaml"  # two layers make two random sets
    profile.write_text(re.sub(r",? *random_3|.*- random_3\n", "", profile.read_text()))
    runs.run(folder)
    read = lambda stem: pd.read_csv(folder / "figures" / "smoke" / f"{stem}.csv").set_index("layer")  # noqa: E731
    features, scores = read("02_sae_features"), read("04_layer_selection")
    assert (
        features.loc[1, "refused"].str.contains("of the variance unexplained").all()
        and features.loc[[0, 2], "refused"].isna().all()
    )
    assert (
        scores.loc[1, "score"].isna().all()
        and (scores.loc[1, "selected"] == 0).all()
        and scores.loc[[0, 2], "score"].notna().all()
    )
    assert set(read("03_subspace_projection").index) == {0, 2}
    sets = pd.read_csv(folder / "figures" / "smoke" / "04_layer_sets.csv").astype({"layers": str})
    assert set(sets[sets["selector"] == "random"]["layers"]) == {"0", "2"}
    said = (folder / "runs" / "smoke" / "notebooks" / "02_sae_features.ipynb").read_text()
    assert "**1 of 3 SAEs cannot be believed**" in said and len(pd.read_csv(folder / "figures" / "smoke" / "06_claims.csv")) > 9
