from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from stetholib import layer_selection as ls
from stetholib import layer_sets, sae_features
from stetholib.calibration import RULE, null_p_values, planted_sums, power_curve
from stetholib.errors import UserError
from stetholib.models.streams import DocumentLosses
from stetholib.models.sums import moments, one_hot, resampled, shuffled_labels, specificity
from stetholib.store.tables import CONTRACTS


def test_the_score_finds_the_planted_layer_and_its_features():
    sums, corpus_of = planted_sums(layers=5, planted=3, effect=1.5, seed=0)
    result = ls.score_layers(sums, corpus_of, RULE, False, 1, permutations=49, resamples=40, seed=0)
    assert result.score.argmax() == 3 and result.p_value[3] == 0.02 and result.p_max[3] == 0.02
    assert result.selection_share[3] == 1 and result.selection_share.sum() == pytest.approx(1)
    m = moments(sums[3], one_hot(corpus_of, 8), False)
    assert set(specificity("cohen_d", sums[3], m)[0].topk(5).indices.tolist()) == set(range(5))


def test_without_signal_the_permutation_p_is_uniform():
    p = null_p_values(200)
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert p.min() >= 0.01 and p.max() <= 1


def test_power_rises_with_the_planted_effect():
    curve = power_curve((0.0, 0.3, 0.8), worlds=30)
    assert curve["power"].is_monotonic_increasing and curve["top"].is_monotonic_increasing
    assert curve["power"].iloc[0] < 0.25 and curve["power"].iloc[-1] > 0.9


def test_the_max_form_is_never_less_cautious():
    sums, corpus_of = planted_sums(layers=4, planted=1, effect=0.3, seed=2)
    result = ls.score_layers(sums, corpus_of, RULE, False, 2, permutations=99, resamples=10, seed=0)
    assert (result.p_max >= result.p_value).all()


def test_the_score_is_the_mean_of_the_top_features_that_fire():
    sums, corpus_of = planted_sums(layers=1, planted=0, effect=1.0, seed=1)
    labels = one_hot(corpus_of, 8)
    d = specificity("cohen_d", sums[0], moments(sums[0], labels, False))[0]
    assert float(
        sae_features.ScoreRule(share=0.25, minimum=2, minimum_firing=0.0).score(sums[0], labels, False)[0]
    ) == pytest.approx(float(d.sort(descending=True).values[:10].mean()), rel=1e-6)
    with pytest.raises(UserError, match="score_minimum"):
        sae_features.ScoreRule(minimum=41).score(sums[0], labels, False)


def test_shuffled_labels_keep_the_corpora_and_resamples_keep_their_sizes():
    corpus_of = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    shuffled = shuffled_labels(corpus_of, 20, seed=0)
    assert (shuffled.sort(1).values == corpus_of).all() and len({tuple(r.tolist()) for r in shuffled}) > 10
    redrawn = resampled(corpus_of, 3, 20, seed=0)
    assert (redrawn.sum(2) == torch.tensor([2.0, 3.0, 2.0])).all()
    assert redrawn[:, 0, 2:].sum() == 0


def test_paragraphs_of_an_article_are_drawn_together():
    corpus_of, article_of = torch.tensor([0, 0, 1, 1, 1, 1, 1]), torch.tensor([0, 1, 2, 2, 2, 5, 6])
    drawn = resampled(corpus_of, 2, 300, 0, article_of)
    assert (drawn[:, 1, 2] == drawn[:, 1, 3]).all() and (drawn[:, 1, 2] == drawn[:, 1, 4]).all()
    articles = drawn[:, 1, [2, 5, 6]]
    assert (articles.sum(1) == 3).all() and set(articles[:, 0].tolist()) == {0, 1, 2, 3}
    alone = torch.arange(7)
    assert torch.equal(resampled(corpus_of, 2, 9, 0, alone), resampled(corpus_of, 2, 9, 0))  # each its own: as without
    paragraph = lambda **how: resampled(corpus_of, 2, 300, 0, **how)[:, 1, 2:].matmul(torch.tensor([1.0, 1, 1, 0, 0])).var()  # noqa: E731
    assert paragraph(article_of=article_of) > 2 * paragraph()  # three that are alike count as one that is drawn or not


def test_selection_takes_the_largest_with_ties_to_the_earlier():
    assert layer_sets.select([1.0, 3.0, 3.0, 2.0], 2) == (1, 2)
    assert layer_sets.select([1.0, 1.0, 1.0], 2) == (0, 1)
    with pytest.raises(UserError, match="layer_share"):
        layer_sets.select([1.0], 2)


