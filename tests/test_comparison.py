"""What a tweaked run is held against: the profile's own, from what both left on disk."""

import json
import re

import pandas as pd
import pytest

from stetholib import comparison
from stetholib.__main__ import main, overrides_of
from stetholib.errors import UserError
from stetholib.profiles import signed
from stetholib.store.tables import Workspace
from stetholib.study import Study
from stetholib.study.world import World

TWEAK = {"selection.layer_share": 0.5, "edit.layers": [1, 2]}


def scores(layers):
    rows = [dict(contrast=c, layer=at, selected=at in layers) for c in ("corpus", "matched") for at in range(4)]
    return pd.DataFrame(rows)


def sets(**percentiles):
    rows = [
        dict(selector=name, draw=0, percentile=p, percentile_low=p - 0.1, percentile_high=p + 0.1)
        for name, p in percentiles.items()
    ]
    return pd.DataFrame([*rows, dict(selector="random", draw=0), dict(selector="only", draw=1)])


def records(right, ids=None):
    rows = [
        dict(subject="sums", problem_id=str(ids[at] if ids else at), exact_match=one, math_verify=1, extracted="7")
        for at, one in enumerate(right)
    ]
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def verdicts(strict):
    return pd.DataFrame([dict(claim="C4", contrast="corpus", verdict="consistent", verdict_strict=strict)])


def left(workspace, layers, percentiles, answers, strict):
    """What a run leaves of what is compared."""
    for folder in (workspace.figures, workspace.records):
        folder.mkdir(parents=True)
    for stem, table in (
        ("04_layer_selection", scores(layers)),
        ("04_layer_sets", sets(**percentiles)),
        ("06_claims", verdicts(strict)),
    ):
        table.to_csv(workspace.figures / f"{stem}.csv", index=False)
    (workspace.figures / "05_minerva_math.csv").touch()
    for name, text in answers.items():
        (workspace.records / f"{name}.jsonl").write_text(text)


@pytest.fixture()
def pair(tmp_path):
    here = Workspace.of("smoke", "0123456789abcdef", TWEAK, tmp_path)
    return here.usual, here


def row(said, what):
    (line,) = [line for line in said.splitlines() if line.startswith(f"| {what} ")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_tweaked_run_lies_in_a_folder_that_says_what_was_tweaked_and_shares_the_store(pair):
    usual, here = pair
    assert here.figures.name == "smoke--layers-1-2-layer_share-0.5-012345" and usual.figures.name == "smoke"
    assert here.store == usual.store and usual.usual is None
    odd = Workspace.of("smoke", "0" * 16, {"data.maths": "../../up and away/" + "x" * 90}, here.root)
    assert re.fullmatch(r"smoke--[A-Za-z0-9._-]{1,48}-0{6}", odd.figures.name) and odd.figures.parent == usual.figures.parent
    assert signed("smoke test", TWEAK) == "smoke test, layer share = 0.5, layers = [1, 2]"


def test_changes_are_told_beside_the_default_with_what_noise_alone_would_give(pair):
    usual, here = pair
    left(
        usual,
        {0, 1},
        dict(stethoscope=0.2, stethoscope_matched=0.5),
        {"stethoscope": records([0] * 40), "full": records([1] * 40)},
        "contradicted",
    )
    ours = {"stethoscope": records([1] * 20 + [0] * 20), "full": records([1] * 39 + [0]), "own": records([0] * 40)}
    left(here, {1, 2}, dict(stethoscope=0.9, stethoscope_matched=0.6, own=0.2), ours, "consistent")
    said = comparison.told(here, "smoke test, tweaked")
    assert said.startswith("**smoke test, tweaked**, beside the default:")
    assert row(said, "layers by the stethoscope, all tokens") == ["0, 1", "1, 2", "1 of 2 are new", "-"]
    assert row(said, "random sets that the stethoscope's layers beat")[2:] == ["+70.0 points", "yes"]
    assert row(said, "random sets that its layers on matched words beat")[3] == "no, the intervals meet"
    assert row(said, "random sets that your own layers beat, beside the stethoscope's")[:2] == [
        "20.0% (10% to 30%)",
        "20.0% (10% to 30%)",
    ]
    gained = row(said, "the stethoscope answers right (exact match)")
    assert gained[:2] == ["0.00%", "50.00%"] and gained[2].startswith("+50.0 points (") and gained[3] == "yes"
    assert row(said, "the whole vector answers right (exact match)")[3] == "no, the interval holds 0"
    assert row(said, "your own edit answers right (exact match), beside the stethoscope")[2].startswith("+0.0 points")
    assert row(said, "verdict on C4 (all tokens)")[:2] == ["consistent, strictly contradicted", "consistent, strictly consistent"]
    assert "2 further measurements are the same in both." in said  # by Math-Verify, of the stethoscope and of the whole vector


def test_other_problems_are_not_paired_and_what_is_missing_is_said(pair):
    usual, here = pair
    assert "has left nothing here to compare with" in comparison.told(here, "tweaked")
    left(usual, {0}, dict(stethoscope=0.5), {"full": records([0, 1])}, "consistent")
    left(here, {0}, dict(stethoscope=0.5), {"full": records([1, 1], ids=[8, 9])}, "consistent")
    said = row(comparison.told(here, "tweaked"), "the whole vector answers right (exact match)")
    assert said == ["50.00%", "100.00%", "+50.0 points", "not told: other problems were asked"]
    assert comparison.told(usual, "usual") == comparison.NOTHING


def test_a_study_says_its_tweaks_in_heading_stamp_manifest_and_folder(tmp_path):
    tweaked, usual = (Study.open("smoke", given, root=tmp_path) for given in ({"edit.layers": [1]}, None))
    assert "**Overridden**: `edit.layers` = [1]." in tweaked.minerva_math.heading().data
    assert tweaked.world.whose == "smoke test, layers = [1]" and usual.world.whose == "smoke test"
    assert isinstance(tweaked.world, World) and tweaked.workspace.figures.name.startswith("smoke--layers-1-")
    assert usual.compare().data == comparison.NOTHING and "nothing here to compare with" in tweaked.compare().data


def test_overrides_are_typed_as_key_and_value_and_read_as_yaml():
    given = overrides_of(["edit.layers=[1,4]", "selection.layer_share=0.25", "data.maths=a=b", "sae.frozen_decoder=true"])
    assert given == {"edit.layers": [1, 4], "selection.layer_share": 0.25, "data.maths": "a=b", "sae.frozen_decoder": True}
    for wrong in ("", "edit.layers", "=1", "edit.layers=", "edit.layers=[1"):
        with pytest.raises(UserError, match="--set"):
            overrides_of([wrong])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("edit.layer=[1]", "did you mean 'layers'"),
        ("edit.layers=[]", "expected a list"),
        ("edit.layers=[1.5]", "expected int"),
        ("edit.layers=[-1]", "0 or more"),
        ("edit.alpha=99", "between -10 and 10"),
        ("edit.vector=rew", "did you mean 'raw'"),
        ("edit.layers=[1,99]", "there is no layer 99"),
        ("edit.layers=[1,1]", "names a layer twice"),
        ("features.specificity=mine.py:mine", "there is no file mine.py here"),
        ("features.specificity=cohen", "did you mean 'cohen_d'"),
    ],
)
def test_a_tweak_that_cannot_be_is_refused_in_one_line_before_anything_runs(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--profile", "mini", "--set", given]) in (1, 2)
    found = "".join(capsys.readouterr())
    assert said in found and "Traceback" not in found
