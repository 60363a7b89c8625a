"""Exercises: folded solutions pass, likely wrong answers get the hint that they deserve, and nothing a reader writes is a traceback."""

import ast
import json
import re
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from test_task_vectors import state

from stetholib import exercises, layer_sets, significance
from stetholib.editing import TaskVector
from stetholib.errors import UserError
from stetholib.exercises import EMPTY, EXERCISES
from stetholib.models.streams import DocumentLosses
from stetholib.models.subspaces import Ranks

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WORTH = np.array([3.0, 1.0, 2.0, 4.0, 0.0, 0.5, 0.1, 0.2, 0.1, 0.0, 0.1, 0.0])  # of layers; the first and fourth are best
UNREAD = dict(extracted="[invalidanswer]", exact_match=0)


def turns(path):
    """The exercises of a notebook: the question's text, the code below it, and its folded solution."""
    tagged = [cell for cell in json.loads(path.read_text())["cells"] if "exercise" in cell["metadata"].get("tags", [])]
    sources = ["".join(cell["source"]) for cell in tagged]
    assert [cell["cell_type"] for cell in tagged] == ["markdown", "code"] * 3, path.stem
    folded = r"<details><summary>Solution</summary>\n\n```python\n(.*?)\n```\n\n</details>"
    return [(said, code, re.search(folded, said, re.S)[1]) for said, code in zip(sources[::2], sources[1::2], strict=True)]


TURNS = [(path.stem, n, *turn) for path in NOTEBOOKS for n, turn in enumerate(turns(path), 1)]


