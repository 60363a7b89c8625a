import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from scipy import stats

from stetholib import sae_features
from stetholib.adapters import saes
from stetholib.data import hub
from stetholib.errors import UserError
from stetholib.models import dictionary
from stetholib.models.dictionary import Dictionary
from stetholib.models.sums import CONTRASTS, Covariance, FeatureSums, auroc, cohen_d, firing_log_ratio, moments, one_hot
from stetholib.profiles import Sae
from stetholib.sae_features import matched_weights

SPEC = Sae(
    release="train",
    sae_id=None,
    revision=None,
    seed=0,
    d_sae=48,
    k=4,
    training_tokens=60_000,
    batch_size=256,
    learning_rate=3e-3,
    warm_up=0.0,
    frozen_decoder=False,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small SAE trained by SAELens on sparse mixtures, and its training data."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
    codes = torch.rand(8192, 24, generator=generator) * (torch.rand(8192, 24, generator=generator) < 0.1)
    x = codes @ atoms + 0.3
    folder = tmp_path_factory.mktemp("sae")
    saes.train(x, SPEC, 0, folder)
    return saes.load(folder), x


def test_our_activations_are_saelens_own(trained):
    sae, x = trained
    ours = saes.dictionary(sae)
    assert float((ours.encode(x) - sae.encode(x)).abs().max()) < 1e-5
    assert float((ours.decode(ours.encode(x)) - sae(x)).abs().max()) < 1e-4


def test_a_trained_sae_beats_a_random_dictionary_of_its_l0(trained):
    sae, x = trained
    ours = saes.dictionary(sae)
    test = dictionary.self_test(ours, x)
    zero = dictionary.random_dictionary(x, ours.d_sae, test.l0, seed=1)
    baseline = dictionary.self_test(zero, x)
    assert baseline.l0 == pytest.approx(test.l0, rel=0.02)
    assert test.fvu < 0.6 * baseline.fvu and baseline.fvu <= 1


def test_a_random_dictionary_has_the_l0_that_was_asked_for_on_all_tokens_and_not_on_the_first(monkeypatch):
    x = torch.randn(3000, 16) * torch.linspace(0.2, 3.0, 3000)[:, None] + 1  # as where texts come by length
    whole = dictionary.random_dictionary(x, 64, 9.0, seed=1)
    monkeypatch.setattr(dictionary, "CELLS", 64 * 300)  # ten parts
    parts = dictionary.random_dictionary(x, 64, 9.0, seed=1)
    assert dictionary.self_test(parts, x).l0 == pytest.approx(9.0, rel=0.02) and len(dictionary.pieces(x, 64)) == 10
    assert torch.equal(whole.threshold, parts.threshold)


def test_training_an_sae_twice_gives_the_same_bytes(tmp_path, trained):
    _, x = trained
    spec = replace(SPEC, d_sae=32, training_tokens=4096)
    for name in ("a", "b"):
        saes.train(x, spec, 7, tmp_path / name)
    files = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_training_leaves_its_curve_and_a_warm_up_is_in_it(tmp_path, trained):
    _, x = trained
    curves = [saes.train(x, replace(SPEC, warm_up=share), 0, tmp_path / f"{share}") for share in (0.0, 0.5)]
    for curve in curves:
        last = curve.iloc[-1]
        assert list(curve) == ["tokens", "fvu", "l0", "dead"] and 40 <= len(curve) <= 60
        assert last["fvu"] < 0.6 * curve["fvu"].iloc[0] and SPEC.k / 2 < last["l0"] < 2 * SPEC.k and 0 <= last["dead"] <= 1
    early = [curve.query("tokens < 5000")["fvu"].mean() for curve in curves]
    assert early[1] > 1.1 * early[0]  # the rate had not risen yet
    ours = dictionary.self_test(saes.dictionary(saes.load(tmp_path / "0.0")), x)
    assert curves[0]["fvu"].iloc[-1] == pytest.approx(ours.fvu, rel=0.4)
    assert curves[0]["l0"].iloc[-1] == pytest.approx(ours.l0, rel=0.15)


def test_a_few_massive_tokens_are_told_from_the_others():
    x = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)) + 1
    assert dictionary.ordinary(x).all() and dictionary.massive_dimensions(x) == []
    x[[7, 4000], 5] = torch.tensor([900.0, -2000.0])
    x[9, 3] = 400.0
    assert torch.nonzero(~dictionary.ordinary(x))[:, 0].tolist() == [7, 9, 4000]
    assert dictionary.massive_dimensions(x) == [5, 3]
    assert x[:, 5].var() > 0.8 * x.var(0).sum()  # which is why a plain measure speaks of them alone


