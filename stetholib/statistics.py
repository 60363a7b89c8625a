"""Tests, intervals and detectable effects of proportions and of pairs; the statistics that steps share.

Arithmetic of counts: nothing here knows a variant, a subject or a model.
"""

from collections.abc import Sequence
from math import inf, nan, sqrt

import numpy as np
import pandas as pd
from scipy import optimize, stats
from statsmodels.stats import contingency_tables, multitest, proportion

Count = int | np.integer
Values = Sequence[float] | np.ndarray | pd.Series  # one number a layer, or a problem


def harness_stderr(correct: int, n: int) -> float:
    """The harness's standard error of an accuracy: sample deviation (n - 1) over sqrt(n); NaN of one problem."""
    accuracy = correct / n
    return sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else nan


def _ratio(difference: float, error: float) -> float:
    return difference / error if error else (0.0 if difference == 0 else inf * np.sign(difference))


def harness_z(base: int, edited: int, n: int) -> float:
    """Unpaired z with the harness's standard errors: what gives the published +3.41 with p = .0007."""
    return _ratio((edited - base) / n, sqrt(harness_stderr(base, n) ** 2 + harness_stderr(edited, n) ** 2))


def unpaired_z(base: int, edited: int, n: int) -> float:
    """Unpaired z with the variances of two proportions (n)."""
    p0, p1 = base / n, edited / n
    return _ratio(p1 - p0, sqrt((p0 * (1 - p0) + p1 * (1 - p1)) / n))


def pooled_z(base: int, edited: int, n: int) -> float:
    """Unpaired z with one pooled variance: the textbook two-proportion test; 0 where all or none are correct."""
    return float(proportion.proportions_ztest([edited, base], [n, n])[0]) if 0 < base + edited < 2 * n else 0.0


def two_sided(z: float) -> float:
    """Two-sided p of a standard normal z."""
    return float(2 * stats.norm.sf(abs(z)))


def mcnemar(gained: int, lost: int) -> float:
    """Exact McNemar test: two-sided binomial p of the discordant pairs; 1 without any."""
    return float(contingency_tables.mcnemar([[0, lost], [gained, 0]], exact=True).pvalue) if gained + lost else 1.0


def mcnemar_z(gained: int, lost: int) -> float:
    """Normal form of McNemar's test without continuity correction."""
    return _ratio(gained - lost, sqrt(gained + lost))


def discordance_for(z: float, difference: float) -> float:
    """How many pairs may change their verdict before McNemar's z for this net gain (in problems) falls to z."""
    return (difference / z) ** 2


def holm(p_values: Values) -> np.ndarray:
    """Holm's step-down correction, in the order given."""
    return multitest.multipletests(p_values, method="holm")[1]


def bootstrap_interval(gained: Count, lost: Count, n: int, level: float, draws: int, seed: int) -> tuple[float, float]:
    """Percentile interval of the paired difference, resampling problems. A problem contributes +1, -1 or 0, so resampling n of
    them is one multinomial draw of three counts."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], size=draws)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / n, [level / 2, 1 - level / 2])
    return float(low), float(high)


def score_interval(gained: Count, lost: Count, n: int, level: float) -> tuple[float, float]:
    """Tango's (1998) score interval of the paired difference, which also covers where few pairs are discordant. A bootstrap of
    such pairs is too narrow: with none gained or none lost, one of its ends is exactly 0."""
    z = float(stats.norm.isf(level / 2))
    return _score_low(int(gained), int(lost), n, z), -_score_low(int(lost), int(gained), n, z)


def _score_low(gained: int, lost: int, n: int, z: float) -> float:
    """The smaller root of the score equation: the difference below the observed one that is z standard errors away."""

    def excess(difference: float) -> float:
        # the probability of a loss that is likeliest given the difference, and the variance of the net gain with it
        b = (2 * n - gained + lost) * difference - gained - lost
        c = lost * difference * (1 - difference)
        loss = (sqrt(max(b * b + 8 * n * c, 0.0)) - b) / (4 * n)
        return gained - lost - n * difference - z * sqrt(n * max(2 * loss + difference * (1 - difference), 0.0))

    # at the observed difference itself the variance may be 0, so the bracket ends just below it
    return -1.0 if lost == n else float(optimize.brentq(excess, -1.0, (gained - lost) / n - 1e-12))


def bootstrap_ratio(
    over: np.ndarray, under: np.ndarray, seed: int, draws: int = 2000, level: float = 0.05
) -> tuple[float, float, float]:
    """sum(over) / sum(under) with a percentile interval at 1 - level, resampling entries: (ratio, low, high). over, under: one
    entry a problem. With token counts below and summed differences of loss above, nats a token."""
    picks = np.random.default_rng(seed).integers(0, len(over), (draws, len(over)))
    low, high = np.quantile(over[picks].sum(1) / under[picks].sum(1), [level / 2, 1 - level / 2])
    return float(over.sum() / under.sum()), float(low), float(high)


def cluster_interval(differences: Values, clusters: Values, level: float, draws: int, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean difference, resampling whole clusters, such as families of problems. differences: one a
    problem; clusters: the label of each. NaN of a single cluster, whose spread nobody can know."""
    by_cluster = pd.Series(np.asarray(differences, float)).groupby(np.asarray(clusters)).agg(["sum", "size"])
    if len(by_cluster) < 2:
        return nan, nan
    return bootstrap_ratio(by_cluster["sum"].to_numpy(), by_cluster["size"].to_numpy(), seed, draws, level)[1:]


def minimum_detectable(discordance: float, n: int, level: float, power: float = 0.8) -> float:
    """Smallest paired difference that McNemar's test finds with this power at the observed discordance.

    Solves sqrt(n) d = z_a sqrt(psi) + z_b sqrt(psi - d^2) (Connor, 1987). Where the observed discordance psi is too
    small for any difference to be found, the difference that would be found if every discordant pair went one way.
    """
    za, zb = stats.norm.isf(level / 2), stats.norm.isf(1 - power)

    def short_of(d: float, psi: float) -> float:
        return sqrt(n) * d - za * sqrt(psi) - zb * sqrt(max(psi - d * d, 0.0))

    if discordance > 0 and short_of(discordance, discordance) >= 0:
        return float(optimize.brentq(lambda d: short_of(d, discordance), 0.0, discordance))
    if short_of(1.0, 1.0) < 0:
        return 1.0
    return float(optimize.brentq(lambda d: short_of(d, d), 1e-12, 1.0))


def minimum_detectable_unpaired(p0: float, n: int, level: float, power: float = 0.8) -> float:
    """Smallest rise above the accuracy p0 that the harness's unpaired z of n problems detects with this power; 1 if none."""
    wanted = float(stats.norm.isf(level / 2) + stats.norm.isf(1 - power))

    def short_of(d: float) -> float:
        return sqrt(n - 1) * d - wanted * sqrt(p0 * (1 - p0) + (p0 + d) * max(1 - p0 - d, 0.0))

    return float(optimize.brentq(short_of, 1e-12, 1 - p0)) if p0 < 1 - 1e-9 and short_of(1 - p0) >= 0 else 1.0


def mean_interval(values: Values, level: float = 0.05) -> tuple[float, float, float]:
    """Mean of independent values with Student's interval (mean, low, high), the ends NaN for a single one; NaN are left out."""
    found = np.asarray(values, float)
    found = found[np.isfinite(found)]
    if len(found) < 2:
        return (float(found.mean()) if len(found) else nan), nan, nan
    half = stats.t.isf(level / 2, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5
    return float(found.mean()), float(found.mean() - half), float(found.mean() + half)
