"""The ledger: each of the paper's nine claims, held against what was measured, by a rule that is written beside it.

Two verdicts a claim. `verdict` compares like for like: the paper's metric and its uncorrected unpaired z. `verdict_strict`
asks what a sceptic would: math_verify, pairs, Holm, margins, and the control that the claim needs. An effect of a part of
the task vector can be looked for only where the whole vector, `full`, has one that the very test would have found.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from stetholib.models.subspaces import LossSplit
from stetholib.significance import ALL, PUBLISHED, points

NUMBER_THEORY = "number_theory"
CONTRAST_VARIANT = {"corpus": "stethoscope", "matched": "stethoscope_matched"}
FLOOR = 0.05  # base accuracy below which a subject tells nothing
FIVE_OF_SEVEN = 5 / 7
CARRIED = 0.95  # cosine of the scalpel's change, as the model's weights can hold it, with the change that is meant
DETECTABLE = 0.10  # minimum detectable effect above which it tells nothing
PUBLISHED_GAIN = (PUBLISHED["edited_correct"] - PUBLISHED["base_correct"]) / PUBLISHED["n"]

CONSISTENT, REPRODUCED, CONTRADICTED, UNTESTABLE = "consistent", "reproduced", "contradicted", "not testable"
BUILT = "by construction"  # it would hold of anything, so it says nothing
SAME = "as corpus"  # both contrasts select the same layers: one verdict, which is not counted twice
HOLDS = (CONSISTENT, REPRODUCED)
Verdict = bool | str | None  # True holds, False fails, None cannot be told; a string is the word itself


class By(NamedTuple):
    """How an improvement is judged: the metric, the column with what the test detects, and what the test is called."""

    metric: str
    detectable: str
    test: str


USUAL, STRICT = By("exact_match", "mde_unpaired", "unpaired test"), By("math_verify", "mde", "paired test")


@dataclass(frozen=True)
class Evidence:
    """What the rules read. Each field but the facts at the end is a question: nothing is measured before a rule asks."""

    split: Callable[..., LossSplit]  # of the scalpel's energy at the default rank; side="reader" narrows it
    control: Callable[[], pd.DataFrame]  # losses of the scalpel and its rivals, of `energy_or_direction`
    sets: Callable[[], pd.DataFrame]  # step 04's table of sets of layers
    tells_apart: Callable[[], bool]  # whether validation loss ranks sets of layers in this world at all
    chosen: Callable[[], Mapping[str, tuple[int, ...]]]  # layers by selector
    against: Callable[[str, str], pd.DataFrame]  # significance rows of a variant against another: (variant, base)
    checks: Callable[[], Mapping[str, Any]]
    carried: Callable[[], float]  # that cosine; 1 in float32
    rank: int
    published_rung: bool
    level: float = 0.05
    lora: str = ""  # the LoRA behind the vector, in words, where one was made here: its readers' half may say nothing of SAEs

    def rows(self, variant: str, metric: str, base: str = "base") -> pd.DataFrame:
        """The significance rows of a variant by one metric, by subject; `all` among them."""
        table = self.against(variant, base)
        return table[table["metric"] == metric].set_index("subject")

    @property
    def strict(self) -> By:
        """What a sceptic judges by; exact_match takes the place of math_verify where a task has none."""
        known = set(self.against("full", "base")["metric"])
        return STRICT if STRICT.metric in known else STRICT._replace(metric=USUAL.metric)

    @property
    def rounded_away(self) -> str:
        """Whether the weights' dtype cannot hold the scalpel's change, in words; empty where it can."""
        cosine = self.carried()
        return f"; the weights' dtype carries the scalpel's change with a cosine of {cosine:.2f}" if cosine < CARRIED else ""

    def counting(self, by: By) -> list[str]:
        """Subjects that `full` lifts by as much as the test detects, from a base accuracy above the floor."""
        full = self.rows("full", by.metric).drop(ALL)
        return list(full.index[_risen(full, by) & (full["base_accuracy"] >= FLOOR)])

    def improved(self, rows: pd.DataFrame, by: By) -> pd.Series:
        """Which rows improved: by the harness's z like for like, by Holm-corrected McNemar strictly."""
        return (rows["p"] < self.level) & (rows["difference"] > 0) if by == USUAL else rows["verdict"] == "improved"