@pytest.mark.parametrize(("layers", "count"), [(12, 4), (34, 11), (26, 9), (18, 6), (1, 1)])
def test_a_third_of_the_layers_is_selected(layers, count):
    assert layer_sets.layer_count(layers, 1 / 3) == count


def test_sets_are_all_of_them_or_different_random_ones():
    assert layer_sets.sampled_sets(range(5), 2, 10, 0) == list(combinations(range(5), 2))
    drawn = layer_sets.sampled_sets(range(12), 4, 200, 0)
    assert len(set(drawn)) == 200 and drawn == layer_sets.sampled_sets(range(12), 4, 200, 0) != layer_sets.sampled_sets(
        range(12), 4, 200, 1
    )


def percentile(value, others):
    return layer_sets.percentiles(np.array([[value]]), np.array(others)[:, None], 0)[0, 0]


def test_the_percentile_counts_worse_sets_and_half_of_equals():
    assert percentile(-1.0, [-2.0, -1.0, 0.0, 1.0]) == pytest.approx(0.625)
    assert percentile(-9.0, [0.0]) == 1 and percentile(9.0, [0.0]) == 0


def test_greedy_finds_the_best_set_of_an_additive_loss():
    worth = [3.0, 1.0, 4.0, 1.5]
    assert layer_sets.greedy(lambda chosen: -sum(worth[x] for x in chosen), 4, 2) == (0, 2)


def test_every_fixed_rule_picks_as_many_layers():
    scores = {"corpus": [1, 2, 3, 4, 5, 6], "matched": [6, 5, 4, 3, 2, 1]}
    found = layer_sets.chosen_sets(layer_sets.fixed_rules(scores, energies=[1, 9, 1, 9, 1, 1]), count=2)
    assert {name: layers for name, (_, layers) in found.items()} == {
        "stethoscope": (4, 5),
        "stethoscope_matched": (0, 1),
        "least_specific": (0, 1),
        "largest_norm": (1, 3),
        "first": (0, 1),
        "middle": (2, 3),
        "last": (4, 5),
    }
    assert [found[name][0] for name in ("stethoscope", "stethoscope_matched", "last")] == ["corpus", "matched", "-"]


def test_windows_and_shifts_are_the_sets_that_smooth_profiles_pick():
    plan = layer_sets.smooth_sets({"stethoscope": (1, 2), "stethoscope_rise": (0, 3)}, layers=5)
    by = {name: [one.layers for one in plan if one.selector == name] for name in {one.selector for one in plan}}
    assert by["window"] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert by["stethoscope_shifted"] == [(2, 3), (3, 4), (0, 4), (0, 1)]
    assert by["stethoscope_rise_shifted"] == [(1, 4), (0, 2), (1, 3), (2, 4)] and set(by) < {*layer_sets.SETS_OF_MANY}
    many = layer_sets.smooth_sets({"stethoscope": tuple(range(10))}, layers=34)
    assert len(many) == 24 and many[0].layers[0] == 0 and many[11].layers[-1] == 33


def test_the_null_of_smooth_scores_counts_windows_and_shifts_that_are_worse():
    rows = [("stethoscope", -3.0), ("stethoscope_rise", -1.0), *[("window", x) for x in (-4.0, -3.0, -2.0, 0.0)]]
    rows += [("stethoscope_shifted", -2.0), ("stethoscope_rise_shifted", -2.0)]
    found = layer_sets.smooth_null(pd.DataFrame(rows, columns=["selector", "loss_change"])).set_index(["selector", "null"])
    assert (
        found.loc[("stethoscope", "window"), "better"] == 2.5 / 4 and found.loc[("stethoscope_rise", "window"), "better"] == 1 / 4
    )
    assert found.loc[("stethoscope", "shifted"), "better"] == 1.0 and found.loc[("stethoscope_rise", "shifted"), "better"] == 0.0


@pytest.mark.parametrize(("pairs", "best"), [(0.0, "layers"), (1.0, "pairs")], ids=["a sum over layers", "interactions"])
def test_additivity_is_perfect_where_effects_add_up_and_not_where_they_interact(pairs, best):
    worth, rng = np.arange(8.0), np.random.default_rng(0)
    meet = np.triu(rng.normal(size=(8, 8)), 1) * 6 * pairs
    loss = lambda one: -worth[list(one)].sum() - sum(meet[i, j] for i, j in combinations(one, 2))  # noqa: E731
    drawn = [one for size in (3, 4, 5) for one in combinations(range(8), size)]
    rows = [("only", layer, str(layer), loss((layer,))) for layer in range(8)]
    rows += [("random", at, " ".join(map(str, one)), loss(one)) for at, one in enumerate(drawn)]
    table = pd.DataFrame(rows, columns=["selector", "draw", "layers", "loss_change"])
    found = layer_sets.additivity(table, 8, seed=0).set_index("model")["r2"]
    assert found["pairs"] > 0.99 and (found["layers"] > 0.99) == (best == "layers") == (found["alone"] > 0.999)


