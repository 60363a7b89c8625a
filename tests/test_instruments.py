"""Other instruments in the place of a world's SAEs."""

import numpy as np
import pytest
import torch
from test_steps import SMALL
from test_steps import study as world  # noqa: F401  # a fixture

from stetholib.models.sums import CONTRASTS
from stetholib.study import instruments
from stetholib.study.instruments import Doubles, over_seeds, random_scores, reseeded, scores_of

assert SMALL


def test_random_dictionaries_are_as_wide_and_as_sparse_as_the_saes_and_differ_by_seed(world):  # noqa: F811
    step = world.sae_features
    tests, one = step.self_tests(), Doubles(step, 0)
    theirs = one.self_tests()
    assert (theirs["d_sae"] == tests["d_sae"]).all() and theirs["l0"].to_numpy() == pytest.approx(tests["l0"], rel=0.02)
    found = random_scores(step, 3)
    for contrast in CONTRASTS:
        assert found[contrast].shape == (3, len(tests)) and len(np.unique(found[contrast].round(6), axis=0)) == 3
    assert np.array_equal(found["corpus"][0], scores_of(one, "corpus"), equal_nan=True)


def test_a_frozen_decoder_stays_as_it_was_drawn_and_its_encoder_learns(world):  # noqa: F811
    step = world.sae_features
    frozen = instruments.frozen(step)
    with frozen.dictionaries.opened() as held, step.dictionaries.opened() as learnt:
        directions = [torch.nn.functional.normalize(one[0].W_dec, dim=1) for one in (held, learnt)]
    spread = [float((one @ one.T - torch.eye(len(one))).abs().mean()) for one in directions]
    width = directions[0].shape[1]
    assert spread[0] == pytest.approx((2 / np.pi / width) ** 0.5, rel=0.15)  # mean |cosine| of random directions
    assert np.isfinite(scores_of(frozen, "corpus")).any() and frozen.self_tests()["l0"].gt(0).all()


def test_over_seeds_a_step_agrees_with_itself_and_seeds_are_counted(world):  # noqa: F811
    step, count = world.sae_features, world.layer_selection.selected_count
    same = over_seeds(step, [step], count)
    believed = same["score"].notna()
    assert same.loc[believed, "agreement"].to_numpy() == pytest.approx(1.0) and set(same["seed_share"]) == {0.0, 1.0}
    assert same.loc[believed, "weighted"].to_numpy() == pytest.approx(same.loc[believed, "score"])
    (other,) = reseeded(step, 1)
    found = over_seeds(step, [other], count)
    assert set(found["seed_share"]) <= {0.0, 0.5, 1.0} and found["seed_share"].sum() == pytest.approx(2 * count)
    assert (found["agreement"].dropna() < 0.999).all() and (found["chance"] == 10 / 32).all()
