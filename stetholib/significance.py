"""Step 06. What of it is real?

The published test compares two proportions as if of different problems. Here the same ones are answered twice, so beside
the harness's z stand tests for pairs, and the smallest differences that this many problems could have shown either test.
Everything is said by two metrics: exact_match, which the paper counts and which wants the closing sentence, and math_verify.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import pandas as pd

from stetholib import statistics
from stetholib.errors import UserError

Families = Mapping[str, str] | None  # problem_id -> family, where the rows have one
ALL = "all"
METRICS = ("exact_match", "math_verify")
SPOKEN = dict(zip(METRICS, ("exact match", "Math-Verify"), strict=True))
FEW = 30  # discordant pairs below which the bootstrap's interval is too narrow: of 3 in 250 it covers 84 %, not 95 %
PUBLISHED = dict(base_correct=160, edited_correct=213, n=540)


@dataclass(frozen=True)
class Margins:
    """Level, margins and draws, fixed in the profile before any result."""

    level: float
    overall: float
    subject: float
    draws: int
    seed: int


def verdict(difference: float, p_holm: float, ci_low: float, margin: float, level: float) -> str:
    """improved / degraded (Holm-corrected McNemar), else no worse (interval above -margin), else inconclusive."""
    if p_holm < level and difference != 0:
        return "improved" if difference > 0 else "degraded"
    return "no worse" if ci_low > -margin else "inconclusive"


def compare(
    base: pd.DataFrame, edited: pd.DataFrame, margins: Margins, metric: str = "exact_match", families: Families = None
) -> pd.DataFrame:
    """One variant against the base by one metric: rows by subject and `all`.

    base, edited: records with subject, problem_id, extracted and the metric's column, of the same problems; families:
    problem_id -> family, for an interval that resamples whole families.
    """
    # a data set may hold a problem twice; its occurrences are pairs of their own
    base, edited = (t.assign(occurrence=t.groupby(["subject", "problem_id"]).cumcount()) for t in (base, edited))
    pairs = base.merge(edited, on=["subject", "problem_id", "occurrence"], suffixes=("_0", "_1"), validate="one_to_one")
    if len(pairs) != len(base) or len(pairs) != len(edited):
        raise UserError(
            f"significance: the base answered {len(base)} problems, the variant {len(edited)}, and they share {len(pairs)}"
        )
    pairs = pairs.assign(y0=pairs[f"{metric}_0"].astype(int), y1=pairs[f"{metric}_1"].astype(int))
    pairs["family"] = pairs["problem_id"].map(families) if families else ""
    subjects = sorted(pairs["subject"].unique())
    parts = {ALL: pairs} | {subject: pairs[pairs["subject"] == subject] for subject in subjects}
    rows = [_compare(subject, part, margins) | dict(metric=metric) for subject, part in parts.items()]
    corrected = dict(zip(subjects, statistics.holm([row["mcnemar_p"] for row in rows[1:]]), strict=True))
    for row in rows:
        # `all` stands outside the family of subjects, so its p needs no correction
        row["mcnemar_p_holm"] = float(corrected.get(row["subject"], row["mcnemar_p"]))
        row["verdict"] = verdict(row["difference"], row["mcnemar_p_holm"], row["ci_low"], row["margin"], margins.level)
    return pd.DataFrame(rows)


def _compare(subject: str, pairs: pd.DataFrame, margins: Margins) -> dict[str, Any]:
    y0, y1, level = pairs["y0"].to_numpy(), pairs["y1"].to_numpy(), margins.level
    n, gained, lost = len(pairs), int((y1 > y0).sum()), int((y1 < y0).sum())
    counts, drawn = (gained, lost, n, level), (margins.draws, margins.seed)
    low, high = statistics.score_interval(*counts) if gained + lost < FEW else statistics.bootstrap_interval(*counts, *drawn)
    low_family, high_family = statistics.cluster_interval(y1 - y0, pairs["family"], level, *drawn)
    right, discordance = (int(y0.sum()), int(y1.sum()), n), (gained + lost) / n
    z, (content, form) = statistics.harness_z(*right), split_gain(pairs)
    row: dict[str, Any] = dict(subject=subject, n=n, base_accuracy=y0.mean(), accuracy=y1.mean(), difference=(gained - lost) / n)
    row |= dict(ci_low=low, ci_high=high, z=z, p=statistics.two_sided(z), z_pooled=statistics.pooled_z(*right))
    row |= dict(gained=gained, lost=lost, mcnemar_p=statistics.mcnemar(gained, lost))
    row |= dict(gain_both_extractable=content, gain_format_bound=form, mde=statistics.minimum_detectable(discordance, n, level))
    row |= dict(mde_unpaired=statistics.minimum_detectable_unpaired(y0.mean(), n, level))
    margin = margins.overall if subject == ALL else margins.subject
    return row | dict(ci_low_family=low_family, ci_high_family=high_family, margin=margin)


def split_gain(pairs: pd.DataFrame) -> tuple[float, float]:
    """The gain y1 - y0, split exactly: over problems extractable under both, and over those whose extractability changed.

    The second term bounds what a change of format can have done. Problems extractable under neither add nothing to
    exact_match, and to the first term by math_verify, which reads them.
    """
    gain = pairs["y1"] - pairs["y0"]
    before, after = pairs["extracted_0"] != "[invalidanswer]", pairs["extracted_1"] != "[invalidanswer]"
    return float(gain[before == after].sum() / len(pairs)), float(gain[before != after].sum() / len(pairs))


def measure(records: pd.DataFrame, margins: Margins, families: Families = None, base: str = "base") -> pd.DataFrame:
    """The table of step 06: every variant against the base, by both metrics, by subject and over all."""
    start, variants = _answers(records, base), sorted(set(records["variant"]) - {base})
    tables = [
        compare(start, _answers(records, variant), margins, metric, families).assign(variant=variant)
        for variant in variants
        for metric in metrics_of(records)
    ]
    return pd.concat(tables, ignore_index=True)


def metrics_of(records: pd.DataFrame) -> list[str]:
    """The metrics that judge every record; a task of one's own may have exact_match alone."""
    return [metric for metric in METRICS if records[metric].notna().all()]


