"""The ledger: each of the paper's nine claims, held against what was measured, by a rule that is written beside it.

Two verdicts a claim. `verdict` compares like for like: where the paper tests with an uncorrected z, so does the rule.
`verdict_strict` asks what a sceptic would: pairs, Holm, margins, and the control that the claim needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from stetholib.models.subspaces import split_loss
from stetholib.models.weights import Key
from stetholib.significance import ALL

BUILT, SAME = "by construction", "as corpus"
HOLDS = ("consistent", "reproduced")
NUMBER_THEORY = "number_theory"
CONTRAST_VARIANT = {"corpus": "stethoscope", "matched": "stethoscope_matched"}
FLOOR = 0.05  # base accuracy below which a subject tells nothing
FIVE_OF_SEVEN = 5 / 7
FAILS = ("contradicted", "not testable")  # the words of a claim that does not hold
DETECTABLE = 0.10  # minimum detectable effect above which it tells nothing


@dataclass(frozen=True)
class Evidence:
    """The tables that the rules read, and the few facts beside them."""

    projection: pd.DataFrame
    energies: Mapping[Key, float]
    rank: int
    sets: pd.DataFrame
    significance: pd.DataFrame
    checks: Mapping[str, Any]
    published_rung: bool
    level: float = 0.05

    def rows(self, variant: str) -> pd.DataFrame:
        """The significance rows of a variant, by subject; `all` among them."""
        return self.significance[self.significance["variant"] == variant].set_index("subject")

    def testable(self, rows: pd.DataFrame, by_interval: bool = False) -> bool:
        """Whether five subjects in seven can tell anything: base accuracy and minimum detectable effect within bounds.

        by_interval: the rule reads intervals against a margin, which say for themselves how much could be detected.
        """
        telling = (rows["base_accuracy"] >= FLOOR) & (by_interval | (rows["mde"] <= DETECTABLE))
        return bool(telling.sum() >= FIVE_OF_SEVEN * len(rows))


@dataclass(frozen=True)
class Finding:
    """One measured figure with its two verdicts: True holds, False fails, None cannot be told."""

    measured: str
    holds: bool | None
    strict: bool | None


ELSEWHERE = Finding("not measured: there is no number_theory among the subjects", None, None)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with its figure, the rule that judges it and the notebook that measures it."""

    name: str
    statement: str
    published: str
    rule: str
    notebook: str
    judge: Callable[[Evidence, str], Finding]
    by_contrast: bool = False


def word(holds: bool | None, published_rung: bool) -> str:
    """The verdict's word; only the paper's own rung can reproduce."""
    if holds is None:
        return "not testable"
    if not holds:
        return "contradicted"
    return "reproduced" if published_rung else "consistent"


def percent(share: Any) -> str:
    """A share as the paper prints it."""
    return f"{100 * share:.1f} %"


def _discarded(e: Evidence, contrast: str) -> Finding:
    split = split_loss(e.projection, e.energies, e.rank)
    lost = 1 - split.retained
    measured = f"{percent(lost)} discarded at rank {e.rank}; a random subspace discards {percent(1 - split.chance)}"
    return Finding(measured, lost > 0.9, lost > 1 - split.chance)


def _no_gain(e: Evidence, contrast: str) -> Finding:
    subjects = e.rows("scalpel").drop(ALL)
    improved = int(((subjects["p"] < e.level) & (subjects["difference"] > 0)).sum())
    strictly = int((subjects["verdict"] == "improved").sum())
    below = int((subjects["ci_high"] < subjects["margin"]).sum())
    measured = f"{improved} of {len(subjects)} improved; interval below the margin in {below} of {len(subjects)}"
    contained: bool | None = True if below == len(subjects) and e.testable(subjects, by_interval=True) else None
    return Finding(measured, False if improved else contained, False if strictly else contained)


def _misaligned(e: Evidence, contrast: str) -> Finding:
    whole = split_loss(e.projection, e.energies, e.rank)
    sides = {side: split_loss(e.projection, e.energies, e.rank, side=side) for side in ("reader", "writer")}
    listed = ", ".join(f"{side}s {split.index:.2f}" for side, split in sides.items())
    measured = f"misalignment index {whole.index:.2f} ({listed}); rank budget {percent(whole.rank_budget)}, misalignment {percent(whole.misalignment)}"
    if whole.ceiling - whole.chance < 0.01:
        return Finding(measured, None, None)
    strict = min(split.index for split in sides.values()) > 0.5 and whole.misalignment > whole.rank_budget
    return Finding(measured, whole.index > 0.5, strict)


def _lifts(e: Evidence, contrast: str) -> Finding:
    variant = CONTRAST_VARIANT[contrast]
    if NUMBER_THEORY not in e.rows(variant).index:
        return ELSEWHERE
    row = e.rows(variant).loc[NUMBER_THEORY]
    chance = float(e.sets.loc[(e.sets["selector"] == variant) & (e.sets["draw"] == 0), "percentile"].iloc[0])
    measured = (
        f"{percent(row['base_accuracy'])} -> {percent(row['accuracy'])}; by validation loss better than "
        f"{percent(chance)} of random sets of as many layers"
    )
    if row["base_accuracy"] < FLOOR:
        return Finding(measured, None, None)
    return Finding(measured, bool(row["difference"] > 0), bool(row["ci_low"] > 0 and chance >= 0.95))


