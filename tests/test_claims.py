"""Each rule of the ledger is fed evidence in which its claim holds, fails, and cannot be told."""

from dataclasses import replace

import pandas as pd
import pytest

from stetholib import claims
from stetholib.data.mini.problems import SUBJECTS
from stetholib.models.weights import MATRICES, SIDE


def projection(kept, ceiling, chance=0.03):
    rows = [
        dict(
            layer=0,
            matrix=m,
            basis=basis,
            rank=2,
            sae_layer=0,
            gains="plain",
            side=SIDE[m],
            energy_retained=value,
            energy_sd=0,
            chance=chance,
        )
        for m in MATRICES
        for basis, value in (("sae_decoder", kept), ("own_svd", ceiling))
    ]
    return pd.DataFrame(rows)


def rows(variant, **changes):
    """Significance rows of one variant: improved everywhere unless changed; lists run over the subjects."""
    base = dict(base_accuracy=0.3, accuracy=0.4, difference=0.1, ci_low=0.05, ci_high=0.15, z=3.4, p=0.001, mcnemar_p=0.001)
    base |= dict(mcnemar_p_holm=0.007, mde=0.05, margin=0.05, verdict="improved")
    table = pd.DataFrame([dict(variant=variant, subject=subject) | base for subject in ("all", *sorted(SUBJECTS))])
    for name, value in changes.items():
        table[name] = [value[0], *value] if isinstance(value, list) else value
    return table


NOTHING = dict(
    accuracy=0.3, difference=0.0, ci_low=-0.02, ci_high=0.02, z=0.0, p=1.0, mcnemar_p=1.0, mcnemar_p_holm=1.0, verdict="no worse"
)
CHECKS = dict(
    answered_twice=9, identical_answers=9, identical_scores=True, weights_restored=True,
    base_cost=dict(parameters=5, flops=7), edited_cost=dict(parameters=5, flops=7),
)  # fmt: skip


def evidence(scalpel=NOTHING, stethoscope=(), percentile=0.99, published=False, checks=(), **other):
    stethoscope = dict(stethoscope)
    tables = [rows("scalpel", **scalpel), rows("stethoscope", **stethoscope), rows("stethoscope_matched", **stethoscope)]
    sets = pd.DataFrame([dict(selector=name, draw=0, percentile=percentile) for name in ("stethoscope", "stethoscope_matched")])
    made = claims.Evidence(
        projection=projection(0.04, 0.3),
        energies={(0, m): 1.0 for m in MATRICES},
        rank=2,
        sets=sets,
        significance=pd.concat(tables, ignore_index=True),
        checks=CHECKS | dict(checks),
        published_rung=published,
    )
    return replace(made, **other)


def verdicts(claim, e):
    row = claims.ledger(e).set_index("claim").loc[[claim]].iloc[0]
    return row["verdict"], row["verdict_strict"]


WEAK = dict(NOTHING, mde=0.2)
FLOOR = dict(NOTHING, base_accuracy=0.01, accuracy=0.01)
HARMED = dict(difference=-0.1, ci_low=-0.2, ci_high=-0.02, z=-3, p=0.001, verdict="degraded")
CASES = [
    ("C1", evidence(projection=projection(0.02, 0.3)), ("consistent", "consistent")),
    ("C1", evidence(), ("consistent", "contradicted")),
    ("C1", evidence(projection=projection(0.5, 0.6)), ("contradicted", "contradicted")),
    ("C2", evidence(), ("consistent", "consistent")),
    ("C2", evidence(scalpel=dict(NOTHING, ci_high=0.08)), ("not testable", "not testable")),
    ("C2", evidence(scalpel=FLOOR), ("not testable", "not testable")),
    ("C2", evidence(scalpel={}), ("contradicted", "contradicted")),
    ("C3", evidence(projection=projection(0.04, 0.9)), ("consistent", "consistent")),
    ("C3", evidence(), ("consistent", "contradicted")),
    ("C3", evidence(projection=projection(0.28, 0.3)), ("contradicted", "contradicted")),
    ("C3", evidence(projection=projection(0.03, 0.035)), ("not testable", "not testable")),
    ("C4", evidence(), ("consistent", "consistent")),
    ("C4", evidence(percentile=0.5), ("consistent", "contradicted")),
    ("C4", evidence(stethoscope=HARMED), ("contradicted", "contradicted")),
    ("C4", evidence(stethoscope=FLOOR), ("not testable", "not testable")),
    ("C5", evidence(), ("consistent", "consistent")),
    ("C5", evidence(stethoscope=dict(verdict="no worse")), ("consistent", "contradicted")),
    ("C5", evidence(stethoscope=NOTHING), ("contradicted", "contradicted")),
    ("C5", evidence(stethoscope=WEAK), ("not testable", "not testable")),
    ("C6", evidence(), ("consistent", "consistent")),
    ("C6", evidence(stethoscope=dict(p=[0.5] * 3 + [0.01] * 4)), ("contradicted", "consistent")),
    ("C6", evidence(stethoscope=NOTHING), ("contradicted", "contradicted")),
    ("C6", evidence(stethoscope=WEAK), ("not testable", "not testable")),
    ("C7", evidence(), ("consistent", "consistent")),
    ("C7", evidence(stethoscope=dict(NOTHING, verdict="inconclusive")), ("consistent", "not testable")),
    ("C7", evidence(stethoscope=HARMED), ("contradicted", "contradicted")),
    ("C7", evidence(stethoscope=WEAK), ("not testable", "consistent")),
    ("C7", evidence(stethoscope=FLOOR), ("not testable", "not testable")),
    ("C8", evidence(), ("consistent", "consistent")),
    ("C8", evidence(checks=dict(identical_answers=8)), ("contradicted", "contradicted")),
    ("C8", evidence(checks=dict(weights_restored=False)), ("contradicted", "contradicted")),
    ("C8", evidence(checks=dict(answered_twice=0, identical_answers=0)), ("not testable", "not testable")),
    ("C9", evidence(), ("consistent", "consistent")),
    ("C9", evidence(checks=dict(edited_cost=dict(parameters=6, flops=7))), ("contradicted", "contradicted")),
]


@pytest.mark.parametrize(("claim", "e", "expected"), CASES)
def test_each_rule_gives_the_right_word(claim, e, expected):
    assert verdicts(claim, e) == expected


def test_every_claim_has_a_case_that_holds_fails_and_where_it_can_cannot_be_told():
    seen = {name: {case[2][0] for case in CASES if case[0] == name} for name in (claim.name for claim in claims.CLAIMS)}
    for name, words in seen.items():
        assert {"consistent", "contradicted"} <= words, name
        assert name in ("C1", "C9") or "not testable" in words, name


def test_only_the_papers_own_rung_reproduces():
    assert verdicts("C4", evidence(published=True)) == ("reproduced", "reproduced")


def test_claims_of_the_stethoscope_stand_under_both_contrasts():
    table = claims.ledger(evidence())
    assert table["claim"].unique().tolist() == [f"C{n}" for n in range(1, 10)]
    assert table[table["contrast"] == "matched"]["claim"].tolist() == ["C4", "C5", "C6", "C7"]
