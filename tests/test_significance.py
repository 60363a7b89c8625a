import numpy as np
import pandas as pd
import pytest

from stetholib import significance as sg
from stetholib import statistics as st
from stetholib.errors import UserError
from stetholib.store.tables import CONTRACTS

MARGINS = sg.Margins(level=0.05, overall=0.03, subject=0.05, draws=2000, seed=0)


def test_the_published_figure_comes_from_the_harnesss_standard_errors_only():
    table = sg.published().set_index("test")
    assert table.loc["harness", "z"] == pytest.approx(3.40680, abs=5e-6) and table.loc["harness", "p"] == pytest.approx(
        0.000657, abs=5e-7
    )
    assert table.loc["unpooled", "z"] == pytest.approx(3.40996, abs=5e-6) and table.loc["unpooled", "p"] == pytest.approx(
        0.000650, abs=5e-7
    )
    assert table.loc["pooled", "z"] == pytest.approx(3.39175, abs=5e-6) and table.loc["pooled", "p"] == pytest.approx(
        0.000694, abs=5e-7
    )
    printed = {name: (f"{row.z:+.2f}", f"{row.p:.4f}") for name, row in table.iterrows()}
    assert [name for name, both in printed.items() if both == ("+3.41", "0.0007")] == ["harness"]
    assert f"{160 / 540:.1%} {213 / 540:.1%}" == "29.6% 39.4%"


@pytest.mark.parametrize(
    ("difference", "p", "low", "word"),
    [
        (0.1, 0.01, 0.02, "improved"),
        (-0.1, 0.01, -0.2, "degraded"),
        (0.01, 0.5, -0.02, "no worse"),
        (-0.01, 0.5, -0.06, "inconclusive"),
    ],
)
def test_verdicts_in_their_order(difference, p, low, word):
    assert sg.verdict(difference, p, low, 0.05, 0.05) == word


def records(variant, verdicts, subject="algebra", extracted="7", verify=None):
    return pd.DataFrame(
        dict(
            variant=variant,
            subject=subject,
            problem_id=[f"{subject}{i}" for i in range(len(verdicts))],
            exact_match=verdicts,
            math_verify=verdicts if verify is None else verify,
            extracted=extracted,
        )
    )


def drawn(variant, seed, n=80):
    rng = np.random.default_rng(seed)
    parts = [records(variant, rng.integers(0, 2, n), s, verify=rng.integers(0, 2, n)) for s in ("algebra", "geometry")]
    return pd.concat(parts)


def test_every_number_of_a_row_can_be_recomputed_from_it():
    table = sg.measure(pd.concat([drawn("base", 0), drawn("full", 1)]), MARGINS)
    assert table["subject"].tolist() == ["all", "algebra", "geometry"] * 2
    assert table["metric"].tolist() == ["exact_match"] * 3 + ["math_verify"] * 3
    assert not table.duplicated(CONTRACTS["06_significance"][0]).any() and set(CONTRACTS["06_significance"][1]) <= set(table)
    for row in table.itertuples():
        assert row.difference == pytest.approx(row.accuracy - row.base_accuracy) == pytest.approx((row.gained - row.lost) / row.n)
        assert row.gain_both_extractable + row.gain_format_bound == pytest.approx(row.difference)
        assert row.mcnemar_p == pytest.approx(st.mcnemar(row.gained, row.lost))
        assert row.verdict == sg.verdict(row.difference, row.mcnemar_p_holm, row.ci_low, row.margin, 0.05)
        assert row.mde_unpaired == st.minimum_detectable_unpaired(row.base_accuracy, row.n, 0.05)
    for _, rows in table.groupby("metric"):
        family = rows[rows["subject"] != "all"]
        assert np.allclose(family["mcnemar_p_holm"], st.holm(family["mcnemar_p"]))
        assert rows["mcnemar_p_holm"].iloc[0] == rows["mcnemar_p"].iloc[0] and rows["margin"].tolist() == [0.03, 0.05, 0.05]
    assert table[["ci_low_family", "ci_high_family"]].isna().all(axis=None), "without families nobody can resample them"


def test_each_metric_is_judged_by_its_own_verdicts():
    base, full = records("base", [0, 0, 1, 1], verify=[0, 0, 0, 1]), records("full", [1, 1, 1, 1], verify=[1, 0, 1, 1])
    table = sg.measure(pd.concat([base, full]), MARGINS).set_index(["subject", "metric"])
    assert table.loc[("all", "exact_match"), ["base_accuracy", "accuracy"]].tolist() == [0.5, 1.0]
    assert table.loc[("all", "math_verify"), ["base_accuracy", "accuracy"]].tolist() == [0.25, 0.75]


