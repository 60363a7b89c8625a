"""What the notebooks close with: the committed tables' own numbers, and of null tables that nothing was found."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from stetholib import (
    claims,
    editing,
    layer_selection,
    layer_sets,
    minerva_math,
    sae_features,
    significance,
    subspace_projection,
    task_vectors,
)
from stetholib.models import subspaces
from stetholib.models.weights import MATRICES, SIDE

RANK = 2


def committed(stem):
    return pd.read_csv(ROOT / "figures" / "mini" / f"{stem}.csv")


def lines(text):
    assert isinstance(text, str) and 1 <= len(text.splitlines()) <= 25
    assert all(line.startswith("- ") for line in text.splitlines()) and "nan" not in text
    return text.splitlines()


# --- 01


RESTORED = {"scale 0 leaves every byte": True, "scale 1 changes some": True, "leaving restores every byte": True}


def rounding(**changes):
    return pd.DataFrame(
        [dict(change="task vector", stored_in="bfloat16", unmoved=0.03, energy_kept=1.002, cosine=0.999) | changes]
    )


def test_01_says_the_tables_numbers():
    table = committed("01_task_vectors")
    moved, energy, ranks, *_ = lines(text := task_vectors.summary(table, rounding(), RESTORED))
    top = table.sort_values("relative").iloc[-1]
    assert moved == (
        f"- The fine-tune moves every matrix, by {table['relative'].median():.1%} of its norm in the median; "
        f"most in the {top['matrix']} matrix of layer {top['layer']} ({top['relative']:.1%})."
    )
    readers = table[table["matrix"].isin(["q", "k", "v", "gate", "up"])]["energy_share"].sum()
    layers = [rows["energy_share"].sum() for _, rows in table.groupby("layer")]
    assert f"Readers carry {readers:.0%} of the energy, writers {1 - readers:.0%}" in energy
    assert f"{1 / 12:.1%} each; the layers range from {min(layers):.1%} to {max(layers):.1%}" in energy
    assert f"between {table['stable_rank'].min():.1f} and {table['stable_rank'].max():.1f}" in ranks and "many in others" in ranks
    assert "leave 3% of the weights unmoved and keep 100.2% of its energy (cosine 0.999)." in text
    assert text.endswith("undoing restores every byte: **True**.")


def test_01_says_what_did_not_happen():
    table = committed("01_task_vectors")
    still = table.assign(delta_norm=0.0, relative=0.0, energy_share=0.0, stable_rank=0.0)
    assert "moves **no matrix**" in lines(task_vectors.summary(still, rounding(), RESTORED))[0]
    half = table.assign(delta_norm=table["delta_norm"].where(table["side"] == "reader", 0.0))
    assert f"moves only {12 * 5} of {12 * 7} matrices" in task_vectors.summary(half, rounding(), RESTORED)
    assert "as many directions in every matrix" in task_vectors.summary(table.assign(stable_rank=3.0), rounding(), RESTORED)
    assert "Most of what is left is not the change" in task_vectors.summary(table, rounding(cosine=0.3), RESTORED)
    broken = task_vectors.summary(table, rounding(), RESTORED | {"scale 1 changes some": False})
    assert "**It does not hold** that scale 1 changes some." in broken and "**True**" not in broken


def test_01_the_algebra_of_energies_holds():
    generator = torch.Generator().manual_seed(0)
    vector = editing.TaskVector({(0, m): torch.randn(4, 4, generator=generator) for m in MATRICES})
    whole, twice, none, parts = task_vectors.algebra(vector).values()
    assert twice == pytest.approx(4) and none == 0 and parts == pytest.approx(whole) and whole > 0


# --- 02


def test_02_says_the_tables_numbers():
    table = committed("02_sae_features")
    once = table[table["contrast"] == "corpus"]
    trust, alive, words, best = lines(sae_features.summary(table))
    assert "**True**" in trust and f"{once['fvu'].mean():.2f} against {once['fvu_random'].mean():.2f}" in trust
    assert alive == f"- {once['alive'].mean():.0%} of the features fire at all; the mean L0 is {once['l0'].mean():.1f}."
    tops = [table[table["contrast"] == contrast]["top_specificity"].max() for contrast in ("matched", "corpus")]
    assert f"leaves {tops[0] / tops[1]:.0%} of the best specificity ({tops[0]:.2f} of {tops[1]:.2f})" in words
    assert words.endswith("vocabulary does not explain the best feature.") == (tops[0] >= tops[1])
    layers = [table.loc[table[table["contrast"] == c]["top_specificity"].idxmax(), "layer"] for c in ("corpus", "matched")]
    assert best == f"- The best layer is {layers[0]} on all tokens and {layers[1]} on matched words."
    assert {c: layer for c, (layer, _) in sae_features.best_features(table).items()} == dict(zip(("corpus", "matched"), layers))


def test_02_an_sae_no_better_than_random_is_no_success():
    table = committed("02_sae_features").astype({"refused": object})
    table.loc[table["layer"] == 3, "refused"] = "it leaves 0.59 of the variance unexplained"
    trust = lines(sae_features.summary(table))[0]
    assert "**1 of 12 SAEs cannot be believed**" in trust and "layer 3: it leaves 0.59" in trust and "True" not in trust


def test_02_features_that_prefer_nothing_are_no_success():
    table = committed("02_sae_features")
    matched = table["contrast"] == "matched"
    lost = table.assign(top_specificity=table["top_specificity"].where(~matched, table["top_specificity"] / 2))
    assert "what is lost was vocabulary" in sae_features.summary(lost)
    only_words = table.assign(top_specificity=table["top_specificity"].where(~matched, 0.1))
    assert "what was heard was vocabulary" in sae_features.summary(only_words)
    assert "**No feature prefers mathematics" in sae_features.summary(table.assign(top_specificity=0.01))
    assert "**No feature prefers mathematics" in lines(sae_features.summary(table.assign(top_specificity=-0.3)))[2]
    assert "**No feature prefers mathematics" in sae_features.summary(table.assign(top_specificity=0.51), "auroc")


# --- 03


def energies():
    table = committed("01_task_vectors")
    return {(row.layer, row.matrix): row.delta_norm**2 for row in table.itertuples()}


def control(**changes):
    """Losses of the scalpel and its controls, negative is better; named changes go to the scalpel's row."""
    rows = [
        dict(variant="full", energy=1.0, loss_change=-0.02, low=-0.03, high=-0.01),
        dict(variant="scalpel", energy=0.05, loss_change=-0.003, low=-0.005, high=-0.001, rival="raw_shrunk")
        | dict(loss_change_against_rival=0.009, low_against_rival=0.0056, high_against_rival=0.013)
        | changes,
        dict(variant="scalpel_rescaled", energy=1.0, loss_change=-0.0045, low=-0.01, high=0.002),
    ]
    return pd.DataFrame(rows)