def test_unsupported_saes_are_refused(trained):
    sae = deepcopy(trained[0])
    with torch.no_grad():
        sae.W_dec[0, 0] = float("inf")
    with pytest.raises(UserError, match="W_dec holds NaN or Inf"):
        saes.dictionary(sae)
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(UserError, match="normalised at inference"):
        saes.dictionary(sae)


def test_the_anchors_of_fvu():
    x = torch.randn(500, 8)
    zeros = torch.zeros(8, 4)
    mean = Dictionary(zeros, torch.zeros(4), zeros.T, x.mean(0), torch.zeros(4))
    assert dictionary.self_test(mean, x).fvu == pytest.approx(1, abs=1e-6)
    both = torch.cat([torch.eye(8), -torch.eye(8)])
    perfect = Dictionary(both.T, torch.zeros(16), both, torch.zeros(8), torch.zeros(16))
    test = dictionary.self_test(perfect, x)
    assert test.fvu == pytest.approx(0, abs=1e-10) and test.l0 == pytest.approx(8)
    with pytest.raises(UserError, match="a stream of width 8, the model's is 9"):
        dictionary.check_width(2, perfect, torch.randn(5, 9))


@pytest.mark.parametrize("sae_id", [None, "block", "block_{layer}_{width}", "block_{layer"])
def test_an_sae_id_must_name_the_layer_and_nothing_else(sae_id):
    assert saes.id_of("layer_{layer}_width_16k_l0_small", 3) == "layer_3_width_16k_l0_small"
    with pytest.raises(UserError, match="it must hold {layer}"):
        saes.id_of(sae_id, 3)


def test_a_revision_that_a_releases_loader_cannot_ask_for_is_refused():
    with pytest.raises(UserError, match="set it to null"):
        saes.load_release("gpt2-small-res-jb", "blocks.0.hook_resid_pre", "a" * 40)


def test_a_release_or_id_that_is_not_registered_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'gemma-scope-2-4b-it-res-all'"):
        saes.fetch("gemma-scope-2-4b-it-res-al", "layer_{layer}_width_16k_l0_small", 0)
    with pytest.raises(UserError, match="did you mean 'layer_3_width_16k_l0_small'"):
        saes.fetch("gemma-scope-2-4b-it-res-all", "layer_{layer}_width_16k_l0_smal", 3)
    with pytest.raises(UserError, match="must hold {layer}"):
        saes.fetch("gemma-scope-2-4b-it-res-all", "layer_3_width_16k_l0_small", 3)


def test_saes_of_a_folder_are_found_by_layer(tmp_path, trained):
    sae, x = trained
    sae.save_model(tmp_path / "block_2")
    found = saes.fetch(str(tmp_path), "block_{layer}", 2)
    assert torch.equal(found.encode(x), sae.encode(x))
    with pytest.raises(UserError, match="there is no block_3/cfg.json"):
        saes.fetch(str(tmp_path), "block_{layer}", 3)