class Finding(NamedTuple):
    """One measured figure, why it can be tested here or why not, and two verdicts."""

    measured: str
    testable: str
    holds: Verdict
    strict: Verdict
    reproduced: bool = True  # whether what holds also has the published size


ABOUT_ONE = ("C4", "C5")  # the claims about Number Theory alone
ELSEWHERE = Finding("not measured", "there is no number_theory among the subjects", None, None)


def word(holds: Verdict, published_rung: bool, reproduced: bool = True) -> str:
    """The verdict's word; only the paper's own rung can reproduce, and only a figure that is compatible with the paper's."""
    if isinstance(holds, str) or holds is None:
        return holds or UNTESTABLE
    return (REPRODUCED if published_rung and reproduced else CONSISTENT) if holds else CONTRADICTED


def _enough(count: int, subjects: int) -> bool:
    return count >= FIVE_OF_SEVEN * subjects


def percent(share: Any) -> str:
    """A share as the paper prints it."""
    return f"{100 * share:.1f} %"


def _risen(rows: Any, by: By) -> Any:
    """Which significance rows rose by as much as the test detects; of one row, whether it did."""
    return (rows["ci_low"] > 0) & (rows["difference"] >= rows[by.detectable])


def _lifted(e: Evidence, by: By) -> str:
    """Whether `full` lifts Number Theory by as much as a test detects, in words."""
    row = e.rows("full", by.metric).loc[NUMBER_THEORY]
    told = f"{100 * row['difference']:+.1f} points by {by.metric}, the {by.test} detects {100 * row[by.detectable]:.1f}"
    low = f", but from a base of {percent(row['base_accuracy'])}, too low to count" if row["base_accuracy"] < FLOOR else ""
    return f"full {'lifts' if _risen(row, by) else 'does not lift'} Number Theory: {told}{low}"


def _where(e: Evidence, by: By, holds: Any) -> Verdict:
    """What is said of Number Theory, where that subject counts."""
    return bool(holds) if NUMBER_THEORY in e.counting(by) else None


def _lifted_subjects(e: Evidence) -> str:
    """How many subjects `full` lifts by as much as each test detects, in words."""
    n = len(e.rows("full", USUAL.metric)) - 1
    told = [f"{len(e.counting(by))} of {n} by {by.metric} ({by.test})" for by in (USUAL, e.strict)]
    return f"subjects that full lifts by as much as is detected, of which five in seven are needed: {told[0]}, {told[1]}"


def _of(e: Evidence) -> str:
    """Which kind of vector was judged, where it is a LoRA."""
    return f"; of a {e.lora}" if e.lora else ""


def _discarded(e: Evidence, variant: str) -> Finding:
    split = e.split()
    lost, random = 1 - split.retained, 1 - split.chance
    z = f" (z = {(random - lost) / split.chance_sd:+.1f})" if split.chance_sd > 0 else ""
    above = f"keeps {split.retained / split.chance:.1f} times what a random subspace keeps{z}{_of(e)}"
    measured, testable = f"{percent(lost)} discarded at rank {e.rank}; {above}", f"a random subspace discards {percent(random)}"
    if random > 0.9:
        return Finding(measured, f"{testable} at that rank, so that hardly any could fail", BUILT, BUILT)
    return Finding(measured, testable, lost > 0.9, lost > 0.9)


def _contained(e: Evidence, by: By) -> tuple[str, Verdict]:
    """Whether the scalpel improves none of the subjects that count, and by less than the margin."""
    subjects = e.rows("scalpel", by.metric)
    counted = subjects.loc[e.counting(by)]
    improved, below = int(e.improved(counted, by).sum()), int((counted["ci_high"] < counted["margin"]).sum())
    said = f"by {by.metric} {improved} improved and {below} with an interval below the margin, of {len(counted)} that count"
    holds = False if improved else (True if below == len(counted) else None)
    return said, holds if _enough(len(counted), len(subjects) - 1) else None