def mechanism_test(p=0.001, swapped=False):
    near, far = (0.1, 0.3) if swapped else (0.3, 0.1)
    row = dict(overlap_predicted=near, overlap_other=far, in_favour=9, layers=12, p=p)
    return pd.DataFrame(dict(side=side, predicted=one, other=two) | row for side, (one, two) in subspaces.PREDICTED.items())


CARRIED = pd.DataFrame(
    [("raw", 0.03, 1.0, 0.999), ("projected", 0.19, 1.03, 0.984), ("raw_shrunk", 0.13, 1.03, 0.98)],
    columns=["vector", "unmoved", "energy_kept", "cosine"],
)


def third(splits=None, test=None, losses=None):
    split = subspaces.LossSplit(0.05, 0.16, 0.031, 0.001)
    splits = splits or dict(all=split, readers=split, writers=split)
    test, losses = mechanism_test() if test is None else test, control() if losses is None else losses
    return subspace_projection.summary(splits, RANK, test, losses, CARRIED, "float32")


def test_03_says_the_tables_numbers():
    table, energy = committed("03_subspace_projection"), energies()
    text = third(subspaces.splits_by_side(table, energy, RANK))
    here = table[(table["rank"] == RANK) & (table["layer"] == table["sae_layer"]) & (table["gains"] == "plain")]
    kept = {}
    for basis in ("sae_decoder", "own_svd_layer", "random"):
        rows = here[here["basis"] == basis]
        weight = np.array([energy[at] for at in zip(rows["layer"], rows["matrix"], strict=True)])
        kept[basis] = float((rows["energy_retained"] * weight).sum() / weight.sum())
    a_layer = (rows["energy_sd"] * weight).groupby(rows["layer"]).sum()  # a layer's matrices together, layers apart
    spread = float(np.sqrt((a_layer**2).sum()) / weight.sum())
    chance, index = RANK / 64, (kept["own_svd_layer"] - kept["sae_decoder"]) / (kept["own_svd_layer"] - RANK / 64)
    first, second, third_, fourth, last = lines(text)
    assert f"discards **{1 - kept['sae_decoder']:.1%}** at rank 2" in first and f"discards {1 - chance:.1%}" in first
    assert first.endswith("so most is lost **by construction** of the rank.")
    times, z = kept["sae_decoder"] / chance, (kept["sae_decoder"] - chance) / spread
    assert f"keeps **{times:.1f} times what chance keeps**, {z:.0f} sd above random subspaces." in second
    assert f"keeps {kept['own_svd_layer']:.1%}" in second and f"is **{index:.2f}**" in second
    assert "readers lie closer to activations than to gradients in 9 of 12 layers (p = 0.001)" in third_
    assert "+0.009 nats" in fourth and "(paired interval +0.0056 to +0.013): direction was lost" in fourth
    assert "-0.0045, the raw vector by -0.02." in fourth
    assert "19% of the weights" in last and "103% of its energy" in last and last.endswith("computes in float32.")


@pytest.mark.parametrize(
    ("kept", "sd", "said"),
    [
        (0.031, 0.001, "**as much as chance**, 1.0 times: nothing that can be told from random subspaces."),
        (0.05, 0.02, "**as much as chance**, 1.6 times: nothing that can be told from random subspaces."),
        (0.02, 0.001, "**0.6 times what chance keeps**, 11 sd below random subspaces."),
        (0.05, 0.001, "**1.6 times what chance keeps**, 19 sd above random subspaces."),
        (0.031, 0.0, "**as much as chance**"),
    ],
)
def test_03_says_when_the_scalpel_keeps_no_more_than_chance(kept, sd, said):
    split = subspaces.LossSplit(kept, 0.16, 0.031, sd)
    assert f"keeps {said}" in lines(third(dict(all=split, readers=split, writers=split)))[1]