# what an SAE says that it reads -> whether that is the output of block 2
SITES = {
    "blocks.2.hook_resid_post": True,
    "blocks.3.hook_resid_pre": True,
    "model.layers.2": True,
    "model.layers.2.output": True,
    "model.language_model.layers.2": True,
    "language_model.model.layers.2": True,
    None: True,
    "": True,
    "blocks.2.hook_resid_pre": False,
    "blocks.3.hook_resid_post": False,
    "blocks.12.hook_resid_post": False,
    "blocks.2.hook_resid_mid": False,
    "blocks.2.hook_mlp_out": False,
    "blocks.2.hook_attn_out": False,
    "blocks.2.attn.hook_z": False,
    "model.layers.1.output": False,
    "model.layers.2.mlp": False,
    "model.vision_tower.encoder.layers.2": False,
    "model.layers.2.output\nmore": False,
    "ln_final.hook_normalized": False,
    "model.norm": False,
    "hook_embed": False,
    7: False,
}


def held(ok, said, *doors):
    """Each door lets an SAE in, or refuses it in one line that says so."""
    for door in doors:
        if ok:
            door()
        else:
            with pytest.raises(UserError, match=said) as refused:
                door()
            assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


@pytest.mark.parametrize("site", SITES)
def test_an_sae_that_says_that_it_reads_another_place_is_refused_at_every_door(tmp_path, trained, monkeypatch, site):
    one = deepcopy(trained[0])
    one.cfg.metadata.hook_name = site
    one.save_model(tmp_path / "block_2")
    one.save_model(tmp_path / "old" / "block_2")
    old = tmp_path / "old" / "block_2" / "cfg.json"
    said = json.loads(old.read_text())
    old.write_text(json.dumps({key: said[key] for key in said if key != "metadata"} | ({"hook_name": site} if site else {})))
    monkeypatch.setattr(saes, "load_release", lambda *asked: one)
    held(
        SITES[site],
        r"it says that it reads .*; the output of block 2 is needed \(blocks.2.hook_resid_post\)",
        lambda: saes.fetch(str(tmp_path), "block_{layer}", 2),
        lambda: saes.fetch(str(tmp_path / "old"), "block_{layer}", 2),
        lambda: saes.fetch("owner/release", "block_{layer}", 2),
        lambda: saes.check_statement({"hook_point": site}, "of block 2", 2),
    )


# (the model that an SAE says it is of, the base) -> whether that may be one
MODELS = {
    ("google/gemma-3-1b-pt", "google/gemma-3-1b-pt"): True,
    ("google/gemma-3-1b-pt", "mirror/Gemma-3-1B-pt"): True,
    ("google/gemma-3-1b-pt", "google/gemma-3-1b-it"): False,
    ("google/gemma-3-1b-pt", "mini"): False,
    ("google/gemma-3-1b-pt", "tests"): True,
    ("google/gemma-3-1b-pt", None): True,
    ("mistral-7b", "mistralai/Mistral-7B-v0.1"): True,
    ("/home/me/base", "google/gemma-3-1b-it"): True,
    (None, "google/gemma-3-1b-it"): True,
    (7, "google/gemma-3-1b-it"): True,
}


@pytest.mark.parametrize(("of", "base"), MODELS)
def test_an_sae_that_says_that_it_is_of_another_model_is_refused_where_both_have_names(tmp_path, trained, monkeypatch, of, base):
    monkeypatch.chdir(ROOT)
    one = deepcopy(trained[0])
    one.cfg.metadata.model_name = of
    one.save_model(tmp_path / "block_2")
    held(
        MODELS[of, base],
        f"trained on {of}, the model is {base}",
        lambda: saes.fetch(str(tmp_path), "block_{layer}", 2, base=base),
    )


def test_a_release_of_another_model_is_refused_before_it_is_fetched(tmp_path):
    names = ("gemma-scope-2-270m-it-res-all", "layer_{layer}_width_16k_l0_small", 0, None)
    with pytest.raises(UserError, match="trained on google/gemma-3-270m-it, the model is google/gemma-3-1b-it; mend sae.release"):
        saes.fetched_sae(*names, "google/gemma-3-1b-it", [], folder=tmp_path)
    with pytest.raises(UserError, match="the model is google/gemma-3-1b-it; mend sae.release"):
        saes.files_of(replace(SPEC, release=names[0], sae_id=names[1]), "google/gemma-3-1b-it", lambda: 1)


