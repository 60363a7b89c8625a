"""Each rule of the ledger is fed evidence in which its claim holds, fails, and cannot be told; and what is made of the words."""

import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from conftest import ROOT

from stetholib import claims
from stetholib.__main__ import main
from stetholib.commands import claim, readme, reproduce
from stetholib.data.mini.problems import SUBJECTS
from stetholib.store.tables import CONTRACTS
from stetholib.study import Study

EVERY = ("all", *sorted(SUBJECTS))
BASE = dict(n=400, base_accuracy=0.3, mde=0.04, mde_unpaired=0.09, margin=0.05)
IMPROVED = dict(
    accuracy=0.42, difference=0.12, ci_low=0.08, ci_high=0.16, z=3.4, p=0.001, mcnemar_p_holm=0.007, verdict="improved"
)
NOTHING = dict(accuracy=0.3, difference=0.0, ci_low=-0.02, ci_high=0.02, z=0.0, p=1.0, mcnemar_p_holm=1.0, verdict="no worse")
HARMED = dict(accuracy=0.2, difference=-0.1, ci_low=-0.2, ci_high=-0.02, z=-3.0, p=0.001, mcnemar_p_holm=0.01, verdict="degraded")
FEW = {"algebra", "geometry", "number_theory"}  # subjects in which something happens, where it happens in three alone
CHECKS = dict(
    answered_twice=9, identical_answers=9, identical_scores=True, weights_restored=True,
    base_cost=dict(parameters=5, flops=7), edited_cost=dict(parameters=5, flops=7),
)  # fmt: skip


class Split:
    """A split of the scalpel's energy, as `split_loss` gives it."""

    def __init__(self, retained=0.05, ceiling=0.3, chance=0.03, chance_sd=0.001):
        self.retained, self.ceiling, self.chance, self.chance_sd = retained, ceiling, chance, chance_sd
        self.index = (ceiling - retained) / (ceiling - chance)


def rows(exact, verify=None, subjects=EVERY, **changes):
    """Significance rows of a pair of variants: what exact_match says, and math_verify (by default the same)."""
    said = {"exact_match": exact, "math_verify": exact if verify is None else verify}
    return pd.DataFrame(
        [dict(subject=one, metric=metric) | BASE | values | changes for metric, values in said.items() for one in subjects]
    )


def mixed(some, others, among=FEW):
    """Rows in which the subjects among these say one thing by both metrics, and the others another."""
    return pd.concat(
        [rows(some, subjects=[s for s in EVERY if s in among]), rows(others, subjects=[s for s in EVERY if s not in among])]
    )


def control(full_high=-0.01, scalpel=(0.006, 0.013), rescaled=(0.002, 0.009)):
    ends = [("scalpel", *scalpel), ("scalpel_rescaled", *rescaled), ("full", float("nan"), float("nan"))]
    named = [dict(variant=name, low_against_rival=low, high_against_rival=high) for name, low, high in ends]
    return pd.DataFrame(named).assign(loss_change_against_rival=0.01, high=full_high)


def placed(low=0.96):
    two = [dict(selector=name, draw=0) for name in claims.CONTRAST_VARIANT.values()]
    return pd.DataFrame(two).assign(percentile=0.99, percentile_low=low, percentile_high=1.0)


def evidence(
    full=None, scalpel=None, stethoscope=None, shrunk=None, split=None, losses=None, sets=None, apart=True, same=False, checks=(),
    published=False, carried=1.0,
):  # fmt: skip
    """Evidence in which every claim holds that can, but for what is given."""
    given = dict(full=full, scalpel=rows(NOTHING) if scalpel is None else scalpel, stethoscope=stethoscope)
    tables = {name: rows(IMPROVED) if table is None else table for name, table in given.items()}
    beside = rows(IMPROVED) if shrunk is None else shrunk
    layers = {"stethoscope": (0, 1), "stethoscope_matched": (0, 1) if same else (1, 2)}

    def against(variant, base):
        return (beside if base == "full_shrunk" else tables[variant.removesuffix("_matched")]).copy()

    return claims.Evidence(
        split=lambda **where: split or Split(),
        control=lambda: control() if losses is None else losses,
        sets=lambda: placed() if sets is None else sets,
        tells_apart=lambda: apart,
        chosen=lambda: layers,
        against=against,
        checks=lambda: CHECKS | dict(checks),
        carried=lambda: carried,
        rank=2,
        published_rung=published,
    )