def test_03_says_by_construction_only_where_chance_loses_most_as_well():
    loose = subspaces.LossSplit(0.3, 0.6, 0.25, 0.001)
    assert "construction" not in third(dict(all=loose, readers=loose, writers=loose)) and "**by construction**" in third()


def test_03_says_when_there_is_nothing_to_tell():
    flat = subspaces.LossSplit(0.031, 0.031, 0.031, 0.001)
    assert "there is no misalignment to tell" in lines(third(dict(all=flat, readers=flat, writers=flat)))[1]
    assert third(test=mechanism_test(p=0.4)).count("**no difference can be told**") == 2
    assert "readers lie **closer to gradients** than to activations" in third(test=mechanism_test(swapped=True))
    assert "**no loss of direction can be told**" in third(losses=control(low_against_rival=-0.001))
    better = control(loss_change_against_rival=-0.009, low_against_rival=-0.013, high_against_rival=-0.005)
    assert "the scalpel does better" in third(losses=better)
    useless = control()
    useless.loc[useless["variant"] == "full", "high"] = 0.001
    assert "**lowers no loss beyond chance**" in third(losses=useless) and "direction was lost" not in third(losses=useless)


def test_03_the_tables_of_shares_are_pooled_by_energy():
    table, energy = committed("03_subspace_projection"), energies()
    sides = subspaces.kept_by_side(table, energy)
    assert list(sides) == ["reader", "writer"]
    wide = subspaces.kept_by_matrix(table, energy, RANK)
    assert list(wide) == [*MATRICES, "chance"] and list(wide.index) == list(subspaces.BASES)
    rows = subspaces.default_rows(table)
    rows = rows[(rows["rank"] == RANK) & (rows["basis"] == "sae_decoder")]
    for matrix, side in (("q", "reader"), ("down", "writer")):
        q = rows[rows["matrix"] == matrix]
        weight = [energy[layer, matrix] for layer in q["layer"]]
        assert wide.loc["sae_decoder", matrix] == pytest.approx(np.average(q["energy_retained"], weights=weight))
        whole = rows[rows["side"] == side]
        weight = [energy[at] for at in zip(whole["layer"], whole["matrix"], strict=True)]
        at = sides[side].set_index(["basis", "rank"])["energy_retained"]["sae_decoder", RANK]
        assert at == pytest.approx(np.average(whole["energy_retained"], weights=weight))
    split = subspaces.splits_by_side(table, energy, RANK)
    assert list(split) == ["all", "readers", "writers"] and split["readers"].retained == pytest.approx(
        sides["reader"].set_index(["basis", "rank"])["energy_retained"]["sae_decoder", RANK]
    )


def test_03_definitions_are_told_apart():
    table = committed("03_subspace_projection")
    shares = subspaces.kept_by_definition(table, RANK)
    assert list(shares) == ["norm", "plain"]
    assert list(shares.index) == [("reader", "block before"), ("reader", "own block"), ("writer", "own block")]
    rows = subspaces.default_rows(table)
    rows = rows[(rows["rank"] == RANK) & (rows["basis"] == "sae_decoder") & (rows["side"] == "writer")]
    assert shares.loc[("writer", "own block"), "plain"] == pytest.approx(rows["energy_retained"].mean())


@pytest.mark.parametrize("matrix", ["q", "o"])
def test_03_the_invariants_hold(matrix):
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    basis = subspaces.random_basis(8, 3, generator)
    whole, left = subspaces.invariants(delta, basis, SIDE[matrix]).values()
    assert whole == pytest.approx(1) and left == pytest.approx(0, abs=1e-12)


# --- 04


LAYERS = 12


def layer_table(**changes):
    """Twelve layers under both contrasts; early ones write the solution, late ones its closing sentence."""
    layer = np.arange(LAYERS)
    columns = dict(
        layer=layer,
        score=0.1 * layer,
        score_random=0.35,
        p_max=0.01,
        selected=(layer >= 8).astype(int),
        effect_alone=0.001 * (12 - layer),
    )
    rows = pd.DataFrame(columns | dict(closing_alone=0.002 * layer**2) | changes)
    return pd.concat([rows.assign(contrast=contrast) for contrast in ("corpus", "matched")], ignore_index=True)


def set_table(**changes):
    """Sets that rules picked, and what they are worth; changes: by selector, a dict of columns."""
    known = dict(
        full=(-0.04, -0.05, np.nan),
        full_shrunk=(-0.036, -0.04, 1.0),
        stethoscope=(-0.01, -0.03, 0.57),
        stethoscope_matched=(-0.012, -0.03, 0.6),
        last=(-0.008, -0.045, 0.1),
        first=(-0.02, -0.01, 0.9),
    )
    rows = [dict(selector=n, loss_change=a, closing_change=b, percentile=c) for n, (a, b, c) in known.items()]
    rows += [dict(selector="greedy", draw=d, loss_change=-0.03, closing_change=-0.04, percentile=0.7 + 0.2 * d) for d in (0, 1)]
    rows += [dict(selector="random", draw=d, loss_change=-0.01, closing_change=-0.01, percentile=0.5) for d in range(3)]
    table = pd.DataFrame(rows).assign(contrast="-", layers="8 9 10 11").fillna({"draw": 0})
    table = table.assign(percentile_low=table["percentile"] - 0.05, percentile_high=table["percentile"] + 0.05)
    for name, columns in changes.items():
        table.loc[table["selector"] == name, list(columns)] = list(columns.values())
    return table


