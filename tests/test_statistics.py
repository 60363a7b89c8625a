import numpy as np
import pytest
from scipy import optimize, stats

from stetholib import statistics as st


def test_the_harnesss_standard_error_is_its_own():
    from lm_eval.api.metrics import mean_stderr

    y = [1] * 160 + [0] * 380
    assert st.harness_stderr(160, 540) == pytest.approx(mean_stderr(y), abs=1e-12)


@pytest.mark.parametrize(("a", "b", "n"), [(160, 213, 540), (3, 9, 40), (70, 50, 100)])
def test_z_as_the_textbook_writes_it_and_squared_as_scipys_chi_squared(a, b, n):
    pool = (a + b) / (2 * n)
    z = st.pooled_z(a, b, n)
    assert z == pytest.approx((b - a) / n / np.sqrt(2 * pool * (1 - pool) / n))
    chi, p, *_ = stats.chi2_contingency([[a, n - a], [b, n - b]], correction=False)
    assert z**2 == pytest.approx(chi) and st.two_sided(z) == pytest.approx(p)
    # the other form: variances of the two samples, not of the pool
    assert st.unpaired_z(a, b, n) == pytest.approx((b - a) / n / np.sqrt(a / n * (1 - a / n) / n + b / n * (1 - b / n) / n))


@pytest.mark.parametrize("correct", [0, 40])
def test_where_all_or_none_are_correct_there_is_no_difference(correct):
    assert st.pooled_z(correct, correct, 40) == st.unpaired_z(correct, correct, 40) == st.harness_z(correct, correct, 40) == 0


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (12, 7), (30, 31), (53, 0)])
def test_mcnemar_is_scipys_binomial_test(gained, lost):
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert st.mcnemar(gained, lost) == pytest.approx(expected)


def test_holm_as_worked_by_hand():
    assert st.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.5]).tolist() == [1.0, 1.0] and st.holm([0.2]).tolist() == pytest.approx([0.2])


def test_the_bootstrap_interval_covers_in_93_to_97_of_100_worlds():
    rng = np.random.default_rng(0)
    covered, (up, down), n = 0, (0.12, 0.07), 400
    for world in range(1000):
        gained, lost, _ = rng.multinomial(n, [up, down, 1 - up - down])
        low, high = st.bootstrap_interval(gained, lost, n, 0.05, 1000, world)
        covered += low <= up - down <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_the_bootstrap_is_that_of_resampled_pairs():
    rng = np.random.default_rng(0)
    gain = np.array([1] * 30 + [-1] * 15 + [0] * 155)
    slow = np.quantile([gain[rng.integers(0, 200, 200)].mean() for _ in range(4000)], [0.025, 0.975])
    assert np.allclose(st.bootstrap_interval(30, 15, 200, 0.05, 4000, 0), slow, atol=0.006)


def test_the_interval_of_a_ratio_is_that_of_scipys_bootstrap():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 60, 80).astype(float)
    change = tokens * rng.normal(-0.2, 0.3, 80)
    ratio, low, high = st.bootstrap_ratio(change, tokens, seed=1, draws=8000)
    statistic = lambda over, under: over.sum() / under.sum()  # noqa: E731
    theirs = stats.bootstrap((change, tokens), statistic, paired=True, vectorized=False, method="percentile", rng=2)
    assert ratio == pytest.approx(change.sum() / tokens.sum())
    assert (low, high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


@pytest.mark.parametrize(("psi", "n"), [(0.2, 540), (0.4, 250), (0.1, 1000)])
def test_the_minimum_detectable_effect_is_found_in_four_worlds_of_five(psi, n):
    d = st.minimum_detectable(psi, n, 0.05)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, [(psi + d) / 2, (psi - d) / 2, 1 - psi], size=4000)
    z = (counts[:, 0] - counts[:, 1]) / np.sqrt(np.maximum(counts[:, 0] + counts[:, 1], 1))
    assert (z > stats.norm.isf(0.025)).mean() == pytest.approx(0.8, abs=0.03)


def test_the_minimum_detectable_effect_exists_without_discordance_and_falls_with_n():
    assert 0 < st.minimum_detectable(0.0, 500, 0.05) < 0.05
    assert st.minimum_detectable(0.2, 250, 0.05) > st.minimum_detectable(0.2, 540, 0.05)
    assert st.minimum_detectable(0.0, 3, 0.05) == 1.0


def test_pairing_makes_the_published_gain_stronger_below_242_changed_verdicts():
    z = st.harness_z(160, 213, 540)
    crossing = st.discordance_for(z, 53)
    assert 241 < crossing < 243
    assert st.mcnemar_z((240 + 53) // 2, (240 - 53) // 2) > z - 0.01 and st.mcnemar_z(150, 97) < z


def score_by_search(gained, lost, n, difference):
    """Tango's z by brute force: the likeliest probability of a loss under the difference is searched for, not solved for."""
    low, high = max(0.0, -difference), (1 - difference) / 2  # of a loss; of a gain it is larger by the difference
    counts = np.array([gained, lost, n - gained - lost])

    def minus_log_likelihood(loss):
        p = np.array([loss + difference, loss, 1 - 2 * loss - difference])
        return -float(counts[counts > 0] @ np.log(np.maximum(p[counts > 0], 1e-300)))

    found = optimize.minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options=dict(xatol=1e-12))
    loss = min((found.x, low, high), key=minus_log_likelihood)
    return (gained - lost - n * difference) / np.sqrt(n * (2 * loss + difference - difference**2))