def row(claim, contrast="corpus", **given):
    table = claims.ledger(evidence(**given), [claim])
    return table[table["contrast"].isin([contrast, "-"])].iloc[0]


LOW = dict(base_accuracy=0.01)
YES, NO, OPEN, BUILT = claims.CONSISTENT, claims.CONTRADICTED, claims.UNTESTABLE, claims.BUILT
UNLIFTED, WEAK, ONLY_FORMAT = rows(NOTHING), rows(IMPROVED, mde=0.2, mde_unpaired=0.2), rows(IMPROVED, NOTHING)
CASES = [
    ("C1", {}, BUILT, BUILT),
    ("C1", dict(split=Split(0.5, 0.6, 0.2)), NO, NO),
    ("C1", dict(split=Split(0.09, 0.3, 0.12)), YES, YES),
    ("C2", {}, YES, YES),
    ("C2", dict(scalpel=rows(IMPROVED)), NO, NO),
    ("C2", dict(scalpel=rows(IMPROVED), carried=0.94), OPEN, OPEN),
    ("C2", dict(carried=0.96), YES, YES),
    ("C3", dict(carried=0.94), YES, OPEN),
    ("C2", dict(scalpel=rows(NOTHING, dict(NOTHING, verdict="improved"))), YES, NO),
    ("C2", dict(scalpel=rows(dict(NOTHING, ci_high=0.08))), OPEN, OPEN),
    ("C2", dict(full=UNLIFTED), OPEN, OPEN),
    ("C2", dict(full=ONLY_FORMAT), YES, OPEN),
    ("C2", dict(full=mixed(IMPROVED, NOTHING)), OPEN, OPEN),
    ("C3", {}, YES, YES),
    ("C3", dict(split=Split(0.28, 0.3)), NO, YES),
    ("C3", dict(split=Split(0.031, 0.035)), OPEN, YES),
    ("C3", dict(losses=control(full_high=0.001)), YES, OPEN),
    ("C3", dict(losses=control(scalpel=(-0.002, 0.004))), YES, OPEN),
    ("C3", dict(losses=control(rescaled=(-0.009, -0.001))), YES, NO),
    ("C4", {}, YES, YES),
    ("C4", dict(stethoscope=rows(NOTHING)), NO, NO),
    ("C4", dict(full=UNLIFTED), OPEN, OPEN),
    ("C4", dict(full=WEAK), OPEN, OPEN),
    ("C4", dict(full=rows(IMPROVED, **LOW)), OPEN, OPEN),
    ("C4", dict(full=ONLY_FORMAT), YES, OPEN),
    ("C4", dict(apart=False), YES, OPEN),
    ("C4", dict(stethoscope=ONLY_FORMAT), YES, NO),
    ("C4", dict(shrunk=rows(NOTHING)), YES, NO),
    ("C4", dict(sets=placed(low=0.9)), YES, NO),
    ("C5", {}, YES, YES),
    ("C5", dict(stethoscope=ONLY_FORMAT), YES, NO),
    ("C5", dict(stethoscope=rows(NOTHING)), NO, NO),
    ("C5", dict(full=mixed(NOTHING, IMPROVED, {"number_theory"})), OPEN, OPEN),
    ("C5", dict(full=rows(IMPROVED, mde_unpaired=0.2)), OPEN, YES),
    ("C6", {}, YES, YES),
    ("C6", dict(shrunk=rows(NOTHING)), YES, NO),
    ("C6", dict(stethoscope=mixed(NOTHING, IMPROVED)), NO, NO),
    ("C6", dict(stethoscope=ONLY_FORMAT), YES, NO),
    ("C6", dict(full=mixed(NOTHING, IMPROVED)), OPEN, OPEN),
    ("C6", dict(full=rows(IMPROVED, mde_unpaired=0.2)), OPEN, YES),
    ("C7", {}, YES, YES),
    ("C7", dict(stethoscope=rows(HARMED)), NO, NO),
    ("C7", dict(stethoscope=rows(NOTHING, HARMED)), YES, NO),
    ("C7", dict(stethoscope=rows(NOTHING, dict(NOTHING, verdict="inconclusive"))), YES, OPEN),
    ("C7", dict(stethoscope=rows(NOTHING, mde_unpaired=0.12)), OPEN, YES),
    ("C7", dict(stethoscope=rows(NOTHING, **LOW)), OPEN, OPEN),
    ("C8", {}, YES, YES),
    ("C8", dict(checks=dict(identical_answers=8)), NO, NO),
    ("C8", dict(checks=dict(weights_restored=False)), NO, NO),
    ("C8", dict(checks=dict(answered_twice=0, identical_answers=0)), OPEN, OPEN),
    ("C9", {}, YES, YES),
    ("C9", dict(checks=dict(edited_cost=dict(parameters=6, flops=7))), NO, NO),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "given", "usual", "strict"), CASES)