def test_an_sae_trained_here_states_its_place_and_its_model(tmp_path, trained):
    spec = replace(SPEC, d_sae=32, training_tokens=1024)
    saes.trained_sae({2: trained[1]}, 2, spec, 7, "cpu", "owner/base", folder=tmp_path / "block_2")
    said = json.loads((tmp_path / "block_2" / "cfg.json").read_text())["metadata"]
    assert (said["hook_name"], said["model_name"]) == ("blocks.2.hook_resid_post", "owner/base")
    saes.train(trained[1], spec, 7, tmp_path / "silent")
    files = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("block_2", "silent")]
    assert files[0] == files[1] and saes.fetch(str(tmp_path), "block_{layer}", 2, base="other/Base")
    (tmp_path / "block_2").rename(tmp_path / "block_1")
    with pytest.raises(UserError, match="it says that it reads blocks.2.hook_resid_post; the output of block 1"):
        saes.fetch(str(tmp_path), "block_{layer}", 1)


def test_what_gemma_scope_2_says_of_its_place_is_held_against_its_layer(tmp_path, monkeypatch):
    tensors = dict.fromkeys(("b_enc", "b_dec", "threshold"), torch.zeros(4)) | dict(w_enc=torch.eye(4), w_dec=torch.eye(4))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "params.safetensors")
    said = dict(architecture="jump_relu", model_name="gemma-v3-4b-it", hf_hook_point_in="model.layers.2.output")
    monkeypatch.setattr(hub, "file", lambda repo, name, revision: tmp_path / name.rpartition("/")[2])
    monkeypatch.setattr(hub, "checked_hash", lambda path: "")
    for kind, there, line in (
        ("jump_relu", 2, ""),
        ("jump_relu", 3, "the output of block 3"),
        ("gated", 2, "says gated, jump_relu"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(said | {"architecture": kind}))
        held(not line, line, lambda there=there: saes.check_statement(saes.gemma_scope_2("r", f"layer_{there}_w")[0], "r", there))


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": []}', '{"metadata": 7}'])
def test_a_statement_that_cannot_be_read_is_refused(tmp_path, trained, text):
    trained[0].save_model(tmp_path / "block_2")
    (tmp_path / "block_2" / "cfg.json").write_text(text)
    with pytest.raises(UserError, match="block_2: its cfg.json cannot be read"):
        saes.fetch(str(tmp_path), "block_{layer}", 2)


def test_the_covariance_of_batches_is_numpys():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    found = Covariance(4)
    for part in x.split(17):
        found.add(part)
    assert found.value().numpy() == pytest.approx(np.cov(x.numpy().T, bias=True), abs=1e-6)


def test_jumprelu_is_silent_at_and_below_its_threshold():
    d = Dictionary(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]))
    assert d.encode(torch.tensor([[1.0, 1.5, -1.0]])).tolist() == [[0.0, 1.5, 0.0]]


def test_matched_weights_give_both_corpora_the_same_words_in_the_same_amounts():
    rng = np.random.default_rng(0)
    maths = [torch.from_numpy(rng.choice(6, 30, p=[0.4, 0.3, 0.1, 0.1, 0.1, 0.0])) for _ in range(20)]
    general = [torch.from_numpy(rng.choice(6, 30, p=[0.1, 0.2, 0.3, 0.0, 0.1, 0.3])) for _ in range(15)]
    tokens, labels = maths + general, [True] * 20 + [False] * 15
    weights = matched_weights(tokens, labels, minimum=20)
    amount = {side: torch.zeros(6, dtype=torch.float64) for side in (True, False)}
    for ids, w, side in zip(tokens, weights, labels, strict=True):
        amount[side].index_add_(0, ids, w.double())
    assert torch.allclose(amount[True], amount[False], atol=1e-3)
    assert amount[True][3] == 0 and amount[True][5] == 0, "a word of one corpus only counts for nothing"
    assert amount[True][0] > 0


def sums_of(acts, document, corpus_of, weights=None, ceiling=4.0):
    gathered = FeatureSums(acts.shape[1], corpus_of, ceiling)
    weights = torch.ones(len(acts)) if weights is None else weights
    half = len(acts) // 2
    for part in (slice(0, half), slice(half, None)):
        gathered.add(acts[part], document[part], dict.fromkeys(CONTRASTS, weights[part]))
    return gathered.value("corpus")


