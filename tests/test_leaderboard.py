from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from stetholib import leaderboard
from stetholib.errors import UserError
from stetholib.models.streams import DocumentLosses

WORTH = np.array([3.0, 1.0, 1.0, 4.0, 0.0])
HARD, TOKENS = np.arange(20.0, 26.0), np.full(6, 10.0)


def of(layers, alpha=1.0):
    """Losses of six problems: how hard each is, less what the layers are worth, the last layer on the first problem only."""
    fall = WORTH[list(layers)].sum() + np.where(np.arange(6) == 0, 6.0 * (4 in layers), 0.0)
    return DocumentLosses(HARD - fall, np.zeros(6), TOKENS)


def paired_error(one, other):
    """The formula for two edits alone."""
    difference = of(one).nats() - of(other).nats()
    return np.sqrt(len(difference) * difference.var(ddof=1)) / TOKENS.sum()


STUDY = SimpleNamespace(world=SimpleNamespace(layers=5), losses=SimpleNamespace(of=of, subjects=["sums"] * 6))


def test_every_set_is_ranked_by_what_its_layers_are_worth_and_equals_share_a_place():
    board = leaderboard.all_sets(STUDY, 2)
    assert {tuple(map(int, one.split())) for one in board["layers"]} == {*combinations(range(5), 2)} and len(board) == 10
    assert board["layers"].tolist()[:4] == ["0 3", "1 3", "2 3", "3 4"] and board["layers"].tolist()[-1] == "2 4"
    assert board["loss"][0] == pytest.approx((HARD.sum() - 6 * 7) / 60) and board["loss"].is_monotonic_increasing
    share = board.set_index("layers")["share"]
    assert share["0 3"] == 1 and share["1 3"] == share["2 3"] == share["3 4"] == pytest.approx(7 / 9)
    assert share["1 4"] == share["2 4"] == share["1 2"] == pytest.approx(1 / 9) and share.mean() == pytest.approx(0.5)


def test_losses_by_problem_are_those_of_the_sets_in_their_order():
    found = leaderboard.by_problem(STUDY, ["0 3", "3 4"])
    assert found.shape == (2, 6) and (found[0] == HARD - 7).all() and (found[1] == HARD - 4 - np.array([6, 0, 0, 0, 0, 0])).all()


def test_the_paired_error_forgets_what_is_hard_about_a_problem():
    found = leaderboard.paired_errors(STUDY, ["0 3", "0 1", "1 4", "1"])
    assert found[0, 1] == 0  # three nats on every problem: no noise at all
    difference = np.array([6.0, 0, 0, 0, 0, 0])
    expected = np.sqrt(6 * difference.var(ddof=1)) / 60
    assert found[2, 3] == pytest.approx(expected) and expected > 0


def test_the_paired_errors_of_all_sets_are_those_of_each_two():
    sets = ["0 3", "1 4", "3 4", "1"]
    found = leaderboard.paired_errors(STUDY, sets)
    edits = [tuple(map(int, one.split())) for one in sets]
    assert np.allclose(found, [[paired_error(one, other) for other in edits] for one in edits], atol=1e-9)


@pytest.mark.parametrize("size", [0, 5, 6])
def test_a_size_that_leaves_nothing_to_choose_is_refused_in_one_line(size):
    with pytest.raises(UserError, match="nothing to choose"):
        leaderboard.all_sets(STUDY, size)