def test_each_rule_gives_the_right_word(claim, given, usual, strict):
    found = row(claim, **given)
    assert (found["verdict"], found["verdict_strict"]) == (usual, strict)
    assert found["testable"] and found["command"] == f"make claim CLAIM={claim}" and found["minutes"] > 0


@pytest.mark.parametrize("at", [2, 3], ids=["like for like", "strictly"])
def test_every_claim_has_a_case_that_holds_fails_and_where_it_can_cannot_be_told(at):
    for name in claims.NAMES:
        words = {case[at] for case in CASES if case[0] == name}
        assert {YES, NO} <= words, name
        assert (BUILT if name == "C1" else OPEN) in words or name == "C9", name


def test_claims_of_the_stethoscope_stand_under_both_contrasts():
    table = claims.ledger(evidence())
    assert tuple(table["claim"].unique()) == claims.NAMES == tuple(f"C{n}" for n in range(1, 10))
    assert table[table["contrast"] == "matched"]["claim"].tolist() == ["C4", "C5", "C6", "C7"]
    keys, columns = CONTRACTS["06_claims"]
    assert {*keys, *columns} == set(table)


def test_where_both_contrasts_select_the_same_layers_there_is_one_verdict():
    table = claims.ledger(evidence(same=True)).set_index(["claim", "contrast"])
    matched = table.xs("matched", level="contrast")
    assert set(matched["verdict"]) == set(matched["verdict_strict"]) == {claims.SAME}
    assert table.loc[("C4", "corpus"), "verdict"] == YES and claims.SAME not in claims.HOLDS
    assert BUILT not in claims.HOLDS and {claims.REPRODUCED, YES} == set(claims.HOLDS)


def test_only_the_papers_own_rung_reproduces_and_number_theory_only_by_the_papers_figure():
    gain = claims.PUBLISHED_GAIN
    assert gain == pytest.approx(0.098, abs=2e-4)
    assert row("C4", published=True)["verdict"] == row("C5", published=True)["verdict"] == claims.REPRODUCED
    small = rows(dict(IMPROVED, difference=0.05, ci_low=0.02, ci_high=0.08))
    assert row("C4", published=True, stethoscope=small)["verdict"] == YES == row("C4")["verdict"]
    assert row("C1", published=True)["verdict"] == BUILT


def test_a_row_says_what_was_measured_and_why_it_can_be_tested():
    assert row("C1")["measured"] == "95.0 % discarded at rank 2; keeps 1.7 times what a random subspace keeps (z = +20.0)"
    assert "(z" not in row("C1", split=Split(chance_sd=0.0))["measured"]
    assert "+12.0 points by exact_match, the unpaired test detects 9.0" in row("C4")["testable"]
    assert "full does not lift Number Theory: +0.0 points" in row("C4", full=UNLIFTED)["testable"]
    low = row("C4", full=rows(IMPROVED, **LOW))["testable"]
    assert "full lifts Number Theory: +12.0 points" in low and ", but from a base of 1.0 %, too low to count" in low
    apart = row("C4", apart=False)
    assert "cannot be told apart" in apart["measured"] and "cannot be told apart" in apart["testable"]
    assert "(96.0 % to 100.0 %) of random sets" in row("C4")["measured"] and "told apart" not in row("C4")["measured"]
    assert "30.0 % -> 42.0 % by exact_match, 30.0 % -> 30.0 % by math_verify" in row("C4", stethoscope=ONLY_FORMAT)["measured"]
    assert (
        ": 4 of 7 by exact_match (unpaired test), 4 of 7 by math_verify (paired test)"
        in row("C6", full=mixed(NOTHING, IMPROVED))["testable"]
    )
    assert "leave it open" in row("C3", losses=control(scalpel=(-0.002, 0.004)))["testable"]
    assert "+12.0 points (+8.0 to +16.0) against full_shrunk" in row("C6")["measured"]