def relations(table, **low):
    """Scores and depth against effects, by Spearman; named bounds replace the interval's lower end of all tokens and so on."""
    rows = []
    for effect in ("effect_alone", "closing_alone"):
        for name in ("corpus", "matched", "|tau|", "depth"):
            one = table[table["contrast"] == ("matched" if name == "matched" else "corpus")].sort_values("layer")
            x = one["score"] if name in ("corpus", "matched") else one["layer"]
            rho, below, above = layer_selection.spearman(x, one[effect], resamples=200)
            rows.append(dict(predictor=name, effect=effect, rho=rho, low=low.get(name, below), high=above))
    return pd.DataFrame(rows)


def reliable(reliability=0.8, held_out=0.4):
    rows = [("sets", "solution", 106, reliability, held_out, 0.5), ("sets", "closing", 106, 0.99, 0.2, 0.2)]
    return pd.DataFrame(rows, columns=["what", "loss", "n", "reliability", "r_held_out", "r_in_sample"])


def fourth(table=None, sets=None, found=None, told=None):
    table, sets = layer_table() if table is None else table, set_table() if sets is None else sets
    return layer_selection.summary(
        table, sets, relations(table) if found is None else found, reliable() if told is None else told
    )


def test_04_says_the_tables_numbers():
    heard, chosen, places, apart, injected, beside, score = lines(fourth())
    assert (
        heard
        == "- 12 of 12 layers hear mathematics beyond chance on all tokens, 12 on matched words (permutation, maximum over layers). A random dictionary of the same sparsity scores at least as high in 4 on all tokens and in 4 on matched words."
    )
    assert "are [8, 9, 10, 11] on all tokens and [8, 9, 10, 11] on matched words: 4 of 4 in common." in chosen
    assert places == (
        "- Injected alone, early layers do most for the solution, late layers for its closing sentence "
        "(rho with depth -1.00 and +1.00)."
    )
    assert (
        "**tells sets of layers apart**" in apart
        and "rank 106 sets with rho +0.80" in apart
        and apart.endswith("by 40% of the whole vector's effect.")
    )
    assert "better than **57.0%** (52% to 62%; all tokens) and **60.0%** (55% to 65%; matched words) of random sets" in injected
    assert "On all tokens and on matched words that is **not told from chance**, which needs 95%" in injected
    assert injected.endswith("Rules that do better: stethoscope matched, first, greedy.")
    assert (
        "stethoscope's set brings 25%, the whole vector shrunk to its energy 90%: selecting layers **does no better than"
        in beside
    )
    assert beside.endswith("Of the closing sentence's fall they bring 60% and 80%.")
    assert "rho = -1.00 (all tokens), -1.00 (matched words), -1.00 (size of the change), -1.00 (depth)" in score
    assert "does not tell a layer's worth" in score


def test_04_says_when_no_layer_hears_mathematics():
    table = layer_table()
    told = lambda t: lines(fourth(t))[0]  # noqa: E731
    assert told(table.assign(p_max=0.4)).startswith("- **No layer hears mathematics beyond chance**")
    matched = table["contrast"] == "matched"
    mixed = told(table.assign(p_max=table["p_max"].where(~matched, 0.4)))
    assert "12 of 12 layers hear" in mixed and "**none** on matched words" in mixed and "not the question" not in mixed
    assert told(table.assign(p_max=table["p_max"].where(matched, 0.4))).startswith("- **None** of 12 layers hear")
    assert "**was not tested**" in told(table.assign(p_max=np.nan))


def test_04_says_nothing_of_chance_where_sets_and_scores_are_better():
    table, high = layer_table(), dict(percentile=0.99, percentile_low=0.96)
    sets = set_table(stethoscope=high, stethoscope_matched=high)
    text = fourth(table, sets, relations(table, corpus=0.2, matched=0.1))
    assert "not told from chance" not in text and "does not tell a" not in text and "Rules that do better: none" in text
    sets = set_table(stethoscope_matched=high, stethoscope=dict(percentile=0.99, percentile_low=0.94))
    text = fourth(table, sets, relations(table, corpus=0.2, matched=-0.1))
    assert "On all tokens that is **not told from chance**" in text and "On matched words **the score does not tell" in text


def test_04_says_when_effects_live_nowhere_and_titles_do():
    flat = layer_table(effect_alone=[1, 3, 2] * 4, closing_alone=0.1 * np.arange(LAYERS))
    assert "**layers of no particular depth** do most for the solution, late layers for its closing" in fourth(flat)
    found = relations(flat)
    assert layer_selection.effects_title(found, "solution").startswith("The solution: no trend with depth is told (rho ")
    assert (
        layer_selection.effects_title(found, "closing") == "The closing sentence: late layers do most (rho +1.00, +1.00 to +1.00)"
    )