def _answers(records: pd.DataFrame, variant: str) -> pd.DataFrame:
    return records.loc[records["variant"] == variant, ["subject", "problem_id", *METRICS, "extracted"]]


def published() -> pd.DataFrame:
    """The published Number Theory figure by three tests; only the harness's standard errors give (+3.41, .0007)."""
    tests = {"harness": statistics.harness_z, "unpooled": statistics.unpaired_z, "pooled": statistics.pooled_z}
    found = {name: z(*PUBLISHED.values()) for name, z in tests.items()}
    return pd.DataFrame([dict(test=name, **PUBLISHED, z=z, p=statistics.two_sided(z)) for name, z in found.items()])


def paired_against(records: pd.DataFrame, one: str, other: str, margins: Margins, metric: str = "exact_match") -> dict[str, Any]:
    """Two variants on the same problems: `other` minus `one`, over all subjects; NaN where one was not answered."""
    if not {one, other} <= set(records["variant"]):
        return dict(difference=nan, ci_low=nan, ci_high=nan, mcnemar_p=nan, gained=0, lost=0)
    row = compare(_answers(records, one), _answers(records, other), margins, metric).iloc[0]
    return {name: row[name] for name in ("difference", "ci_low", "ci_high", "mcnemar_p", "gained", "lost")}