def test_the_scalpels_claims_say_where_a_lora_stands_behind_the_vector():
    plain, lora = (
        claims.ledger(replace(evidence(), lora=said)).set_index(["claim", "contrast"]) for said in ("", "LoRA of rank 4")
    )
    told = lora["measured"] != plain["measured"]
    assert set(lora.index[told].get_level_values("claim")) == {"C1", "C3"}
    assert (lora.loc[told, "measured"] == plain.loc[told, "measured"] + "; of a LoRA of rank 4").all()
    assert (lora.drop(columns="measured") == plain.drop(columns="measured")).all(axis=None)


def test_a_data_set_without_number_theory_leaves_its_claims_untold():
    others = [one for one in EVERY if one != "number_theory"]
    tables = dict(full=rows(IMPROVED, subjects=others), stethoscope=rows(IMPROVED, subjects=others))
    for name in ("C4", "C5"):
        found = row(name, **tables)
        assert found["verdict"] == found["verdict_strict"] == OPEN and "no number_theory" in found["testable"]


@pytest.mark.parametrize(
    ("claim", "needed"),
    [("C1", {"split"}), ("C2", {"against", "carried"}), ("C3", {"split", "control", "carried"}), ("C8", {"checks"}), ("C9", {"checks"}),
     ("C5", {"against", "chosen"}), ("C4", {"against", "chosen", "sets", "tells_apart"})],
)  # fmt: skip
def test_one_claim_asks_only_for_what_it_needs(claim, needed):
    asked, e = set(), evidence()

    def watched(name):
        return lambda *given, **where: (asked.add(name), getattr(e, name)(*given, **where))[1]

    questions = ("split", "control", "sets", "tells_apart", "chosen", "against", "checks", "carried")
    claims.ledger(replace(e, **{name: watched(name) for name in questions}), [claim])
    assert asked == needed


class Step:
    """A study whose step 06 keeps a ledger of made evidence."""

    def __init__(self, **given):
        self.significance, self.given, self.asked = self, given, []

    def claims(self, *names):
        self.asked += names
        return claims.ledger(evidence(**self.given), names)


def test_one_claim_is_printed_one_item_a_line(tmp_path, monkeypatch):
    step = Step(apart=False)
    monkeypatch.setattr(Study, "open", lambda *given, **options: step)
    monkeypatch.setattr(reproduce, "set_environment", lambda *given: None)
    monkeypatch.setenv("STETHOLIB_HOME", str(tmp_path))
    lines = [line.partition(": ") for line in claim.check("C4", "smoke", "cpu").splitlines()]
    items = ["measured", "testable", "like for like", "strictly"]
    contrasts = [f"{item} ({contrast})" for contrast in claims.CONTRAST_VARIANT for item in items]
    assert [label for label, *_ in lines] == ["C4", "published", "rule", *contrasts] and step.asked == ["C4"]
    assert lines[5][2] == YES and lines[6][2] == OPEN and not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name", ["C12", "", "c4"])