def _no_gain(e: Evidence, variant: str) -> Finding:
    (usual, holds), (strict, strictly) = (_contained(e, by) for by in (USUAL, e.strict))
    if lost := e.rounded_away:  # another edit was tested than the one that is meant
        holds, strictly = None, None
    return Finding(f"{usual}; {strict}", f"{_lifted_subjects(e)}; intervals must end below the margin{lost}", holds, strictly)


def _misaligned(e: Evidence, variant: str) -> Finding:
    whole, control = e.split(), e.control().set_index("variant")
    sides = ", ".join(f"{side}s {e.split(side=side).index:.2f}" for side in ("reader", "writer"))
    ends = [f"{end}_against_rival" for end in ("loss_change", "low", "high")]
    rivals = control.loc[["scalpel", "scalpel_rescaled"], ends]
    told = [f"{change:+.2g} ({low:+.2g} to {high:+.2g})" for change, low, high in rivals.itertuples(index=False)]
    above = f"above the raw vector's loss by {told[0]} nats a token at equal energy, {told[1]} rescaled to the whole"
    measured = f"misalignment index {whole.index:.2f} ({sides}); {above}{_of(e)}"
    lowers = float(control["high"]["full"]) < 0
    better, worse = (rivals["high_against_rival"] < 0).any(), (rivals["low_against_rival"] > 0).all()
    strict = None if not lowers or e.rounded_away else False if better else True if worse else None
    open_ = ", but the scalpel's intervals leave it open" if strict is None else ""
    said = f"lowers the loss{open_}" if lowers else "does not lower the loss"
    testable = (
        f"the best subspace keeps {percent(whole.ceiling)}, a random one {percent(whole.chance)}; full {said}{e.rounded_away}"
    )
    return Finding(measured, testable, whole.index > 0.5 if whole.ceiling - whole.chance >= 0.01 else None, strict)


def _lifts(e: Evidence, variant: str) -> Finding:
    usual, strict = (e.rows(variant, by.metric).loc[NUMBER_THEORY] for by in (USUAL, e.strict))
    shrunk = e.rows(variant, e.strict.metric, base="full_shrunk").loc[NUMBER_THEORY]
    place, apart = e.sets().query("draw == 0").set_index("selector").loc[variant], e.tells_apart()
    told = [f"{percent(row['base_accuracy'])} -> {percent(row['accuracy'])}" for row in (usual, strict)]
    measured = (
        f"{told[0]} by exact_match, {told[1]} by {e.strict.metric}, {points(shrunk)} against full_shrunk; by validation loss better "
        f"than {percent(place['percentile'])} ({percent(place['percentile_low'])} to {percent(place['percentile_high'])}) of "
        f"random sets of as many layers{'' if apart else '; sets of layers cannot be told apart here'}"
    )
    testable = f"{_lifted(e, USUAL)}; {_lifted(e, e.strict)}; sets of layers {'can' if apart else 'cannot'} be told apart"
    beats = strict["ci_low"] > 0 and shrunk["ci_low"] > 0 and place["percentile_low"] >= 0.95
    holds = _where(e, USUAL, usual["ci_low"] > 0), _where(e, e.strict, beats) if apart else None
    return Finding(measured, testable, *holds, bool(usual["ci_low"] <= PUBLISHED_GAIN <= usual["ci_high"]))


def _significantly(e: Evidence, variant: str) -> Finding:
    usual, strict = (e.rows(variant, by.metric).loc[[NUMBER_THEORY]] for by in (USUAL, e.strict))
    holds, strictly = (_where(e, by, e.improved(row, by).item()) for row, by in ((usual, USUAL), (strict, e.strict)))
    z, p, p_holm = usual["z"].item(), usual["p"].item(), strict["mcnemar_p_holm"].item()
    measured = f"z = {z:+.2f}, p = {p:.2g} by exact_match; McNemar by {e.strict.metric}, Holm p = {p_holm:.2g}"
    return Finding(measured, f"{_lifted(e, USUAL)}; {_lifted(e, e.strict)}", holds, strictly)