@pytest.mark.parametrize(("gained", "lost", "n"), [(3, 1, 250), (0, 2, 250), (12, 7, 60), (1, 7, 21), (40, 20, 160), (0, 0, 50)])
@pytest.mark.parametrize("level", [0.05, 0.1])
def test_the_ends_of_the_score_interval_are_z_standard_errors_away(gained, lost, n, level):
    low, high = st.score_interval(gained, lost, n, level)
    z, observed = stats.norm.isf(level / 2), (gained - lost) / n
    score = lambda difference: score_by_search(gained, lost, n, difference)  # noqa: E731
    assert low == pytest.approx(optimize.brentq(lambda d: score(d) - z, -0.999, observed - 1e-9), abs=1e-5)
    assert high == pytest.approx(optimize.brentq(lambda d: score(d) + z, observed + 1e-9, 0.999), abs=1e-5)
    assert low < observed < high


@pytest.mark.parametrize(
    ("gained", "lost", "n", "low", "high"),
    # Fagerland, Lydersen and Laake (2014): hyper-responsiveness before and after a transplantation; complete responses
    [(1, 7, 21, -0.517, -0.026), (6, 16, 161, -0.124, -0.005)],
)
def test_the_score_interval_of_published_examples(gained, lost, n, low, high):
    assert st.score_interval(gained, lost, n, 0.05) == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize("n", [1, 10, 500])
def test_the_score_interval_at_its_limits(n):
    z = stats.norm.isf(0.025)
    low, high = st.score_interval(n, 0, n, 0.05)
    assert high == 1 and low == pytest.approx((n - z**2) / (n + z**2))
    assert st.score_interval(0, n, n, 0.05) == pytest.approx((-high, -low))
    low, high = st.score_interval(0, 0, n, 0.05)
    assert -low == high == pytest.approx(z**2 / (n + z**2)), "no discordant pair is no proof of no difference"


@pytest.mark.parametrize(("up", "down"), [(0.008, 0.004), (0.004, 0.002), (0.02, 0.03), (0.01, 0.0)])
def test_the_score_interval_covers_where_few_pairs_are_discordant(up, down):
    n, rng = 250, np.random.default_rng(0)
    counts, often = np.unique(rng.multinomial(n, [up, down, 1 - up - down], size=4000)[:, :2], axis=0, return_counts=True)
    covered = [low <= up - down <= high for low, high in (st.score_interval(*pair, n, 0.05) for pair in counts)]
    assert np.average(covered, weights=often) >= 0.935
    drawn = [low <= up - down <= high for low, high in (st.bootstrap_interval(*pair, n, 0.05, 500, 0) for pair in counts)]
    assert np.average(drawn, weights=often) < np.average(covered, weights=often)


def test_the_interval_over_clusters_is_that_of_resampled_families():
    rng = np.random.default_rng(0)
    effect, clusters = rng.normal(0, 0.2, 12), np.repeat([f"f{i}" for i in range(12)], [30, 10, 20] * 4)
    differences = rng.normal(np.repeat(effect, [30, 10, 20] * 4), 0.1)
    parts = [differences[clusters == name] for name in np.unique(clusters)]
    slow = [np.concatenate([parts[i] for i in rng.integers(0, 12, 12)]).mean() for _ in range(4000)]
    found = st.cluster_interval(differences, clusters, 0.05, 4000, 0)
    assert found == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.01)
    alone = st.cluster_interval(differences, np.arange(len(differences)), 0.05, 4000, 0)
    assert found[1] - found[0] > 2 * (alone[1] - alone[0]), "problems of one family share their fate"
    assert np.isnan(st.cluster_interval(differences, np.zeros(len(differences)), 0.05, 100, 0)).all()


@pytest.mark.parametrize(("p0", "n"), [(0.31, 540), (0.15, 400), (0.05, 400), (0.9, 1000)])
def test_the_unpaired_test_finds_its_minimum_detectable_effect_in_four_worlds_of_five(p0, n):
    d = st.minimum_detectable_unpaired(p0, n, 0.05)
    rng = np.random.default_rng(0)
    before, after = rng.binomial(n, p0, 4000), rng.binomial(n, p0 + d, 4000)
    z = [st.harness_z(*pair, n) for pair in zip(before.tolist(), after.tolist(), strict=True)]
    assert (np.array(z) > stats.norm.isf(0.025)).mean() == pytest.approx(0.8, abs=0.04)


def test_the_unpaired_minimum_is_that_of_number_theory_and_always_a_share():
    assert st.minimum_detectable_unpaired(0.31, 540, 0.05) == pytest.approx(0.081, abs=5e-4)
    assert st.minimum_detectable_unpaired(0.3, 100, 0.05) > st.minimum_detectable_unpaired(0.3, 400, 0.05)
    assert st.minimum_detectable_unpaired(1.0, 540, 0.05) == st.minimum_detectable_unpaired(0.5, 1, 0.05) == 1.0
    assert st.minimum_detectable_unpaired(0.5, 400, 0.05, power=0.9) > st.minimum_detectable_unpaired(0.5, 400, 0.05)