@pytest.mark.parametrize(("reliability", "held_out"), [(0.2, 0.4), (0.8, 0.05), (0.0, -0.1)])
def test_04_says_when_this_world_does_not_tell_sets_apart(reliability, held_out):
    told = reliable(reliability, held_out)
    text = fourth(told=told)
    assert (
        "**This world does not tell sets of layers apart**" in text
        and "(wanted: 0.5 and 10%), so percentiles say nothing." in text
    )
    assert (
        "Rules that look better, which this world cannot tell,: " not in text
        and "which this world cannot tell: stethoscope" in text
    )
    assert layer_selection.sets_title(set_table(), told).startswith(
        "This world cannot tell sets apart (the stethoscope's beats 57.0%"
    )
    assert (
        layer_selection.sets_title(set_table(), reliable())
        == "The stethoscope's set beats 57.0% of random sets (52% to 62%): not beyond chance"
    )


def test_04_says_when_its_losses_rank_nothing():
    assert "**cannot be said**" in fourth(told=reliable(np.nan, 0.4)) and "**cannot be said**" in fourth(
        told=reliable(0.9, np.nan)
    )


def test_04_says_how_shrinking_all_layers_does_beside_selecting_some():
    better = set_table(full_shrunk=dict(loss_change=-0.005))
    assert "shrunk to its energy 12%: selecting layers does better than shrinking all." in fourth(sets=better)
    assert (
        layer_selection.scales_title(better) == "At equal energy, all layers bring 12% of the whole fall, the stethoscope's 25%"
    )
    useless = set_table(full=dict(loss_change=0.001))
    assert "**does not lower the solution's loss** (+0.001 nats a token)" in fourth(sets=useless)
    assert layer_selection.scales_title(useless) == "The whole vector does not lower the solution's loss"
    assert "Of the closing sentence's" not in fourth(sets=set_table(full=dict(closing_change=0.0)))


def test_04_the_sets_are_told_apart():
    named = layer_sets.named_sets(set_table())
    assert named.index.is_unique and "random" not in named.index
    assert named.loc["greedy", "percentile"] == pytest.approx(0.8) and named.loc["greedy", "layers"] == "8 9 10 11 | 8 9 10 11"


# --- 05


NOISE = pd.DataFrame(
    [("batch size", 210, 0, 0.0), ("bfloat16", 210, 1, 1 / 210)], columns=["change", "problems", "flips", "share"]
)


def changed(table, where, **values):
    table = table.copy()
    for column, value in values.items():
        table.loc[where(table), column] = value
    return table


METRICS = ("exact_match", "math_verify")


def rival(metric="math_verify", **changes):
    """The stethoscope minus the whole vector shrunk to its energy, by metric; named changes go to one metric's row."""
    index = pd.MultiIndex.from_product([["stethoscope - full_shrunk"], METRICS], names=["pair", "metric"])
    table = pd.DataFrame(dict(difference=[0.2, -0.03], ci_low=[0.1, -0.045], ci_high=[0.3, -0.015]), index=index)
    table.loc[[("stethoscope - full_shrunk", metric)], list(changes)] = list(changes.values())
    return table


def fifth():
    """Tables of steps 05 and 06, made up: everything is lifted, half of it by format, and the stethoscope beats random sets."""
    shares = dict(base=0.2, full=0.4, full_shrunk=0.35, stethoscope=0.3, stethoscope_matched=0.3, scalpel=0.2)
    shares |= dict(random_1=0.25, random_2=0.26, random_3=0.27)
    rows = [
        dict(variant=name, subject=subject, accuracy=value, math_verify=value + 0.05, extractable=0.5 + value)
        for name, value in shares.items()
        for subject in ("all", "number_theory", "algebra")
    ]
    table = pd.DataFrame(rows)
    pairs = [
        dict(variant=row["variant"], subject=row["subject"], metric=metric, difference=row["accuracy"] - 0.2)
        | dict(ci_low=row["accuracy"] - 0.22, ci_high=row["accuracy"] - 0.18, gain_format_bound=(row["accuracy"] - 0.2) / 2)
        for row in rows
        for metric in METRICS
        if row["variant"] != "base"
    ]
    return table, pd.DataFrame(pairs)


def said_05(table=None, paired=None, noise=NOISE, headline="number_theory", against=None):
    made = fifth()
    table, paired = made[0] if table is None else table, made[1] if paired is None else paired
    return minerva_math.summary(table, paired, noise, headline, rival() if against is None else against)