def test_an_unknown_claim_is_one_line_that_names_those_there_are(name, capsys):
    assert main(["claim", "--claim", name, "--profile", "smoke"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"unknown claim {name!r}" in error and all(one in error for one in claims.NAMES)


def test_the_readmes_ledger_counts_worlds_and_only_verdicts_of_their_own():
    worlds = [evidence(same=True), evidence(stethoscope=rows(NOTHING)), evidence(apart=False)]
    ledgers = [claims.ledger(one) for one in worlds]
    table = pd.concat([one.assign(world=i) for i, one in enumerate(ledgers)])
    told = {tuple(line.split(" | ")[0].split()[1:2]): line for line in readme.ledger(ledgers[0], table).splitlines()[2:]}
    corpus = next(line for line in readme.ledger(ledgers[0], table).splitlines() if "*(all tokens)*" in line)
    assert len(told) == len(claims.NAMES) and corpus.endswith("| consistent | consistent | 2 of 3, strictly 1 of 3 |")
    assert told[("**C1**",)].endswith("| by construction | by construction | not counted |")
    assert told[("**C7**",)].endswith("| as corpus | as corpus | 2 of 2, strictly 2 of 2 |")
    assert readme.in_worlds(pd.Series([claims.SAME] * 3)) == "-" and readme.in_worlds(pd.Series([NO, OPEN])) == "0 of 2"


def test_verdicts_are_told_by_claim_and_by_contrast_only_where_contrasts_differ():
    rows = [("C1", "-", claims.BUILT), ("C4", "corpus", "reproduced"), ("C4", "matched", YES), ("C5", "corpus", YES)]
    rows += [("C5", "matched", NO), ("C7", "corpus", OPEN), ("C7", "matched", claims.SAME)]
    table = pd.DataFrame(rows, columns=["claim", "contrast", "verdict"])
    told = "C4, C5 *(all tokens)* hold; C5 *(matched words)* **contradicted**; C7 not testable; C1 by construction"
    assert readme._judged(table, "verdict") == told
    assert readme._judged(table[table["claim"] == "C1"], "verdict") == "C1 by construction"


def test_an_organism_without_a_fall_has_none_to_share_out(tmp_path):
    bars = dict(world="one", known="1 3", full=-0.2, share_known=1.5, share_outside=-0.4, percentile_known=0.99, sae_seed=0)
    bars |= dict(reliability=0.9, r_held_out=0.5, energy_lowest=0.8, energy_highest=1.2, holds=True)
    table = pd.DataFrame([bars, bars | dict(sae_seed=1), bars | dict(world="none", full=0.001, holds=False)])
    (tmp_path / "figures" / "seeds-organism").mkdir(parents=True)
    table.to_csv(tmp_path / "figures" / "seeds-organism" / "bars.csv", index=False)
    one, none = readme.organisms(tmp_path).splitlines()[2:]
    assert one == "| one | 1, 3 | 0.80 to 1.20 of the mean | 150% of the fall | -40% of the fall | 99.0 % | 0.90; 0.50 | yes |"
    assert none.count("no fall to share") == 2 and none.endswith("| no |")


def test_what_was_not_run_on_real_weights_is_called_so(tmp_path):
    for name, stems in {"mini": "", "smollm2": "0[1-3]"}.items():
        (tmp_path / "figures" / name).mkdir(parents=True)
        for path in (ROOT / "figures" / name).glob(f"{stems}*.csv"):
            shutil.copy(path, tmp_path / "figures" / name)
    rows = [line.strip("| ").split(" | ") for line in readme.real_weights(tmp_path).splitlines()[2:]]
    asked = {what: said for what, _, said in rows}
    assert asked["verdicts (strictly)"] == asked["rank correlation of sets between two halves of the problems"] == "not run"
    assert "at rank 17" in asked["energy that the scalpel keeps; chance; ceiling"] and "not run" not in {
        mini for _, mini, _ in rows
    }


def test_the_readmes_say_what_the_committed_tables_say():
    for name in readme.PARTS:
        path, text = readme.written(ROOT, name)
        assert path.read_text() == text, "run: make readme"
    row = next(line for line in readme.real_weights(ROOT).splitlines() if line.startswith("| energy that the scalpel keeps"))
    said = pd.read_csv(ROOT / "figures" / "mini" / "06_claims.csv").set_index("claim").loc["C1", "measured"]
    kept, lost = (float(re.search(rf"([\d.]+) % {what}", one)[1]) for one, what in ((row, "at rank"), (said, "discarded")))
    assert kept == pytest.approx(100 - lost, abs=0.11)  # the ledger's own figure, rounded as well
