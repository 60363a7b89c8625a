"""Do validation losses tell layers, and sets of layers, apart? Known answers: planted effects with noise, and noise alone."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from stetholib import layer_sets
from stetholib.layer_sets import PlannedSet
from stetholib.models.streams import DocumentLosses

PROBLEMS, SUBJECTS = 140, [f"s{at % 7}" for at in range(140)]
HALVES = np.stack([layer_sets.halving(SUBJECTS, seed) for seed in range(100)])


def noise(rows, scale, seed=0):
    return scale * np.random.default_rng(seed).normal(size=(rows, PROBLEMS))


def test_the_agreement_of_halves_is_what_signal_and_noise_say():
    signal = np.random.default_rng(1).normal(size=(400, 1))
    for scale in (1.0, 6.0, 12.0):
        # a half's mean has the signal's variance, 1, and the noise's over its problems: Pearson's r between halves
        pearson = signal.var() / (signal.var() + scale**2 / (PROBLEMS / 2))
        spearman = 6 / np.pi * np.arcsin(pearson / 2)
        assert layer_sets.agreement_of_halves(signal + noise(400, scale), HALVES) == pytest.approx(spearman, abs=0.06)


def test_noise_alone_agrees_with_nothing_and_looks_well_only_in_sample():
    held_out, in_sample = [], []
    for seed in range(8):
        change = noise(60, 1.0, seed) - 0.5
        held, inside = layer_sets.resolution(change, 50, np.full(PROBLEMS, -1.0), HALVES)
        held_out.append(held), in_sample.append(inside)
    assert abs(np.mean(held_out)) < 0.05 and np.mean(in_sample) > 0.2
    found = [layer_sets.agreement_of_halves(noise(60, 1.0, seed), HALVES) for seed in range(8)]
    assert abs(np.mean(found)) < 0.1


def test_a_planted_set_is_found_and_is_worth_as_much_held_out():
    change = noise(60, 0.3) - 0.5
    change[55] -= 0.25
    held_out, in_sample = layer_sets.resolution(change, 50, np.full(PROBLEMS, -1.0), HALVES)
    assert held_out == pytest.approx(0.25, abs=0.06) and in_sample == pytest.approx(0.25, abs=0.06)
    raises = layer_sets.resolution(change, 50, np.full(PROBLEMS, 1.0), HALVES)
    assert raises == (held_out, in_sample), "positive is better, also where the whole vector does harm"


def test_what_cannot_be_ranked_is_not_a_number():
    flat = np.zeros((3, PROBLEMS))
    assert np.isnan(layer_sets.agreement_of_halves(flat, HALVES))
    assert np.isnan(layer_sets.resolution(flat, 3, np.zeros(PROBLEMS), HALVES)).all()


def plan(layers=6, count=2):
    every = tuple(range(layers))
    found = [PlannedSet("full", 0, "-", every), PlannedSet("full_shrunk", 0, "-", every, 0.5)]
    found += [PlannedSet("only", x, "-", (x,)) for x in every]
    found += [PlannedSet("without", x, "-", tuple(y for y in every if y != x)) for x in every]
    found += [PlannedSet("first", 0, "-", (0, 1)), PlannedSet("greedy", 0, "-", (0, 2)), PlannedSet("middle", 0, "-", (2, 3))]
    return found + [PlannedSet("random", i, "-", s) for i, s in enumerate(combinations(range(1, layers), count))]


def losses(signal, scale, seed=0):
    """Losses whose solution part has planted effects by layer and whose closing sentence is noise, as `loss_of` gives them."""
    each = noise(64, scale, seed)

    def loss_of(layers, alpha):
        fall = alpha * sum(signal[x] + each[x] for x in layers) + np.zeros(PROBLEMS)
        closing = alpha * np.random.default_rng([len(layers), *layers]).normal(size=PROBLEMS)
        return DocumentLosses(5 - fall, 5 - closing, np.full(PROBLEMS, 3.0))

    return loss_of


def test_the_table_says_what_can_be_told_and_by_which_loss():
    signal = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    table = layer_sets.reliability(plan(), losses(signal, 0.5), SUBJECTS, seed=0).set_index(["what", "loss"])
    # ten random pairs without layer 0, and two named; one named is also random, and greedy's saw the losses
    assert table["n"].to_dict() == {
        (what, loss): {"sets": 11}.get(what, 6) for what in ("alone", "left_out", "sets") for loss in ("solution", "closing")
    }
    assert (table.xs("solution", level="loss")["reliability"] > 0.95).all()
    assert (table.xs("closing", level="loss")["reliability"].abs() < 0.7).all()
    sets = table.loc[("sets", "solution")]
    assert sets["r_held_out"] == pytest.approx((9 - 4) / 15, abs=0.03)  # {0 1} brings 9, the median random pair 4, all 15
    assert table.loc[["alone", "left_out"], ["r_held_out", "r_in_sample"]].isna().all().all()
    assert layer_sets.tells_apart(table.reset_index())
    again = layer_sets.reliability(plan(), losses(signal, 0.5), SUBJECTS, seed=0)
    pd.testing.assert_frame_equal(again, table.reset_index())


def test_a_world_that_ranks_by_noise_is_told():
    table = layer_sets.reliability(plan(), losses(np.ones(6), 3.0), SUBJECTS, seed=0)
    assert not layer_sets.tells_apart(table)


@pytest.mark.parametrize(
    ("reliability", "held_out", "told"),
    [(0.5, 0.1, True), (0.49, 0.1, False), (0.5, 0.09, False), (np.nan, 0.5, False), (0.9, np.nan, False)],
)
def test_the_bars_are_those_that_were_fixed(reliability, held_out, told):
    rows = [("sets", "solution", 9, reliability, held_out, 0.9), ("sets", "closing", 9, 1.0, 1.0, 1.0)]
    columns = ["what", "loss", "n", "reliability", "r_held_out", "r_in_sample"]
    assert layer_sets.tells_apart(pd.DataFrame(rows, columns=columns)) is told