def test_05_says_the_tables_numbers():
    table, paired = committed("05_minerva_math"), committed("06_significance")
    number, overall, _, form, flips = lines(said_05(table, paired))
    at = lambda name, subject, column="accuracy": table[(table["variant"] == name) & (table["subject"] == subject)][column].item()  # noqa: E731
    for line, subject in ((number, "number_theory"), (overall, "all")):
        both = {name: f"{at(name, subject):.1%} ({at(name, subject, 'math_verify'):.1%})" for name in set(table["variant"])}
        assert f": {both['base']} base, {both['full']} whole vector, **{both['stethoscope']}** stethoscope, " in line
        assert f"{both['full_shrunk']} whole vector shrunk to its energy; " in line
    matched, scalpel = (f"{at(name, 'number_theory'):.1%}" for name in ("stethoscope_matched", "scalpel"))
    assert f"{matched} on matched words, {scalpel} with the scalpel." in number
    row = paired.set_index(["variant", "subject", "metric"]).loc[("stethoscope", "number_theory", "exact_match")]
    assert (f"all tokens (paired interval {100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f} points)" in number) == (
        row["ci_low"] <= 0
    )
    randoms = [at(f"random_{i}", "all") for i in (1, 2, 3)]
    assert f"three random sets of as many layers give {min(randoms):.1%} to {max(randoms):.1%}." in overall
    assert ("**no better** than those" in overall) == (at("stethoscope", "all") <= max(randoms))
    gain = paired.set_index(["variant", "subject", "metric"]).loc[("full", "all", "exact_match")]
    assert (
        f"it gains {100 * gain['difference']:.1f} points, {100 * (gain['difference'] - gain['gain_format_bound']):+.1f} where answers are "
        f"readable under both and {100 * gain['gain_format_bound']:+.1f} where readability changed" in form
    )
    assert f"from {at('base', 'all', 'math_verify'):.1%} to {at('full', 'all', 'math_verify'):.1%}." in form
    assert flips == "- Rounding alone flips 0.0% to 0.5% of the verdicts."


def test_05_says_both_metrics_in_one_line_a_subject():
    number, overall, shrunk, form, _ = lines(said_05())
    both = "20.0% (25.0%) base, 40.0% (45.0%) whole vector, **30.0% (35.0%)** stethoscope, 35.0% (40.0%) whole vector shrunk to its energy"
    assert number == (
        f"- Number Theory (Paper: 29.6 % to 39.4 %), by exact match (by Math-Verify): {both}; "
        "30.0% on matched words, 20.0% with the scalpel."
    )
    assert overall == f"- Over all subjects: {both}; three random sets of as many layers give 25.0% to 27.0%."
    assert (
        "readably, the whole vector 90%: it gains 20.0 points, +10.0 where answers are readable under both and +10.0 where readability changed. Math-Verify"
        in form
    )
    assert form.endswith("goes from 25.0% to 45.0%.") and "by Math-Verify the stethoscope differs by -3.0 points" in shrunk


def test_05_says_whether_a_gain_is_told_from_none():
    table, paired = fifth()
    steth = lambda t: t["variant"].str.startswith("stethoscope") & (t["subject"] == "number_theory")  # noqa: E731
    assert "told from none" not in said_05()
    null = said_05(table, changed(paired, steth, ci_low=-0.01, ci_high=0.02))
    interval = "(paired interval -1.0 to +2.0 points)"
    assert f"**no gain there that can be told from none** on all tokens {interval} and matched words {interval}." in null
    assert "(a subject of one's own)" in said_05(headline="algebra")


def test_05_says_when_the_whole_vector_itself_lifts_nothing_of_the_headline():
    _, paired = fifth()
    full = lambda t: (t["variant"] == "full") & (t["subject"] == "number_theory")  # noqa: E731
    interval = "(paired interval -1.0 to +2.0 points)"
    flat = said_05(paired=changed(paired, full, ci_low=-0.01, ci_high=0.02))
    lifts = "The whole vector **lifts nothing there that can be told from none** by"
    assert f"{lifts} exact match {interval} and Math-Verify {interval}." in flat
    verify = lambda t: full(t) & (t["metric"] == "math_verify")  # noqa: E731
    assert f"{lifts} Math-Verify {interval}." in said_05(paired=changed(paired, verify, ci_low=-0.01, ci_high=0.02))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.03, "(paired interval +1.0 to +3.0 points): selecting layers does better than shrinking."),
        (
            -0.01,
            0.03,
            "(paired interval -1.0 to +3.0 points): no difference can be told, so **shrinking does as well as selecting**.",
        ),
        (-0.05, -0.01, "(paired interval -5.0 to -1.0 points): **shrinking does better than selecting**."),
    ],
)
def test_05_says_what_selecting_is_worth_beside_shrinking(low, high, said):
    against = rival(ci_low=low, ci_high=high, difference=(low + high) / 2)
    assert lines(said_05(against=against))[2].endswith(said)


def test_05_a_task_without_math_verify_is_judged_by_exact_match_alone():
    table, paired = fifth()
    bare = said_05(table.assign(math_verify=None), paired[paired["metric"] == "exact_match"], headline="algebra")
    assert "verify" not in bare and "by exact match: 20.0% base, 40.0% whole vector" in lines(bare)[0]
    assert "by exact match the stethoscope differs by +20.0 points" in lines(bare)[2]