WORTH = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 4.0], [1.0, 1.0]])  # of each layer, on the first and the last three problems


def additive(layers, alpha):
    """Losses of six problems where every layer brings its own worth; the closing sentence is worth ten times as much."""
    fall = alpha * np.repeat(WORTH[list(layers)].sum(0), 3)
    return DocumentLosses(10 - fall, 100 - 10 * fall, np.full(6, 2.0))


FIRST = np.array([True] * 3 + [False] * 3)


def planned(random_sets=100):
    chosen = {"stethoscope": ("corpus", (0, 1)), "stethoscope_matched": ("matched", (2, 3)), "last": ("-", (2, 3))}
    return layer_sets.planned_sets(chosen, np.array([1.0, 1.0, 3.0, 4.0]), range(4), random_sets, seed=0)


def test_the_shrunk_vector_has_the_energy_of_the_selected_layers():
    energy = np.array([1.0, 2.0, 3.0, 4.0])
    alpha = layer_sets.shrunk_to(energy, (1, 2))
    assert alpha**2 * energy.sum() == pytest.approx(5.0) and layer_sets.shrunk_to(energy, (0, 1, 2, 3)) == 1
    by_name = {one.selector: one for one in planned()}
    assert by_name["full_shrunk"].layers == (0, 1, 2, 3) and by_name["full_shrunk"].alpha == pytest.approx((2 / 9) ** 0.5)


@pytest.mark.parametrize("sizes", [(70,) * 7, (1,) * 7, (3, 1, 2), (1, 1)])
def test_halves_are_stratified_by_subject_and_seeded(sizes):
    subjects = [f"s{at}" for at, size in enumerate(sizes) for _ in range(size)]
    half = layer_sets.halving(subjects, 0)
    assert half.dtype == bool and len(half) == sum(sizes) and abs(2 * half.sum() - len(half)) <= 1
    for name, size in zip(sorted(set(subjects)), sizes, strict=True):
        assert abs(2 * half[np.array(subjects) == name].sum() - size) <= 1
    assert (half == layer_sets.halving(subjects, 0)).all()
    assert any((half != layer_sets.halving(subjects, seed)).any() for seed in range(1, 9))


def test_rules_that_see_losses_choose_on_one_half_of_the_problems():
    found = [layer_sets.seeing_sets(additive, seen, draw, 4, 1, 0.1, True) for draw, seen in enumerate((FIRST, ~FIRST))]
    assert [(one.selector, one.draw, one.layers) for plan in found for one in plan] == [
        ("small_step", 0, (0,)),
        ("greedy", 0, (0,)),
        ("small_step", 1, (2,)),
        ("greedy", 1, (2,)),
    ]
    assert [one.selector for one in layer_sets.seeing_sets(additive, FIRST, 0, 4, 2, 0.1, False)] == ["small_step"]


def test_the_table_of_sets_is_known_where_effects_add_up():
    plan = planned()
    for draw, seen in enumerate((FIRST, ~FIRST)):
        plan += layer_sets.seeing_sets(additive, seen, draw, 4, 2, 0.1, True)
    energy = np.array([1.0, 1.0, 3.0, 4.0])
    table = layer_sets.measure_sets(plan, additive, lambda layers, alpha: 3 + alpha * len(layers), FIRST, energy, seed=0)
    assert set(CONTRACTS["04_layer_sets"][0] + CONTRACTS["04_layer_sets"][1]) <= set(table)
    rows = table.set_index(["selector", "draw"])
    assert rows.loc[("full", 0), "loss_change"] == pytest.approx(-(5 + 6) * 3 / 12)
    assert rows["closing_change"].to_numpy() == pytest.approx(10 * rows["loss_change"].to_numpy())
    # greedy of half 0 takes layer 0 and 1, which on the other half bring 1 a problem, or 0.5 a token
    assert rows.loc[("greedy", 0), "layers"] == "0 1" and rows.loc[("greedy", 0), "loss_change"] == pytest.approx(-0.5)
    assert rows.loc[("greedy", 1), "layers"] == "1 2" and rows.loc[("greedy", 1), "loss_change"] == pytest.approx(-0.5)
    assert rows.loc[("stethoscope", 0), "loss_change"] == pytest.approx(-(4 + 1) * 3 / 12)
    # the six pairs bring 5, 7, 5, 6, 4 and 6 over both halves: one is worse than {0 1}, two are equal
    assert rows.loc[("stethoscope", 0), "percentile"] == pytest.approx((1 + 2 / 2) / 6)
    # and 1, 4, 1, 5, 2 and 5 on the other half: none is worse than greedy's first, two are equal
    assert rows.loc[("greedy", 0), "percentile"] == pytest.approx(1 / 6)
    assert (rows["percentile_low"].dropna() <= rows["percentile_high"].dropna()).all()
    ranked = {name for name, _ in rows.index[rows["percentile"].notna()]}
    assert ranked == {"full_shrunk", "random", "stethoscope", "stethoscope_matched", "last", "greedy", "small_step"}
    assert set(table.loc[table["general_change"].isna(), "selector"]) == {"random", "only", "without"}
    assert rows.loc[("full_shrunk", 0), "general_change"] == pytest.approx(4 * (2 / 9) ** 0.5)
    assert rows.loc[("full_shrunk", 0), "energy"] == pytest.approx(rows.loc[("stethoscope", 0), "energy"])
    named = layer_sets.named_sets(table)
    assert named.index.is_unique and named.loc["greedy", "layers"] == "0 1 | 1 2" and named.loc["greedy", "loss_change"] == -0.5