def shown(stem, code, namespace, solution=""):
    """What an exercise's cell shows once the notebook's imports have run and the solution stands in place of None."""
    cells = [
        cell for cell in json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    imports = [node for node in ast.parse("".join(cells[1]["source"])).body if isinstance(node, ast.ImportFrom | ast.Import)]
    imported = {}
    exec(compile(ast.Module(imports, []), stem, "exec"), imported)
    namespace = imported | namespace  # a study of the test's own stands in place of the notebook's
    parts = [part for part in ast.parse(code).body if not (solution and ast.unparse(part) == "answer = None")]
    exec(solution, namespace)
    exec(compile(ast.Module(parts[:-1], []), stem, "exec"), namespace)
    return eval(compile(ast.Expression(parts[-1].value), stem, "eval"), namespace).data


def of(layers, alpha=1.0):
    """Losses of six problems: the further alpha is from 1.5, the less layers are worth."""
    fall = WORTH[list(layers)].sum() * (1 - abs(alpha - 1.5) / 4)
    return DocumentLosses(np.arange(20.0, 26.0) - fall, np.zeros(6), np.full(6, 10.0))


@cache
def read(stem):
    return pd.read_csv(ROOT / "figures" / "mini" / f"{stem}.csv", keep_default_na=False, na_values=[""])


def study(blocks=None):
    """The miniature as its committed tables tell it, with losses of our own and no model."""
    vectors = read("01_task_vectors")
    energies = {
        (layer, matrix): norm**2 for layer, matrix, norm in vectors[["layer", "matrix", "delta_norm"]].itertuples(index=False)
    }
    moved = pd.DataFrame(dict(variant=["full", "scalpel", "scalpel_rescaled", "raw_shrunk"], energy=[1, 0.05, 1, 0.05]))
    moved["loss_change"] = [-0.1, -0.009, -0.04, -0.035]
    agreement = pd.DataFrame(dict(contrast="corpus", definition=["cohen_d", "firing_log_ratio", "auroc"]))
    agreement["layers"] = ["0 2 3 5", "1 2 4 7", "0 2 4 8"]
    rows = (
        [dict(math_verify=1, **UNREAD)] * 2
        + [dict(math_verify=0, **UNREAD)] * 3
        + [dict(math_verify=1, extracted="5", exact_match=1)] * 5
    )
    listening = SimpleNamespace(texts=["one sum", "a tale", "a cat"], corpus_of=[0, 1, 1])
    words = {"one": 1, "sum": 2, "a": 3, "tale": 4, "cat": 5}
    tokens = SimpleNamespace(decode=lambda ids: [*words][ids[0] - 1], __call__=None)
    tokenizer = type(
        "Tokens", (), {"__call__": lambda _, text: SimpleNamespace(input_ids=[words[word] for word in text.split()])}
    )()
    tokenizer.decode = tokens.decode
    drawn = layer_sets.sampled_sets(range(12), 4, 40, 0)
    sets = pd.DataFrame(dict(selector="random", layers=[" ".join(map(str, one)) for one in drawn]))
    return SimpleNamespace(
        profile=SimpleNamespace(finetune=SimpleNamespace(blocks=blocks)),
        world=SimpleNamespace(layers=12, seed=lambda _: 0, base=SimpleNamespace(tokenizer=tokenizer)),
        losses=SimpleNamespace(of=of),
        task_vectors=SimpleNamespace(
            vector=TaskVector.between(state(seed=0), state(seed=1)), energies=lambda: energies, table=lambda: vectors
        ),
        sae_features=SimpleNamespace(
            table=lambda: read("02_sae_features"),
            listening=listening,
            top_tokens=lambda *_: pd.DataFrame(dict(token=["sum", "one", "a"])),
        ),
        subspace_projection=SimpleNamespace(
            table=lambda: read("03_subspace_projection"), energy_or_direction=lambda: moved, ranks=Ranks(2, (1, 2)), width=64
        ),
        layer_selection=SimpleNamespace(selected_count=4, agreement=lambda: agreement, sets=lambda: sets),
        minerva_math=SimpleNamespace(records=lambda _: pd.DataFrame(rows), table=lambda: read("05_minerva_math")),
        significance=SimpleNamespace(
            published=significance.published,
            claims=lambda: read("06_claims"),
            table=lambda: read("06_significance"),
            margins=SimpleNamespace(level=0.05),
        ),
    )


@pytest.fixture(scope="module")
def mini():
    return study()


def namespace(opened, stem):
    return dict(study=opened, step=getattr(opened, stem[3:]), device="cpu", Study=SimpleNamespace(open=lambda *_, **__: opened))


KNOWN = {  # worked out by hand, from the study above and the committed tables
    "energy of twice the vector": 4,
    "best scale": 1.5,
    "words that general text never holds": 2,
    "gain of the shrunk vector": 0.35,
    "gain of the rescaled scalpel": 0.4,
    "layers on which three definitions agree": 1,
    "exact match without the closing sentence": False,
    "right but not read": 0.2,
    "test that prints both figures": "harness",
    "problems that halve the smallest difference": 4.01,  # 4.002 by the formula, in hundredths
}


@pytest.mark.parametrize("question", KNOWN)
def test_the_truth_is_what_the_study_says(mini, question):
    truth = EXERCISES[question].facts(mini)["truth"]
    assert truth == (KNOWN[question] if isinstance(KNOWN[question], str) else pytest.approx(KNOWN[question], rel=1e-4))


def test_the_truth_moves_with_the_study(mini):
    """Nothing is typed: another study has other truths."""
    other = study()
    other.losses = SimpleNamespace(of=lambda layers, alpha=1.0: of(layers, alpha + 1))
    other.layer_selection.agreement = lambda: mini.layer_selection.agreement().assign(layers="0 2 3 5")
    other.minerva_math.records = lambda _: pd.DataFrame([dict(math_verify=1, **UNREAD)])
    for question, was, now in (
        ("best scale", 1.5, 0.5),
        ("layers on which three definitions agree", 1, 4),
        ("right but not read", 0.2, 1.0),
    ):
        assert [EXERCISES[question].facts(one)["truth"] for one in (mini, other)] == [was, now]


@pytest.mark.parametrize(
    ("stem", "n", "said", "code", "solution"), TURNS, ids=lambda value: str(value)[:20] if isinstance(value, str | int) else ""
)
def test_a_folded_solution_is_right_and_an_empty_answer_a_friendly_line(mini, stem, n, said, code, solution):
    assert shown(stem, code, namespace(mini, stem)) == EMPTY
    opened = study(blocks=(0, 2, 3, 5)) if "organism" in code else mini
    found = shown(stem, code, namespace(opened, stem), solution)
    assert found.startswith(("**Right.**", "**Well picked.**")), found
    assert f"**{n} · " in said and ("## Your turn" in said) == (n == 1)
    assert not re.search(r"\{\w*\}|\bnan\b|_", re.sub(r"`[^`]*`", "", found)), found


def test_every_exercise_is_asked_in_a_notebook_once():
    asked = re.findall(r'exercises\.check\(study, "(.*?)"', "\n".join(code for *_, code, _ in TURNS))
    assert sorted(asked) == sorted(EXERCISES) and len(TURNS) == 18


def hints():
    return [(question, name) for question, one in EXERCISES.items() for name in one.hints if name != "else"]


@pytest.mark.parametrize(("question", "name"), hints())
def test_a_likely_wrong_answer_gets_the_hint_of_its_own(mini, question, name):
    one = EXERCISES[question]
    facts = one.facts(mini)
    found = exercises.check(mini, question, facts[name]).data
    assert found == f"**Not yet.** {one.hints[name].format(**facts, side='')}", found
    assert len({*one.hints.values()}) == len(one.hints)


@pytest.mark.parametrize("question", EXERCISES)
def test_any_other_wrong_answer_gets_the_general_hint(mini, question):
    one = EXERCISES[question]
    facts = one.facts(mini)
    if one.wants == exercises.TRUE:
        others = [not facts["truth"], np.bool_(not facts["truth"])]
    elif one.wants == exercises.NAME:
        others = ["t-test", " ANOVA "]
    else:
        far = (facts["truth"] + side * (11.3 * one.near + 0.07) for side in (-1, 1))
        taken = [facts[name] for name in one.hints if name in facts]
        others = [
            at
            for at in far
            if 0 <= at <= (1 if one.wants == exercises.SHARE else at) and all(abs(at - fact) > one.near for fact in taken)
        ]
    for other in others:
        side = "more" if not isinstance(other, bool | np.bool_ | str) and other < facts["truth"] else "less"
        assert exercises.check(mini, question, other).data == f"**Not yet.** {one.hints['else'].format(**facts, side=side)}"


@pytest.mark.parametrize("question", EXERCISES)
@pytest.mark.parametrize("answer", [None, "", (), [], {}, ...])
def test_an_empty_answer_gets_a_friendly_line(question, answer):
    assert exercises.check(None, question, answer).data == EMPTY  # the study is not asked
    assert exercises.pick(None, answer).data == EMPTY


@pytest.mark.parametrize("question", EXERCISES)
@pytest.mark.parametrize(
    "answer",
    [
        object(),
        [1, 2],
        {"a": 1},
        1j,
        float("nan"),
        float("inf"),
        torch.ones(2),
        np.array(0.5),
        torch.tensor(0.5),
        10**400,
        np.complex128(1),
        pd.Series([1.0, 2.0]),
        "4",
        True,
        4,
    ],
)
def test_an_answer_of_another_kind_is_told_what_is_wanted(mini, question, answer):
    wants = EXERCISES[question].wants
    fits = {exercises.TRUE: bool, exercises.NAME: str}.get(wants, int)
    if type(answer) is not fits or answer == 10**400:
        found = exercises.check(mini, question, answer).data
        assert wants in found and type(answer).__name__ in found and len(found) < 200 and "\n" not in found


def test_zero_and_a_number_of_numpy_are_answers(mini):
    assert exercises.check(mini, "layers on which three definitions agree", 0).data != EMPTY
    assert exercises.check(mini, "layers on which three definitions agree", np.int64(1)).data.startswith("**Right.**")
    assert exercises.check(mini, "energy of twice the vector", np.float32(4)).data.startswith("**Right.**")
    assert exercises.check(mini, "test that prints both figures", " Harness ").data.startswith("**Right.**")


def test_a_share_in_per_cent_is_told_apart(mini):
    truth = EXERCISES["energy of the last third"].facts(mini)["truth"]
    assert "hundredth" in exercises.check(mini, "energy of the last third", 100 * truth).data
    assert exercises.check(mini, "energy of the last third", truth).data.startswith("**Right.**")


def test_a_study_that_cannot_tell_says_so():
    silent = study()
    silent.minerva_math.records = lambda _: pd.DataFrame([dict(math_verify=1, extracted="5", exact_match=1)])
    assert "nothing to check it by" in exercises.check(silent, "exact match without the closing sentence", False).data
    silent.minerva_math.table = lambda: read("05_minerva_math").query("variant == 'base'")
    assert "nothing to check it by" in exercises.check(silent, "stethoscope minus random layers", 0.1).data
    assert exercises.answers(silent).set_index("question")["truth"]["stethoscope minus random layers"] == "None"


def test_an_unknown_question_is_one_line_with_the_nearest(mini):
    with pytest.raises(UserError, match="did you mean 'best scale'"):
        exercises.check(mini, "best scal", 1)


def test_a_pick_among_random_sets_has_an_interval_and_habits_have_hints(mini):
    best, last, largest = (exercises.pick(mini, one).data for one in ((0, 1, 2, 3), [8, 9, 10, 11], (4, 9, 11, 6)))
    assert best.startswith("**Well picked.** Layers 0-3 beat 100% of 40 random sets.") and "Other problems" in best
    assert last.startswith("**Not yet**") and ("closing sentence" in last or "changed most" in last)
    assert "figure of effects" in largest and exercises.pick(mini, (3, 2, 1, 0)).data == best


def test_a_pick_where_the_truth_is_known_finds_its_place_among_all_sets():
    found = exercises.pick(study(blocks=(0, 1, 2, 3)), (0, 2, 3, 5)).data
    assert "stand at place 2 of 495" in found and "3 of them" in found and "at place 1" in found


@pytest.mark.parametrize(
    "layers", [5, "0123", (0, 1, 2), (0, 1, 2, 2), (0, 1, 2, 12), (0, 1, 2, -1), (0, 1, 2, True), ("0", 1, 2, 3), {0: 1}, 2.5]
)
def test_a_pick_that_is_none_is_told_what_is_wanted(mini, layers):
    found = exercises.pick(mini, layers).data
    assert "4 different layers from 0 to 11" in found and type(layers).__name__ in found


def test_answers_for_whoever_teaches_name_every_question(mini):
    table = exercises.answers(mini)
    assert table["question"].tolist() == [*EXERCISES] and table.set_index("question")["truth"]["best scale"] == "1.5"


@pytest.mark.slow
def test_solutions_hold_on_a_whole_run_of_another_profile(undisturbed, tmp_path):
    from stetholib import Study

    shutil.copytree(undisturbed, tmp_path / "room")
    opened = Study.open("smoke", root=tmp_path / "room")
    for stem, _, _, code, solution in TURNS:
        if "organism" not in code:
            found = shown(stem, code, namespace(opened, stem), solution)
            assert found.startswith(("**Right.**", "**Well picked.**", "**Not to be told here.**", "**Not yet**: a good set")), (
                found
            )