@pytest.fixture()
def world():
    """Three corpora (two subjects and general text) of unequal length."""
    generator = torch.Generator().manual_seed(1)
    corpus_of = torch.tensor([0] * 6 + [1] * 4 + [2] * 9)
    document = torch.cat([torch.full((5 + 3 * i,), i) for i in range(19)])
    acts = torch.relu(torch.randn(len(document), 7, generator=generator) + corpus_of[document].unsqueeze(1) * 0.2)
    return acts, document, corpus_of


def test_specificity_is_the_formula_worked_by_hand(world):
    acts, document, corpus_of = world
    m = moments(sums_of(acts, document, corpus_of), one_hot(corpus_of, 3), pool_subjects=False)
    token_corpus = corpus_of[document]
    first, second, general = (acts[token_corpus == c].double().numpy() for c in range(3))
    mean_maths = (first.mean(0) + second.mean(0)) / 2
    var_maths = ((first**2).mean(0) + (second**2).mean(0)) / 2 - mean_maths**2
    expected = (mean_maths - general.mean(0)) / np.sqrt((var_maths + general.var(0)) / 2 + 1e-6)
    assert np.allclose(cohen_d(m)[0], expected, atol=1e-4)
    assert np.allclose(m.fires_general[0], (general > 0).mean(0), atol=1e-6)


def test_pooled_subjects_weigh_by_their_tokens(world):
    acts, document, corpus_of = world
    m = moments(sums_of(acts, document, corpus_of), one_hot(corpus_of, 3), pool_subjects=True)
    maths = acts[corpus_of[document] < 2]
    assert torch.allclose(m.mean_maths[0], maths.mean(0), atol=1e-5)


def test_a_resample_counts_a_document_as_often_as_it_is_drawn(world):
    acts, document, corpus_of = world
    sums = sums_of(acts, document, corpus_of)
    twice = one_hot(corpus_of, 3).clone()
    twice[0, 2, 10] = 2
    keep = corpus_of[document] == 2
    repeated = torch.cat([acts[keep], acts[document == 10]])
    assert torch.allclose(moments(sums, twice, False).mean_general[0], repeated.mean(0), atol=1e-5)


def test_auroc_is_the_mann_whitney_statistic_up_to_bins():
    generator = torch.Generator().manual_seed(0)
    maths, general = torch.rand(400, 3, generator=generator) * 4, torch.rand(300, 3, generator=generator) ** 2 * 4
    maths[:100], general[:150] = 0, 0
    acts = torch.cat([maths, general])
    corpus_of = torch.tensor([0, 1])
    document = torch.tensor([0] * 400 + [1] * 300)
    ours = auroc(sums_of(acts, document, corpus_of).histogram)
    for feature in range(3):
        u = stats.mannwhitneyu(maths[:, feature].numpy(), general[:, feature].numpy()).statistic
        assert float(ours[feature]) == pytest.approx(u / (400 * 300), abs=0.01)


def test_firing_log_ratio_is_zero_without_a_difference_and_signed_with_one(world):
    acts, document, corpus_of = world
    m = moments(sums_of(acts, document, corpus_of), one_hot(corpus_of, 3), False)
    ratio = firing_log_ratio(m)[0]
    expected = torch.log((m.fires_maths + 1e-4) / (m.fires_general + 1e-4))[0]
    assert torch.allclose(ratio, expected) and torch.equal(ratio > 0, (m.fires_maths > m.fires_general)[0])


def test_the_most_specific_features_are_ranked_among_those_that_fire():
    values = torch.tensor([3.0, 9.0, 5.0, 5.0])
    fires = torch.tensor([True, False, True, True])
    assert sae_features.most_specific(values, fires, 3).tolist() == [2, 3, 0]
    with pytest.raises(UserError, match="only 3 fire"):
        sae_features.most_specific(values, fires, 4)