def test_05_says_when_there_is_no_gain_to_split_and_when_it_may_all_be_format():
    table, paired = fifth()
    full = lambda t: (t["variant"] == "full") & (t["subject"] == "all")  # noqa: E731
    none = said_05(paired=changed(paired, full, difference=0.001, ci_low=-0.02))
    assert "**nothing that can be told from chance** (+0.1 points" in none and "readability changed" not in none
    assert "Math-Verify, which needs no sentence, **does not rise beyond chance**" in none
    assert minerva_math.gain_title(pd.Series(dict(ci_low=-0.01))) == "The whole vector's gain cannot be told from none"
    assert "**which is all of it**" in said_05(paired=changed(paired, full, gain_format_bound=0.5))
    worse = changed(table, lambda t: (t["variant"] == "stethoscope") & (t["subject"] == "all"), accuracy=0.26)
    assert "**no better** than those" in said_05(worse) and "no better" not in said_05()
    assert "flips none of the verdicts" in said_05(noise=NOISE.iloc[:1])
    assert "one random set of as many layers gives" in said_05(table[~table["variant"].isin(["random_2", "random_3"])])


def answers(turned):
    rows = [
        ("base", "a", 1, "a0"),
        ("base", "b", 0, "b0"),
        ("base", "b", 0, "b0"),
        ("full", "a", 1, "a1"),
        ("full", "b", turned, "b1"),
    ]
    rows.append(("scalpel", "a", 1, "a2"))
    return pd.DataFrame(rows, columns=["variant", "problem_id", "exact_match", "completion"])


def test_05_the_example_is_a_problem_that_the_second_solves_and_the_first_does_not():
    assert minerva_math.example_pair(answers(turned=1)) == ("b", {"base": "b0", "full": "b1"})
    assert minerva_math.example_pair(answers(turned=0)) == ("a", {"base": "a0", "full": "a1"})


def test_05_enough_tokens_are_enough_for_every_variant():
    curve = {"base": (0.1, 0.3, 0.3), "full": (0.2, 0.399, 0.4)}
    rows = [(name, limit, value) for name, values in curve.items() for limit, value in zip((8, 16, 32), values, strict=True)]
    limits = pd.DataFrame(rows, columns=["variant", "limit", "accuracy"])
    assert minerva_math.enough_tokens(limits) == 16 and minerva_math.enough_tokens(limits, share=1.0) == 32
    assert minerva_math.limit_title(limits, 0.001).startswith("16 tokens are enough")
    rising = limits[limits["limit"] < 32]
    assert minerva_math.limit_title(rising, 0.5) == "16 tokens may be too few: up to 50% of a variant's answers are cut"


def test_05_the_price_is_beside_the_base():
    table = committed("05_minerva_math")
    price = minerva_math.price(table, ["base", "full", "scalpel"])
    loss = minerva_math.overall(table, ["base", "full", "scalpel"])["general_loss"]
    assert list(price.index) == ["full", "scalpel"] and price["full"] == loss["full"] - loss["base"]


# --- 06


def measured(**changes):
    """Rows over all subjects of the stethoscope and the whole vector, by both metrics."""
    row = dict(subject="all", difference=0.1, ci_low=0.08, ci_high=0.12, mde=0.02, mde_unpaired=0.045, verdict="improved")
    row |= dict(z=3.5, p=0.0004, mcnemar_p=1e-9, gained=80, lost=20)
    verify = dict(difference=0.021, ci_low=0.01, ci_high=0.03, z=0.7, p=0.48, mcnemar_p=0.002, gained=40, lost=19)
    rows = [dict(row, metric="exact_match"), dict(row, metric="math_verify", **verify)]
    return pd.DataFrame([dict(one, variant=name) | changes for name in ("full", "stethoscope") for one in rows])


def ledger(**verdicts):
    """A ledger in which every claim is consistent, but for (like for like, strictly) of the claims given."""
    rows = []
    for name in claims.NAMES:
        for contrast in ("corpus", "matched") if name in ("C4", "C5", "C6", "C7") else ("-",):
            usual, strict = verdicts.get(name, ("consistent", "consistent")) if contrast != "matched" else ("contradicted",) * 2
            rows.append(dict(claim=name, contrast=contrast, testable=f"why {name}", verdict=usual, verdict_strict=strict))
    return pd.DataFrame(rows)


def test_06_counts_one_verdict_a_claim_and_says_the_tables_numbers_by_both_metrics():
    words = dict(C1=("by construction",) * 2, C3=("contradicted", "consistent"), C5=("consistent", "not testable"))
    words |= dict(C6=("consistent", "contradicted"))
    counted, failed, exact, verify = lines(significance.summary(measured(), ledger(**words)))
    assert counted == (
        "- Like for like, of 9 claims: 7 consistent, 1 by construction, 1 contradicted. "
        "Strictly: 6 consistent, 1 by construction, 1 not testable, 1 contradicted."
    )
    assert failed.startswith("- Contradicted on this rung: C3; strictly: C6. True **by construction**, whatever is measured: C1.")
    assert failed.endswith(" Not testable **strictly**: C5 (why C5).") and "**Not testable**" not in failed
    assert exact.startswith(
        "- By exact match the stethoscope changes accuracy by +10.0 points over all subjects (paired interval +8.0 to"
    )
    assert exact.endswith("2.0 points paired, 4.5 unpaired. Unpaired z = +3.50; McNemar p = 1e-09 with 80 gained and 20 lost.")
    assert verify.startswith("- By Math-Verify the stethoscope changes accuracy by +2.1 points") and "z = +0.70" in verify


