"""Step 06. What of it is real?

The published test compares two proportions as if of different problems. Here the same ones are answered twice, so beside
the harness's z stand tests for pairs, and the smallest difference that this many problems could have shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import pandas as pd

from stetholib.errors import UserError
from stetholib.statistics import (
    bootstrap_interval,
    discordance_for,
    harness_z,
    holm,
    mcnemar,
    mcnemar_z,
    minimum_detectable,
    pooled_z,
    two_sided,
    unpaired_z,
)

ALL = "all"
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


def compare(base: pd.DataFrame, edited: pd.DataFrame, margins: Margins) -> pd.DataFrame:
    """One variant against the base: rows by subject and `all`.

    base, edited: records with subject, problem_id, exact_match and extracted, of the same problems.
    """
    # a data set may hold a problem twice; its occurrences are pairs of their own
    base, edited = (t.assign(occurrence=t.groupby(["subject", "problem_id"]).cumcount()) for t in (base, edited))
    pairs = base.merge(edited, on=["subject", "problem_id", "occurrence"], suffixes=("_0", "_1"), validate="one_to_one")
    if len(pairs) != len(base) or len(pairs) != len(edited):
        raise UserError(
            f"significance: the base answered {len(base)} problems, the variant {len(edited)}, and they share {len(pairs)}"
        )
    subjects = sorted(pairs["subject"].unique())
    parts = {ALL: pairs} | {subject: pairs[pairs["subject"] == subject] for subject in subjects}
    rows = [_compare(subject, part, margins) for subject, part in parts.items()]
    corrected = dict(zip(subjects, holm([row["mcnemar_p"] for row in rows[1:]]), strict=True))
    for row in rows:
        # `all` stands outside the family of subjects, so its p needs no correction
        row["mcnemar_p_holm"] = float(corrected.get(row["subject"], row["mcnemar_p"]))
        row["verdict"] = verdict(row["difference"], row["mcnemar_p_holm"], row["ci_low"], row["margin"], margins.level)
    return pd.DataFrame(rows)


def _compare(subject: str, pairs: pd.DataFrame, margins: Margins) -> dict[str, Any]:
    y0, y1 = pairs["exact_match_0"].to_numpy(int), pairs["exact_match_1"].to_numpy(int)
    n, gained, lost = len(pairs), int(((y1 - y0) == 1).sum()), int(((y1 - y0) == -1).sum())
    low, high = bootstrap_interval(gained, lost, n, margins.level, margins.draws, margins.seed)
    z = harness_z(int(y0.sum()), int(y1.sum()), n)
    content, form = split_gain(pairs)
    row: dict[str, Any] = dict(subject=subject, n=n, base_accuracy=y0.mean(), accuracy=y1.mean(), difference=(gained - lost) / n)
    row |= dict(ci_low=low, ci_high=high, z=z, p=two_sided(z), z_pooled=pooled_z(int(y0.sum()), int(y1.sum()), n))
    row |= dict(gained=gained, lost=lost, mcnemar_p=mcnemar(gained, lost), gain_both_extractable=content, gain_format_bound=form)
    margin = margins.overall if subject == ALL else margins.subject
    return row | dict(mde=minimum_detectable((gained + lost) / n, n, margins.level), margin=margin)


def split_gain(pairs: pd.DataFrame) -> tuple[float, float]:
    """The gain, split exactly: over problems extractable under both, and over those whose extractability changed.

    The second term bounds what a change of format can have done. Problems extractable under neither add nothing.
    """
    gain = pairs["exact_match_1"].astype(int) - pairs["exact_match_0"].astype(int)
    before, after = pairs["extracted_0"] != "[invalidanswer]", pairs["extracted_1"] != "[invalidanswer]"
    return float(gain[before == after].sum() / len(pairs)), float(gain[before != after].sum() / len(pairs))


def measure(records: pd.DataFrame, margins: Margins, base: str = "base") -> pd.DataFrame:
    """The table of step 06: every variant against the base, by subject and over all."""
    start, variants = _answers(records, base), sorted(set(records["variant"]) - {base})
    tables = {variant: compare(start, _answers(records, variant), margins) for variant in variants}
    return pd.concat(tables, names=["variant", None]).reset_index("variant").reset_index(drop=True)


def _answers(records: pd.DataFrame, variant: str) -> pd.DataFrame:
    return records.loc[records["variant"] == variant, ["subject", "problem_id", "exact_match", "extracted"]]


def published() -> pd.DataFrame:
    """The published Number Theory figure by three tests; only the harness's standard errors give (+3.41, .0007)."""
    tests = {"harness": harness_z, "unpooled": unpaired_z, "pooled": pooled_z}
    found = {name: z(*PUBLISHED.values()) for name, z in tests.items()}
    return pd.DataFrame([dict(test=name, **PUBLISHED, z=z, p=two_sided(z)) for name, z in found.items()])


