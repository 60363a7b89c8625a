"""Over many worlds: the spread of each figure, and whether the fine-tune does in them what the claims presuppose."""

from math import sqrt

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats

from stetholib.commands.seeds import spread


def over(**columns):
    return spread(pd.DataFrame(columns)).set_index("quantity")


def test_the_interval_over_worlds_is_students():
    row = over(world=[0, 1, 2], gain_full=[0.1, 0.2, 0.3]).loc["gain_full"]
    half = stats.t.ppf(0.975, 2) * 0.1 / sqrt(3)
    assert row[["n", "reference", "mean", "sd"]].tolist() == pytest.approx([3, 0, 0.2, 0.1])
    assert row[["low", "high"]].tolist() == pytest.approx([0.2 - half, 0.2 + half]) and row["verdict"] == "cannot be told"
    wide = spread(pd.DataFrame(dict(gain_full=[0.1, 0.2, 0.3])), level=0.2).iloc[0]
    assert wide["high"] - wide["low"] == pytest.approx(2 * stats.t.ppf(0.9, 2) * 0.1 / sqrt(3)) and wide["verdict"] == "above 0"


def test_the_verdict_is_against_what_a_figure_is_held_to():
    table = over(
        world=[0, 1, 2, 3],
        gain_stethoscope=[-0.1, -0.11, -0.09, -0.1],
        rho_corpus=[-0.9, 0.9, 0.3, -0.2],
        percentile_corpus=[0.6, 0.61, 0.59, 0.6],
        percentile_matched=[0.4, 0.41, 0.39, 0.4],
        reliability_sets=[0.3, 0.9, 0.5, 0.4],
        r_held_out=[0.05, 0.06, 0.05, 0.04],
        misalignment_index=[0.8, 0.8, 0.8, 0.8],
        p_full_number_theory=[0.1, 0.2, 0.3, 0.4],
        note=list("abcd"),
    )
    assert table["verdict"].to_dict() == {
        "gain_stethoscope": "below 0",
        "rho_corpus": "cannot be told",
        "percentile_corpus": "above 0.5",
        "percentile_matched": "below 0.5",
        "reliability_sets": "cannot be told",
        "r_held_out": "below 0.1",
        "misalignment_index": "above 0.5",
    }, "neither the world's number, nor words, nor p-values have a mean"


def test_of_one_world_nothing_can_be_told_and_a_world_without_the_figure_does_not_count():
    one = over(world=[0], gain_full=[0.2]).loc["gain_full"]
    assert (one["n"], one["mean"], one["verdict"]) == (1, 0.2, "cannot be told") and one[["sd", "low", "high"]].isna().all()
    some = over(world=[0, 1, 2], rho_depth=[0.5, np.nan, 0.7]).loc["rho_depth"]
    assert (some["n"], some["mean"]) == (2, pytest.approx(0.6))
    assert over(world=[0, 1], rho_depth=[np.nan, np.nan]).loc["rho_depth", "verdict"] == "cannot be told"


# --- what the claims presuppose of the miniature: a fine-tune that teaches mathematics, in Number Theory as elsewhere


@pytest.fixture(scope="module")
def full():
    """The whole vector of world 0 beside the base, by metric and subject."""
    table = pd.read_csv(ROOT / "figures" / "mini" / "06_significance.csv")
    return table[table["variant"] == "full"].set_index(["metric", "subject"])


def test_the_whole_vector_lifts_number_theory(full):
    row = full.loc[("exact_match", "number_theory")]
    assert row["difference"] >= 0.10 and row["mcnemar_p"] < 0.001


def test_the_whole_vector_lifts_mathematics_and_not_only_format(full):
    verified = full.loc["math_verify"]
    assert verified.loc["all", "difference"] >= 0.08
    lifted = verified.index[verified["verdict"] == "improved"].difference(["all", "number_theory"])
    assert len(lifted) >= 2, list(lifted)


def test_every_subject_has_room_to_rise_and_to_fall(full):
    base = full.loc["exact_match"].drop("all")["base_accuracy"]
    assert len(base) == 7 and base.between(0.05, 0.90).all(), base.to_dict()


def test_at_least_four_worlds_in_five_say_the_same():
    worlds = pd.read_csv(ROOT / "figures" / "seeds" / "worlds.csv")
    theory = (worlds["gain_full_number_theory"] >= 0.10) & (worlds["p_full_number_theory"] < 0.001)
    assert worlds["world"].tolist() == [0, 1, 2, 3, 4]
    assert (theory & (worlds["gain_full_math_verify"] >= 0.08)).sum() >= 4