def test_06_says_when_no_variant_improved_and_when_nothing_could_be_tested():
    null = dict(difference=0.001, ci_low=-0.01, ci_high=0.012, p=0.7, mcnemar_p=0.8, verdict="inconclusive")
    nothing = dict.fromkeys(claims.NAMES, ("not testable",) * 2)
    text = significance.summary(measured(**null), ledger(**nothing))
    assert lines(text)[-1].endswith("paired and corrected, by exact_match or math_verify.")
    assert text.count("**no change that can be told from none**") == text.count("**not significant by either test**") == 2
    reasons = "; ".join(f"{name} (why {name})" for name in claims.NAMES)
    assert (
        f"Contradicted on this rung: nothing; strictly: nothing. **Not testable**, and so not upheld either: {reasons}." in text
    )
    one = measured().assign(verdict=["improved", "no worse"] * 2)
    assert lines(significance.summary(one, ledger()))[-1].startswith("- **No variant improved**")
    assert lines(significance.summary(one, ledger()))[-1].endswith("corrected, by math_verify.")
    fine = significance.summary(measured(), ledger())
    assert (
        "Contradicted on this rung: nothing; strictly: nothing.\n" in fine and "testable" not in fine and "No variant" not in fine
    )


def test_06_a_task_with_exact_match_alone_is_told_by_that_alone():
    exact = measured()
    exact = exact[exact["metric"] == "exact_match"]
    text = significance.summary(exact, ledger())
    assert "By exact match" in text and "Math-Verify" not in text and "math_verify" not in text


def test_06_the_curve_of_discordance_holds_the_published_gain():
    curve = significance.discordance_curve()
    assert list(curve) == ["changed", "z", "unpaired", "crossing"]
    assert curve["changed"].iloc[0] == 53 and curve["changed"].iloc[-1] == 373 and (curve["changed"].diff().dropna() == 2).all()
    assert np.allclose(curve["z"], 53 / np.sqrt(curve["changed"])) and curve["unpaired"].iloc[0] == pytest.approx(
        3.4068, abs=1e-4
    )
    assert ((curve["z"] > curve["unpaired"]) == (curve["changed"] < curve["crossing"])).all()
    equal = significance.discordance_curve(dict(base_correct=5, edited_correct=5, n=10))
    assert (equal["z"] == 0).all() and equal["crossing"].isna().all()


def test_06_pairs_are_first_minus_second_by_both_metrics():
    pairs = significance.control_pairs(["base", "random_1", "random_2"])
    assert ("raw_shrunk", "scalpel") in pairs and pairs[-2:] == [("stethoscope", "random_1"), ("stethoscope", "random_2")]
    assert {("stethoscope", "full_shrunk"), ("stethoscope_matched", "full_shrunk")} <= set(pairs)
    rows = [(name, "s", str(i), int(i < right), int(i < 3), "x") for name, right in (("one", 6), ("two", 2)) for i in range(8)]
    records = pd.DataFrame(rows, columns=["variant", "subject", "problem_id", "exact_match", "math_verify", "extracted"])
    margins = significance.Margins(level=0.05, overall=0.03, subject=0.05, draws=100, seed=0)
    table = significance.pairs_table(records, [("one", "two"), ("one", "absent")], margins)
    assert list(table.index) == [(pair, metric) for pair in ("one - two", "one - absent") for metric in significance.METRICS]
    exact = table.loc[("one - two", "exact_match")]
    assert exact["difference"] == 0.5 and exact["gained"] == 4 and table.loc[("one - two", "math_verify"), "difference"] == 0
    assert table.loc["one - absent", "difference"].isna().all()


def test_05_the_headline_holds_the_stethoscope_against_random_sets_and_against_shrinking():
    rows = [("stethoscope", 0.3, 0.35), ("random_1", 0.4, 0.2), ("random_2", 0.2, 0.35), ("full_shrunk", 0.5, 0.3)]
    table = pd.DataFrame(rows, columns=["variant", "accuracy", "math_verify"]).assign(subject="all")
    assert (
        minerva_math.headline_title(table, "all", "All") == "All, by Math-Verify: the stethoscope is\nahead of 1 of 2 random sets"
    )
    alone = minerva_math.headline_title(table.assign(math_verify=np.nan), "all", "All")
    assert alone == "All, by exact match: the stethoscope is\nahead of 1 of 2 random sets, behind shrinking"
    assert minerva_math.headline_title(table[table["variant"] == "random_1"], "all", "All") == "All"


def test_05_by_which_metric_the_stethoscope_is_no_better_than_random_sets_is_said():
    rows = [("stethoscope", 0.3, 0.35), ("random_1", 0.4, 0.2)]
    table = pd.DataFrame(rows, columns=["variant", "accuracy", "math_verify"]).assign(subject="all")
    both = ["exact_match", "math_verify"]
    assert minerva_math._beside_random(table, both).endswith("are **no better** than those by exact match.")
    assert minerva_math._beside_random(table.assign(math_verify=0.1), both).endswith("by exact match or by Math-Verify.")
    assert minerva_math._beside_random(table.assign(accuracy=[0.5, 0.4]), both) == ""