def paired_against(records: pd.DataFrame, one: str, other: str, margins: Margins) -> dict[str, Any]:
    """Two variants on the same problems: `other` minus `one`, over all subjects; NaN where one was not answered."""
    if not {one, other} <= set(records["variant"]):
        return dict(difference=nan, ci_low=nan, ci_high=nan, mcnemar_p=nan, gained=0, lost=0)
    row = compare(_answers(records, one), _answers(records, other), margins).iloc[0]
    return {name: row[name] for name in ("difference", "ci_low", "ci_high", "mcnemar_p", "gained", "lost")}


def discordance_curve(counts: Mapping[str, int] = PUBLISHED) -> pd.DataFrame:
    """McNemar's z for the published net gain, by how many verdicts may have changed.

    Columns changed, z, and the same in every row: unpaired (the harness's z) and crossing (where the two are equal).
    """
    base, edited, n = counts["base_correct"], counts["edited_correct"], counts["n"]
    net, z = edited - base, harness_z(base, edited, n)
    changed = range(abs(net), min(base + edited, 2 * n - base - edited) + 1, 2)
    rows = [dict(changed=pairs, z=mcnemar_z((pairs + net) // 2, (pairs - net) // 2)) for pairs in changed]
    return pd.DataFrame(rows).assign(unpaired=z, crossing=discordance_for(z, net) if z else nan)


def control_pairs(variants: Sequence[str]) -> list[tuple[str, str]]:
    """The comparisons that tell energy from direction, and the stethoscope's choice from others: first minus second."""
    pairs = [("raw_shrunk", "scalpel"), ("full", "scalpel_rescaled")]
    pairs += [("stethoscope", "least_specific"), ("stethoscope", "largest_norm")]
    return pairs + [("stethoscope", name) for name in variants if name.startswith("random_")]


def pairs_table(records: pd.DataFrame, pairs: Sequence[tuple[str, str]], margins: Margins) -> pd.DataFrame:
    """Paired differences over all subjects, one row a pair of variants: `one - other`."""
    rows = {f"{one} - {other}": paired_against(records, other, one, margins) for one, other in pairs}
    return pd.DataFrame(rows).T.astype(float)


def interval(row: Any) -> str:
    """A paired interval in words, from a row of `measure`."""
    return f"paired interval {row['ci_low']:+.1%} to {row['ci_high']:+.1%}"


def summary(table: pd.DataFrame, ledger: pd.DataFrame, level: float = 0.05) -> str:
    """What step 06 saw, as Markdown; table: of `measure`, ledger: the verdicts on the paper's claims."""
    steth = table[table["subject"] == ALL].set_index("variant").loc["stethoscope"]
    told = [", ".join(f"{n} {word}" for word, n in ledger[c].value_counts().items()) for c in ("verdict", "verdict_strict")]
    failed, open_ = (_claims_with(ledger, word) for word in ("contradicted", "not testable"))
    silent = f" **Not testable**, and so not upheld either: {open_}." if open_ else ""
    within = steth["ci_low"] <= 0 <= steth["ci_high"]
    unchanged = " **That is no change that can be told from none.**" if within else ""
    neither = steth["p"] >= level and steth["mcnemar_p"] >= level
    insignificant = ": **not significant by either test**" if neither else ""
    improved = table[table["verdict"] == "improved"]
    nobody = "\n- **No variant improved** on any subject, nor over all, paired and corrected." if improved.empty else ""
    return f"""
- Like for like, of {len(ledger)} verdicts: {told[0]}. Strictly: {told[1]}.
- Contradicted on this rung: {failed or "nothing"}.{silent}
- The stethoscope changes accuracy by {steth["difference"]:+.1%} over all subjects ({interval(steth)}); the smallest difference that could have been found is {steth["mde"]:.1%}.{unchanged}
- Unpaired z = {steth["z"]:+.2f}; paired, McNemar p = {steth["mcnemar_p"]:.2g} with {steth["gained"]:.0f} gained and {steth["lost"]:.0f} lost{insignificant}.{nobody}
""".strip()


def _claims_with(ledger: pd.DataFrame, verdict: str) -> str:
    pairs = ledger.loc[ledger["verdict"] == verdict, ["claim", "contrast"]].to_numpy()
    return ", ".join(claim if contrast == "-" else f"{claim} ({contrast})" for claim, contrast in pairs)
