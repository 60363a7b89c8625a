"""Where the truth is known: what the table of rules says there, and over worlds."""

import numpy as np
import pandas as pd
import pytest
from test_steps import SMALL

from stetholib import Study
from stetholib import known_layers as kl
from stetholib.commands import organisms
from stetholib.commands.organisms import bars
from stetholib.commands.seeds import spread
from stetholib.errors import UserError
from stetholib.layer_sets import PlannedSet, standing
from stetholib.statistics import mean_interval
from stetholib.store.tables import FURTHER
from stetholib.study.layer_selection import known_layers

KNOWN = (2, 3, 8, 9)
RULES = {
    "stethoscope": ("corpus", np.array([0, 0, 1, 3, 2, 0, 0, 0, 0.5, 2.5, 1.5, 0])),
    "stethoscope_rise": ("corpus", np.array([0, 0, 5, 4, 1, 0, 0, 0, 5, 4, 0, 0.0])),
}


def sets(**shares):
    """A table of sets of layers in which the whole vector's fall is 2, and each set has this share of it."""
    shares = {"full": 1.0, "known": 0.9, "outside": 0.1, "stethoscope": 0.7, "stethoscope_rise": 0.9} | shares
    layers = {"full": " ".join(map(str, range(12))), "known": "2 3 8 9", "outside": "0 1 4 5 6 7 10 11", "stethoscope": "3 4 9 10", "stethoscope_rise": "2 3 8 9"}  # fmt: skip
    rows = [dict(selector=name, draw=0, contrast="-", layers=layers[name], loss_change=-2 * share, percentile=share, percentile_low=share - 0.1, percentile_high=share + 0.1) for name, share in shares.items()]  # fmt: skip
    return pd.DataFrame(rows)


def reliability(rho=0.9, held_out=0.4):
    return pd.DataFrame([dict(what="sets", loss="solution", n=100, reliability=rho, r_held_out=held_out, r_in_sample=0.5)])


def test_the_table_says_what_each_rule_finds():
    table = kl.measure(RULES, sets(), KNOWN).set_index("selector")
    keys, columns = FURTHER["04_known_layers"]
    assert {*keys, *columns} == {*table.reset_index()}
    assert table.loc["stethoscope_rise", ["auroc", "overlap", "exact", "share"]].tolist() == pytest.approx([1.0, 4, True, 0.9])
    row = table.loc["stethoscope"]
    # of 32 pairs the known 3 and 9 win 8 each, 2 wins against six of eight, 8 against six
    assert row["auroc"] == pytest.approx((8 + 8 + 6 + 6) / 32) and row["overlap"] == 2 and not row["exact"]
    assert row[["share", "percentile", "percentile_low"]].tolist() == pytest.approx([0.7, 0.7, 0.6])


def test_the_known_layers_and_the_others_are_planned():
    assert kl.planned((1, 2), 4) == [PlannedSet("known", 0, "-", (1, 2)), PlannedSet("outside", 0, "-", (0, 3))]


def test_a_vector_without_mathematics_tests_no_rule_and_its_summary_says_so():
    control = sets(known=0.99).assign(loss_change=[0.4, 0.0, 0.4, 0.3, 0.0])  # the known layers learnt nothing, all others harm
    assert not kl.holds(control, reliability()) and kl.holds(sets(known=0.99), reliability())
    table = kl.measure(RULES, control, KNOWN)
    assert table["share"].isna().all() and "**there is nothing to find**" in kl.summary(table, control, reliability())


@pytest.mark.parametrize(
    ("given", "told"), [((0.97, 0.9, 0.4), True), ((0.9, 0.9, 0.4), False), ((0.97, 0.7, 0.4), False), ((0.97, 0.9, 0.2), False)]
)
def test_a_world_can_test_a_rule_where_it_passes_every_bar(given, told):
    ahead, rho, held_out = given
    assert kl.holds(sets(known=ahead), reliability(rho, held_out)) == told


def test_the_summary_says_that_the_place_is_a_construction_and_who_found_it():
    text = kl.summary(kl.measure(RULES, sets(), KNOWN), sets(), reliability())
    assert (
        "put into layers 2, 3, 8, 9: **by construction**. Alone they bring 90% of the whole vector's fall, all others 10%" in text
    )
    assert "**cannot test a rule**" in text and "picked by *stethoscope_rise*" in text and "the paper's has 0.88" in text
    assert "can test a rule" in kl.summary(kl.measure(RULES, sets(), KNOWN), sets(known=0.99), reliability())