def _improved(e: Evidence, variant: str) -> Finding:
    rows = {by: e.rows(variant, by.metric).drop(ALL) for by in (USUAL, e.strict)}
    n, (usual, strict) = len(rows[USUAL]), (int(e.improved(subjects, by).sum()) for by, subjects in rows.items())
    shrunk = e.rows(variant, e.strict.metric, base="full_shrunk").loc[ALL]
    measured = f"{usual} of {n}; {strict} of {n} paired and corrected by {e.strict.metric}, {points(shrunk)} against full_shrunk"
    beats, told = bool(shrunk["ci_low"] > 0), [_enough(len(e.counting(by)), n) for by in rows]
    strictly = _enough(strict, n) and beats if told[1] else None
    return Finding(measured, _lifted_subjects(e), _enough(usual, n) if told[0] else None, strictly)


def _not_degraded(e: Evidence, variant: str) -> Finding:
    by_metric = {by.metric: e.rows(variant, by.metric).drop(ALL) for by in (USUAL, e.strict)}
    subjects, verdicts = by_metric[USUAL.metric], pd.concat([rows["verdict"] for rows in by_metric.values()])
    n, above = len(subjects), subjects["base_accuracy"] >= FLOOR
    usual = int(((subjects["p"] < e.level) & (subjects["difference"] < 0)).sum())
    safe = int(verdicts.isin(["improved", "no worse"]).sum())
    telling = int((above & (subjects["mde_unpaired"] <= DETECTABLE)).sum())
    measured = f"{usual} of {n} degraded; {safe} of {len(verdicts)} improved or no worse by the margin, by both metrics"
    testable = f"the unpaired test detects {100 * DETECTABLE:.0f} points in {telling} of {n} subjects; strictly, intervals tell"
    contained = safe == len(verdicts) and _enough(int(above.sum()), n)
    strict: Verdict = False if (verdicts == "degraded").any() else (True if contained else None)
    return Finding(measured, testable, False if usual else (True if _enough(telling, n) else None), strict)


def _deterministic(e: Evidence, variant: str) -> Finding:
    c = e.checks()
    n, same, scores, weights = c["answered_twice"], c["identical_answers"], c["identical_scores"], c["weights_restored"]
    whole, testable = bool(same == n and scores and weights), f"{n} problems were answered twice"
    measured = f"{same} of {n} answers identical; scores {scores}; weights {weights}"
    if whole:
        measured = f"{n} of {n} answers and every layer score identical when repeated; weights restored byte for byte"
    return Finding(measured, testable, whole, whole) if n else Finding("not measured", testable, None, None)