def test_the_interval_of_a_percentile_holds_what_resampled_problems_give():
    rng = np.random.default_rng(0)
    chance = rng.normal(size=(60, 40))
    ours = np.stack([chance.mean(0) - 0.2, np.full(40, -9.0), chance[0]])
    found = layer_sets.percentiles(ours, chance, seed=0)
    by_hand = [percentile(one.sum(), chance.sum(1)) for one in ours]
    assert found[:, 0].tolist() == pytest.approx(by_hand) and found[1].tolist() == [1, 1, 1]
    assert (found[:, 1] <= found[:, 2]).all()
    draws = []
    for _ in range(400):
        picks = rng.integers(0, 40, 40)
        draws.append(percentile(ours[0][picks].sum(), chance[:, picks].sum(1)))
    assert found[0, 1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.08)


def test_spearman_is_scipys_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    y = x + rng.normal(size=12)
    rho, low, high = ls.spearman(x, y)
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic) and low < rho < high


def test_the_partial_correlation_removes_what_is_given():
    rng = np.random.default_rng(1)
    depth = np.arange(200)
    x, y = depth + rng.normal(size=200), depth + rng.normal(size=200)
    assert ls.spearman(x, y, resamples=10)[0] > 0.99
    assert abs(ls.partial_spearman(x, y, [depth])) < 0.2
    assert np.isnan(ls.partial_spearman(depth, y, [depth]))


def test_effects_are_falls_of_the_loss():
    sums, corpus_of = planted_sums(layers=2, planted=0, effect=1.0, seed=0)
    result = ls.score_layers(sums, corpus_of, RULE, False, 1, 9, 5, 0)
    sets = pd.DataFrame(
        [("full", 0, -1.0), ("only", 0, -0.5), ("only", 1, 0.1), ("without", 0, -0.2), ("without", 1, -1.1)],
        columns=["selector", "draw", "loss_change"],
    ).assign(closing_change=lambda t: 2 * t["loss_change"])
    table = ls.measure({"corpus": result}, {"corpus": [0.0, 0.0]}, 1, sets).set_index("layer")
    assert table["effect_alone"].tolist() == [0.5, -0.1]
    assert table["effect_left_out"].tolist() == pytest.approx([0.8, -0.1])
    assert table["closing_alone"].tolist() == [1.0, -0.2] and table["closing_left_out"].tolist() == pytest.approx([1.6, -0.2])
    assert table["selected"].tolist() == [1, 0]


def test_auroc_cannot_be_drawn_again_and_says_so_instead_of_giving_a_p_value():
    sums, corpus_of = planted_sums(layers=3, planted=1, effect=1.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    heard = [replace(one, histogram=torch.rand(one.histogram.shape, generator=generator)) for one in sums]
    result = ls.score_layers(heard, corpus_of, replace(RULE, kind="auroc"), False, 1, permutations=9, resamples=5, seed=0)
    assert np.isfinite(result.score).all() and len(set(result.score)) == 3
    assert all(np.isnan(values).all() for values in (result.p_value, result.p_max, result.selection_share))


def test_a_fit_to_few_random_sets_says_nothing():
    sets = pd.DataFrame([dict(selector="random", draw=0, layers="0 1", loss_change=-0.1)])
    assert layer_sets.additivity(sets, 4, seed=0)["r2"].isna().all()


def test_layers_are_read_as_ranges():
    told = {"0 1 2 5": "0-2, 5", "3": "3", "0 1 3 9 | 0 1 2 9": "0-1, 3, 9 | 0-2, 9", "7 9 10 11": "7, 9-11"}
    assert {layers: layer_sets.ranges(layers) for layers in told} == told