def test_rules_over_worlds_have_students_interval_and_a_bet_is_put_in_words():
    worlds = pd.concat([standing(sets(stethoscope=share)).assign(world=at) for at, share in enumerate((0.4, 0.5, 0.6))])
    organisms = pd.concat([kl.measure(RULES, sets(), KNOWN).assign(world=at, holds=at < 2) for at in (0, 0, 1, 2)])
    table = kl.over_worlds(worlds, organisms)
    row = table.loc["stethoscope"]
    assert row[["worlds", "percentile"]].tolist() == pytest.approx([3, 0.5])
    reference = spread(pd.DataFrame(dict(world=[0, 1, 2], x=[0.4, 0.5, 0.6]))).iloc[0]
    assert row[["low", "high"]].tolist() == pytest.approx(reference[["low", "high"]].tolist())
    assert row[["organisms", "auroc", "exact", "runs"]].tolist() == pytest.approx(
        [2, 0.875, 0, 3]
    )  # the one that does not hold is out
    assert (
        table.loc["stethoscope_rise", "exact"] == 3 and "full" not in table.index and table["percentile"].is_monotonic_decreasing
    )
    said = kl.bet(table)
    assert said.startswith(
        "Over 3 worlds *stethoscope_rise* does best: the sets it picks beat 90.0 % (90.0 % to 90.0 %) of random sets"
    )
    assert "*stethoscope_rise* finds them best (AUROC 1.00, exact in 3 of 3; the stethoscope AUROC 0.88, exact in 0" in said
    assert "Where the layers are known" not in kl.bet(kl.over_worlds(worlds))
    level = kl.bet(table.assign(auroc=1.0, exact=3, runs=3))
    assert "are known, *stethoscope_rise*, *stethoscope* find them best (AUROC 1.00, exact in 3 of 3" in level
    assert level.endswith("Of these *stethoscope_rise* does best in the worlds too, with 90.0 % (90.0 % to 90.0 %).")
    alone = kl.bet(kl.over_worlds(worlds[worlds["world"] == 0]))
    assert alone.startswith("In the default world *stethoscope_rise* does best: its set beats 90.0 % of random sets; ")


def test_a_mean_of_one_value_has_no_interval():
    mean, low, high = mean_interval([0.3, float("nan")])
    assert mean == pytest.approx(0.3) and np.isnan([low, high]).all() and np.isnan(mean_interval([])[0])


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A small world whose vector has mathematics in layer 1 alone, and asks every instrument."""
    apart = {"finetune.blocks": [1], "finetune.aside_documents": 24, "finetune.aside_learning_rate": 0.004}
    return Study.open("smoke", SMALL | apart | {"selection.thorough": True}, root=tmp_path_factory.mktemp("grown"))


def test_a_world_of_two_tasks_says_what_every_rule_finds(grown):
    step = grown.layer_selection
    table = known_layers(step)
    assert {"stethoscope", "stethoscope_rise", "excess", "frozen_decoder", "taylor", "mean_difference"} <= set(table["selector"])
    assert table["auroc"].between(0, 1).all() and (table["exact"] == (table["layers"] == "1")).all()
    change = step.sets().set_index(["selector", "draw"])["loss_change"]
    assert change["known", 0] == change["only", 1] and change["outside", 0] == change["without", 1]
    found = bars(grown)
    assert found["known"] == "1" and found["share_known"] == pytest.approx(change["known", 0] / change["full", 0])
    assert found["energy_lowest"] <= 1 <= found["energy_highest"] and isinstance(found["holds"], bool)


def test_a_world_without_known_layers_has_no_such_table_and_organisms_refuse_it(tmp_path):
    assert known_layers(Study.open("smoke", SMALL, root=tmp_path).layer_selection) is None
    with pytest.raises(UserError, match="profile smoke names no finetune.blocks"):
        organisms.run(["smoke"], "cpu", 1, tmp_path)
    with pytest.raises(UserError, match="SAES must be 1 or more"):
        organisms.run(["organism"], "cpu", 0, tmp_path)
