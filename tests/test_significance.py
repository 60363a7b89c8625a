import numpy as np
import pandas as pd
import pytest
from scipy import stats

from stetholib import significance as sg
from stetholib.errors import UserError

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


def test_the_harnesss_standard_error_is_its_own():
    from lm_eval.api.metrics import mean_stderr

    y = [1] * 160 + [0] * 380
    assert sg.harness_stderr(160, 540) == pytest.approx(mean_stderr(y), abs=1e-12)


@pytest.mark.parametrize(("a", "b", "n"), [(160, 213, 540), (3, 9, 40), (70, 50, 100)])
def test_z_as_the_textbook_writes_it_and_squared_as_scipys_chi_squared(a, b, n):
    pool = (a + b) / (2 * n)
    z = sg.pooled_z(a, b, n)
    assert z == pytest.approx((b - a) / n / np.sqrt(2 * pool * (1 - pool) / n))
    chi, p, *_ = stats.chi2_contingency([[a, n - a], [b, n - b]], correction=False)
    assert z**2 == pytest.approx(chi) and sg.two_sided(z) == pytest.approx(p)
    # the other form: variances of the two samples, not of the pool
    assert sg.unpaired_z(a, b, n) == pytest.approx((b - a) / n / np.sqrt(a / n * (1 - a / n) / n + b / n * (1 - b / n) / n))


@pytest.mark.parametrize("correct", [0, 40])
def test_where_all_or_none_are_correct_there_is_no_difference(correct):
    assert sg.pooled_z(correct, correct, 40) == sg.unpaired_z(correct, correct, 40) == sg.harness_z(correct, correct, 40) == 0


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (12, 7), (30, 31), (53, 0)])
def test_mcnemar_is_scipys_binomial_test(gained, lost):
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert sg.mcnemar(gained, lost) == pytest.approx(expected)


def test_holm_as_worked_by_hand():
    assert sg.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert sg.holm([0.6, 0.5]).tolist() == [1.0, 1.0] and sg.holm([0.2]).tolist() == pytest.approx([0.2])


def test_the_bootstrap_interval_covers_in_93_to_97_of_100_worlds():
    rng = np.random.default_rng(0)
    covered, (up, down), n = 0, (0.12, 0.07), 400
    for world in range(1000):
        gained, lost, _ = rng.multinomial(n, [up, down, 1 - up - down])
        low, high = sg.bootstrap_interval(gained, lost, n, 0.05, 1000, world)
        covered += low <= up - down <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_the_bootstrap_is_that_of_resampled_pairs():
    rng = np.random.default_rng(0)
    gain = np.array([1] * 30 + [-1] * 15 + [0] * 155)
    slow = np.quantile([gain[rng.integers(0, 200, 200)].mean() for _ in range(4000)], [0.025, 0.975])
    assert np.allclose(sg.bootstrap_interval(30, 15, 200, 0.05, 4000, 0), slow, atol=0.006)


def test_the_interval_of_a_ratio_is_that_of_scipys_bootstrap():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 80).astype(float)
    change = tokens * rng.normal(-0.2, 0.3, 80)
    ratio, low, high = sg.bootstrap_ratio(change, tokens, seed=1, draws=8000)
    statistic = lambda over, under: over.sum() / under.sum()  # noqa: E731
    theirs = stats.bootstrap((change, tokens), statistic, paired=True, vectorized=False, method="percentile", rng=2)
    assert ratio == pytest.approx(change.sum() / tokens.sum())
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


@pytest.mark.parametrize(("psi", "n"), [(0.2, 540), (0.4, 250), (0.1, 1000)])
def test_the_minimum_detectable_effect_is_found_in_four_worlds_of_five(psi, n):
    d = sg.minimum_detectable(psi, n, 0.05)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, [(psi + d) / 2, (psi - d) / 2, 1 - psi], size=4000)
    z = (counts[:, 0] - counts[:, 1]) / np.sqrt(np.maximum(counts[:, 0] + counts[:, 1], 1))
    assert (z > stats.norm.isf(0.025)).mean() == pytest.approx(0.8, abs=0.03)


def test_the_minimum_detectable_effect_exists_without_discordance_and_falls_with_n():
    assert 0 < sg.minimum_detectable(0.0, 500, 0.05) < 0.05
    assert sg.minimum_detectable(0.2, 250, 0.05) > sg.minimum_detectable(0.2, 540, 0.05)
    assert sg.minimum_detectable(0.0, 3, 0.05) == 1.0


def test_pairing_makes_the_published_gain_stronger_below_242_changed_verdicts():
    z = sg.harness_z(160, 213, 540)
    crossing = sg.discordance_for(z, 53)
    assert 241 < crossing < 243
    assert sg.mcnemar_z((240 + 53) // 2, (240 - 53) // 2) > z - 0.01 and sg.mcnemar_z(150, 97) < z


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


def records(variant, verdicts, subject="algebra", extracted="7"):
    return pd.DataFrame(
        dict(
            variant=variant,
            subject=subject,
            problem_id=[f"{subject}{i}" for i in range(len(verdicts))],
            exact_match=verdicts,
            extracted=extracted,
        )
    )


def test_every_number_of_a_row_can_be_recomputed_from_it():
    rng = np.random.default_rng(0)
    base = pd.concat([records("base", rng.integers(0, 2, 80), s) for s in ("algebra", "geometry")])
    other = pd.concat([records("full", rng.integers(0, 2, 80), s) for s in ("algebra", "geometry")])
    table = sg.measure(pd.concat([base, other]), MARGINS)
    assert table["subject"].tolist() == ["all", "algebra", "geometry"]
    for row in table.itertuples():
        assert row.difference == pytest.approx(row.accuracy - row.base_accuracy) == pytest.approx((row.gained - row.lost) / row.n)
        assert row.gain_both_extractable + row.gain_format_bound == pytest.approx(row.difference)
        assert row.mcnemar_p == pytest.approx(sg.mcnemar(row.gained, row.lost))
        assert row.verdict == sg.verdict(row.difference, row.mcnemar_p_holm, row.ci_low, row.margin, 0.05)
    family = table[table["subject"] != "all"]
    assert np.allclose(family["mcnemar_p_holm"], sg.holm(family["mcnemar_p"]))
    assert table.loc[0, "mcnemar_p_holm"] == table.loc[0, "mcnemar_p"]
    assert table["margin"].tolist() == [0.03, 0.05, 0.05]


def test_the_gain_splits_into_content_and_format_as_worked_by_hand():
    base = records("base", [0, 1, 0, 0], extracted=["3", "4", "[invalidanswer]", "[invalidanswer]"])
    full = records("full", [1, 0, 1, 0], extracted=["3", "5", "6", "[invalidanswer]"])
    row = sg.compare(base, full, MARGINS).set_index("subject").loc["algebra"]
    assert row["gain_both_extractable"] == 0 and row["gain_format_bound"] == 0.25 and row["difference"] == 0.25


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
    assert np.isnan(sg.harness_z(0, 1, 1))
    records = pd.DataFrame(
        [dict(variant=v, subject="algebra", problem_id="a", exact_match=y, extracted="1") for v, y in (("base", 0), ("full", 1))]
    )
    table = sg.measure(records, sg.Margins(0.05, 0.03, 0.05, 200, 0)).set_index(["variant", "subject"])
    assert np.isnan(table.loc[("full", "algebra"), "z"]) and table.loc[("full", "algebra"), "verdict"] != "improved"