def discordance_curve(counts: Mapping[str, int] = PUBLISHED) -> pd.DataFrame:
    """McNemar's z for the published net gain, by how many verdicts may have changed. Columns changed, z, and the same in every
    row: unpaired (the harness's z) and crossing (where the two are equal)."""
    base, edited, n = counts["base_correct"], counts["edited_correct"], counts["n"]
    net, z = edited - base, statistics.harness_z(base, edited, n)
    changed = range(abs(net), min(base + edited, 2 * n - base - edited) + 1, 2)
    rows = [dict(changed=pairs, z=statistics.mcnemar_z((pairs + net) // 2, (pairs - net) // 2)) for pairs in changed]
    return pd.DataFrame(rows).assign(unpaired=z, crossing=statistics.discordance_for(z, net) if z else nan)


def control_pairs(variants: Sequence[str]) -> list[tuple[str, str]]:
    """The comparisons that tell energy from direction, and the stethoscope's choice from others: first minus second.
    `full_shrunk` has the stethoscope's energy, spread over all layers: what selecting is worth beside shrinking."""
    pairs = [("raw_shrunk", "scalpel"), ("full", "scalpel_rescaled")]
    pairs += [("stethoscope", "full_shrunk"), ("stethoscope_matched", "full_shrunk")]
    pairs += [("stethoscope", "least_specific"), ("stethoscope", "largest_norm")]
    return pairs + [("stethoscope", name) for name in variants if name.startswith("random_")]


def pairs_table(records: pd.DataFrame, pairs: Sequence[tuple[str, str]], margins: Margins) -> pd.DataFrame:
    """Paired differences over all subjects, one row a pair of variants, `one - other`, and a metric."""
    keys = [(pair, metric) for pair in pairs for metric in metrics_of(records)]
    rows = [paired_against(records, other, one, margins, metric) for (one, other), metric in keys]
    index = pd.MultiIndex.from_tuples([(" - ".join(pair), metric) for pair, metric in keys], names=["pair", "metric"])
    return pd.DataFrame(rows, index=index).astype(float)


def points(row: Any) -> str:
    """A paired difference with its interval, in points, from a row of `measure`."""
    return f"{100 * row['difference']:+.1f} points ({100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f})"


def interval(row: Any) -> str:
    """A paired interval in words, from a row of `measure`."""
    return f"paired interval {100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f} points"


def summary(table: pd.DataFrame, ledger: pd.DataFrame, level: float = 0.05) -> str:
    """What step 06 saw, as Markdown; table: of `measure`, ledger: the verdicts on the paper's claims. Counted is one verdict a
    claim, under the contrast of the paper (`matched` is a check beside it)."""
    own = ledger[ledger["contrast"] != "matched"]
    told = [", ".join(f"{n} {word}" for word, n in own[c].value_counts().items()) for c in ("verdict", "verdict_strict")]
    failed, strictly = (", ".join(own.loc[own[c] == "contradicted", "claim"]) for c in ("verdict", "verdict_strict"))
    built = ", ".join(own.loc[own["verdict"] == "by construction", "claim"])
    chosen = f" True **by construction**, whatever is measured: {built}." if built else ""
    whole = table[table["subject"] == ALL].set_index(["variant", "metric"]).loc["stethoscope"]
    improved = table.loc[table["verdict"] == "improved", "metric"]
    metrics = list(table["metric"].unique())  # a task of one's own may have exact_match alone
    nobody = [metric for metric in metrics if metric not in set(improved)]
    none = f"\n- **No variant improved** on any subject, nor over all, paired and corrected, by {' or '.join(nobody)}."
    return f"""
- Like for like, of {len(own)} claims: {told[0]}. Strictly: {told[1]}.
- Contradicted on this rung: {failed or "nothing"}; strictly: {strictly or "nothing"}.{chosen}{_untestable(own)}
{chr(10).join(_change(metric, whole.loc[metric], level) for metric in metrics)}{none if nobody else ""}
""".strip()


def _untestable(ledger: pd.DataFrame) -> str:
    """Which claims could not be tested, each with its reason, and which only strictly could not."""
    told = ledger["claim"] + " (" + ledger["testable"] + ")"
    neither, strict = (ledger[column] == "not testable" for column in ("verdict", "verdict_strict"))
    reasons, strictly = ("; ".join(told[which]) for which in (neither, strict & ~neither))
    said = f" **Not testable**, and so not upheld either: {reasons}." if reasons else ""
    return said + (f" Not testable **strictly**: {strictly}." if strictly else "")


def _change(metric: str, row: Any, level: float) -> str:
    """What the stethoscope changes over all subjects by one metric; no change that can be told from none is called so."""
    untold = ", **no change that can be told from none**" if row["ci_low"] <= 0 <= row["ci_high"] else ""
    neither = ": **not significant by either test**" if row["p"] >= level and row["mcnemar_p"] >= level else ""
    return (
        f"- By {SPOKEN[metric]} the stethoscope changes accuracy by {100 * row['difference']:+.1f} points over all subjects ({interval(row)}){untold}; the "
        f"smallest difference that could have been found is {100 * row['mde']:.1f} points paired, {100 * row['mde_unpaired']:.1f} unpaired. Unpaired "
        f"z = {row['z']:+.2f}; McNemar p = {row['mcnemar_p']:.2g} with {row['gained']:.0f} gained and {row['lost']:.0f} lost{neither}."
    )