def _significantly(e: Evidence, contrast: str) -> Finding:
    if NUMBER_THEORY not in e.rows(CONTRAST_VARIANT[contrast]).index:
        return ELSEWHERE
    row = e.rows(CONTRAST_VARIANT[contrast]).loc[NUMBER_THEORY]
    measured = f"z = {row['z']:+.2f}, p = {row['p']:.2g}; McNemar p = {row['mcnemar_p']:.2g}, Holm {row['mcnemar_p_holm']:.2g}"
    usual, strict = row["p"] < e.level and row["difference"] > 0, row["verdict"] == "improved"
    untold = None if row["base_accuracy"] < FLOOR or row["mde"] > DETECTABLE else False
    return Finding(measured, True if usual else untold, True if strict else untold)


def _improved(e: Evidence, contrast: str) -> Finding:
    subjects = e.rows(CONTRAST_VARIANT[contrast]).drop(ALL)
    usual = int(((subjects["p"] < e.level) & (subjects["difference"] > 0)).sum())
    strict = int((subjects["verdict"] == "improved").sum())
    measured = f"{usual} of {len(subjects)}; {strict} of {len(subjects)} paired and corrected"
    wanted = FIVE_OF_SEVEN * len(subjects)
    untold = False if e.testable(subjects) else None
    return Finding(measured, True if usual >= wanted else untold, True if strict >= wanted else untold)


def _not_degraded(e: Evidence, contrast: str) -> Finding:
    subjects = e.rows(CONTRAST_VARIANT[contrast]).drop(ALL)
    usual = int(((subjects["p"] < e.level) & (subjects["difference"] < 0)).sum())
    degraded = int((subjects["verdict"] == "degraded").sum())
    safe = int(subjects["verdict"].isin(["improved", "no worse"]).sum())
    measured = f"{usual} of {len(subjects)} degraded; {safe} of {len(subjects)} improved or no worse by the margin"
    contained = safe == len(subjects) and e.testable(subjects, by_interval=True)
    strict: bool | None = False if degraded else (True if contained else None)
    return Finding(measured, False if usual else (True if e.testable(subjects) else None), strict)


def _deterministic(e: Evidence, contrast: str) -> Finding:
    c = e.checks
    same = c["identical_answers"] == c["answered_twice"]
    measured = f"{c['identical_answers']} of {c['answered_twice']} answers and every layer score identical when repeated; weights restored byte for byte"
    whole = bool(same and c["identical_scores"] and c["weights_restored"])
    if not whole:
        measured = f"{c['identical_answers']} of {c['answered_twice']} answers identical; scores {c['identical_scores']}; weights {c['weights_restored']}"
    return Finding(measured, whole, whole) if c["answered_twice"] else Finding("not measured", None, None)


def _costless(e: Evidence, contrast: str) -> Finding:
    base, edited = e.checks["base_cost"], e.checks["edited_cost"]
    parameters, flops = (edited[name] - base[name] for name in ("parameters", "flops"))
    measured = f"{parameters:+d} parameters, {flops:+d} FLOPs a forward pass"
    return Finding(measured, edited == base, edited == base)


CLAIMS = (
    Claim("C1", "Projecting task vectors onto SAE feature subspaces discards most of the modification energy", "about 97 %",
          "more than 90 % discarded at the default rank; strict: and more than a random subspace of that rank discards",
          "03_subspace_projection", _discarded),
    Claim("C2", "... and gives no statistically significant improvement over seven subjects", "0 of 7",
          "no subject improved by the harness's z, and every interval ends below the margin, else not testable; strict: Holm-corrected McNemar",
          "06_significance", _no_gain),
    Claim("C3", "The cause is a geometric misalignment between SAE directions and weight-space task vectors", "qualitative",
          "misalignment index above 0.5 (0 the best subspace, 1 a random one); strict: on both sides, and misalignment loses more than the rank budget",
          "03_subspace_projection", _misaligned),
    Claim("C4", "Injecting the raw task vector into SAE-selected layers lifts Number Theory", "29.6 % -> 39.4 %",
          "accuracy rises; strict: the paired interval lies above 0 and the set is better than 95 % of random sets",
          "05_minerva_math", _lifts, by_contrast=True),
    Claim("C5", "... significantly", "z = +3.41, p = 0.0007",
          "harness's z, uncorrected p < .05; strict: Holm-corrected McNemar",
          "06_significance", _significantly, by_contrast=True),
    Claim("C6", "... with subjects significantly improved", "5 of 7",
          "at least five subjects of seven improved by the harness's z, uncorrected; strict: Holm-corrected McNemar",
          "06_significance", _improved, by_contrast=True),
    Claim("C7", "... and subjects significantly degraded", "0 of 7",
          "none degraded by the harness's z, uncorrected; strict: every subject improved or no worse by the margin",
          "06_significance", _not_degraded, by_contrast=True),
    Claim("C8", "The method is fully deterministic", "yes",
          "answers, layer scores and restored weights are identical when repeated",
          "06_significance", _deterministic),
    Claim("C9", "It costs nothing at inference", "none",
          "no parameter and no FLOP more than the base model",
          "06_significance", _costless),
)  # fmt: skip


def ledger(evidence: Evidence) -> pd.DataFrame:
    """One row a claim, and a contrast where it depends on one."""
    rows = []
    for claim in CLAIMS:
        for contrast in ("corpus", "matched") if claim.by_contrast else ("-",):
            finding = claim.judge(evidence, contrast)
            usual, strict = (word(holds, evidence.published_rung) for holds in (finding.holds, finding.strict))
            row = dict(claim=claim.name, contrast=contrast, statement=claim.statement, published=claim.published)
            row |= dict(measured=finding.measured, verdict=usual, verdict_strict=strict, rule=claim.rule, notebook=claim.notebook)
            rows.append(row)
    return pd.DataFrame(rows)