def _costless(e: Evidence, variant: str) -> Finding:
    base, edited = e.checks()["base_cost"], e.checks()["edited_cost"]
    more = [f"{edited[name] - base[name]:+d}" for name in ("parameters", "flops")]
    said = f"{more[0]} parameters, {more[1]} FLOPs a forward pass"
    return Finding(said, "both models were counted", edited == base, edited == base)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper with its figure, its rule and its notebook; `minutes`: a budget for it alone, on `mini` and two cores."""

    name: str
    statement: str
    published: str
    rule: str
    notebook: str
    minutes: int
    judge: Callable[[Evidence, str], Finding]
    by_contrast: bool = False


CLAIMS = (
    Claim("C1", "Projecting task vectors onto SAE feature subspaces discards most of the modification energy", "about 97 %",
          "by construction where a random subspace of that rank discards more than 90 % as well; else more than 90 % discarded, which is then more than the random one discards",
          "03_subspace_projection", 5, _discarded),
    Claim("C2", "... and gives no statistically significant improvement over seven subjects", "0 of 7",
          "over subjects that count (full's interval lies above 0, its gain is at least what the harness's z detects, base accuracy at least 5 %), five of seven or not testable: none improved by the harness's z, and every interval ends below the margin, else not testable, as where the weights' dtype carries the scalpel's change with a cosine below 0.95; strict: the same by math_verify with Holm-corrected McNemar and what it detects",
          "06_significance", 8, _no_gain),
    Claim("C3", "The cause is a geometric misalignment between SAE directions and weight-space task vectors", "qualitative",
          "misalignment index above 0.5 (0 the best subspace, 1 a random one), not testable where these differ by less than a point; strict: where full lowers the loss, the scalpel's loss is above the raw vector's at equal energy, and rescaled above full's; either below contradicts; not testable at such a cosine as in C2",
          "03_subspace_projection", 6, _misaligned),
    Claim("C4", "Injecting the raw task vector into SAE-selected layers lifts Number Theory", "29.6 % -> 39.4 %",
          "where Number Theory counts, the paired interval lies above 0 (reproduced: and holds +9.8 points); strict: where it counts by math_verify and sets of layers can be told apart, that interval too, and the one against full_shrunk, lie above 0, and the set's percentile among random sets is 95 % at its lower end",
          "05_minerva_math", 20, _lifts, by_contrast=True),
    Claim("C5", "... significantly", "z = +3.41, p = 0.0007",
          "where Number Theory counts, harness's z, uncorrected p < .05; strict: where it counts by math_verify, Holm-corrected McNemar",
          "06_significance", 8, _significantly, by_contrast=True),
    Claim("C6", "... with subjects significantly improved", "5 of 7",
          "where five subjects of seven count, as many improved by the harness's z, uncorrected; strict: the same by math_verify with Holm-corrected McNemar, and the interval against full_shrunk over all subjects lies above 0",
          "06_significance", 9, _improved, by_contrast=True),
    Claim("C7", "... and subjects significantly degraded", "0 of 7",
          "none degraded by the harness's z, uncorrected, where it detects 10 points in five subjects of seven; strict: every subject improved or no worse by the margin, by both metrics, and one degraded contradicts",
          "06_significance", 8, _not_degraded, by_contrast=True),
    Claim("C8", "The method is fully deterministic", "yes",
          "answers, layer scores and restored weights are identical when repeated", "06_significance", 6, _deterministic),
    Claim("C9", "It costs nothing at inference", "none",
          "no parameter and no FLOP more than the base model", "06_significance", 6, _costless),
)  # fmt: skip
NAMES = tuple(claim.name for claim in CLAIMS)


def ledger(evidence: Evidence, names: Sequence[str] = NAMES) -> pd.DataFrame:
    """One row a claim, and a contrast where it depends on one; only what these claims need is measured."""
    rows = []
    for claim in (claim for claim in CLAIMS if claim.name in names):
        for contrast in CONTRAST_VARIANT if claim.by_contrast else ("-",):
            elsewhere = claim.name in ABOUT_ONE and NUMBER_THEORY not in set(evidence.against("full", "base")["subject"])
            found = ELSEWHERE if elsewhere else claim.judge(evidence, CONTRAST_VARIANT.get(contrast, contrast))
            if contrast == "matched" and len({evidence.chosen()[name] for name in CONTRAST_VARIANT.values()}) == 1:
                found = found._replace(testable="both contrasts select the same layers", holds=SAME, strict=SAME)
            usual, strict = (word(one, evidence.published_rung, found.reproduced) for one in (found.holds, found.strict))
            row: dict[str, Any] = dict(claim=claim.name, contrast=contrast, statement=claim.statement, published=claim.published)
            row |= dict(measured=found.measured, testable=found.testable, verdict=usual, verdict_strict=strict)
            row |= dict(rule=claim.rule, notebook=claim.notebook, command=f"make claim CLAIM={claim.name}", minutes=claim.minutes)
            rows.append(row)
    return pd.DataFrame(rows)