@pytest.mark.parametrize(("gained", "by_score"), [(sg.FEW - 2, True), (sg.FEW - 1, False)])
def test_the_interval_is_a_score_interval_where_few_pairs_are_discordant_and_a_bootstrap_elsewhere(gained, by_score):
    base, full = np.zeros(200, int), np.zeros(200, int)
    full[:gained], base[-1] = 1, 1
    row = sg.compare(records("base", base), records("full", full), MARGINS).iloc[0]
    expected = (
        st.score_interval(gained, 1, 200, 0.05) if by_score else st.bootstrap_interval(gained, 1, 200, 0.05, MARGINS.draws, 0)
    )
    assert (row["ci_low"], row["ci_high"]) == expected


def test_families_are_resampled_whole_and_one_family_has_no_interval():
    both, families = [drawn(name, seed) for name, seed in (("base", 0), ("full", 1))], {}
    for name in both[0]["problem_id"]:
        families[name] = "one" if name.startswith("geometry") else f"family {int(name.removeprefix('algebra')) % 4}"
    table = sg.measure(pd.concat(both), MARGINS, families).set_index(["subject", "metric"])
    pair = [one[one["subject"] == "algebra"] for one in both]
    difference = pair[1]["exact_match"].to_numpy() - pair[0]["exact_match"].to_numpy()
    expected = st.cluster_interval(difference, pair[0]["problem_id"].map(families), 0.05, MARGINS.draws, 0)
    found = table.loc[("algebra", "exact_match"), ["ci_low_family", "ci_high_family"]]
    assert tuple(found) == expected and found.iloc[0] < table.loc[("algebra", "exact_match"), "difference"] < found.iloc[1]
    assert np.isnan(table.loc[("geometry", "exact_match"), "ci_low_family"]) and table.loc["all", "ci_low_family"].notna().all()


def test_variants_are_measured_beside_any_other():
    every = pd.concat([drawn(name, seed) for seed, name in enumerate(("base", "full_shrunk", "stethoscope"))])
    beside = sg.measure(every[every["variant"] != "base"], MARGINS, base="full_shrunk")
    assert set(beside["variant"]) == {"stethoscope"} and len(beside) == 6
    row = sg.paired_against(every, "full_shrunk", "stethoscope", MARGINS, "math_verify")
    assert beside.set_index(["subject", "metric"]).loc[("all", "math_verify"), "difference"] == row["difference"]


def test_the_gain_splits_into_content_and_format_as_worked_by_hand():
    base = records("base", [0, 1, 0, 0], extracted=["3", "4", "[invalidanswer]", "[invalidanswer]"], verify=[0, 1, 0, 0])
    full = records("full", [1, 0, 1, 0], extracted=["3", "5", "6", "[invalidanswer]"], verify=[1, 1, 1, 1])
    row = sg.compare(base, full, MARGINS).set_index("subject").loc["algebra"]
    assert row["gain_both_extractable"] == 0 and row["gain_format_bound"] == 0.25 and row["difference"] == 0.25
    row = sg.compare(base, full, MARGINS, "math_verify").set_index("subject").loc["algebra"]
    assert row["gain_both_extractable"] == 0.5 and row["gain_format_bound"] == 0.25 and row["difference"] == 0.75


def test_variants_that_answered_different_problems_cannot_be_compared():
    with pytest.raises(UserError, match="they share 3"):
        sg.compare(records("base", [0, 1, 0, 0]), records("full", [1, 0, 1]), MARGINS)


def test_a_comparison_of_a_variant_that_was_not_answered_says_so():
    assert np.isnan(sg.paired_against(records("base", [0, 1]), "base", "absent", MARGINS)["difference"])


def test_a_problem_that_a_data_set_holds_twice_is_two_pairs():
    one = pd.DataFrame(dict(subject="algebra", problem_id=["a", "a", "b"], exact_match=[1, 1, 0], extracted="4"))
    row = sg.compare(one, one.assign(exact_match=[0, 0, 1]), MARGINS).iloc[0]
    assert (row["n"], row["gained"], row["lost"]) == (3, 1, 2)


def test_one_problem_gives_no_standard_error_and_no_verdict():
    assert np.isnan(st.harness_z(0, 1, 1))
    both = pd.concat([records("base", [0]), records("full", [1])])
    table = sg.measure(both, sg.Margins(0.05, 0.03, 0.05, 200, 0)).set_index(["variant", "subject", "metric"])
    row = table.loc[("full", "algebra", "exact_match")]
    assert np.isnan(row["z"]) and row["verdict"] != "improved" and row["mde_unpaired"] == 1
