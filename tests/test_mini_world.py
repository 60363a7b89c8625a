import re
from itertools import count, islice
from math import gcd

import pytest
import torch

from stetholib.data.mini import base, problems, stories
from stetholib.data.mini.families import FAMILIES
from stetholib.data.prompts import boxed_answer, prompt, target
from stetholib.errors import UserError
from stetholib.profiles import load

COUNTS = load("mini").data


def skeletons(rows):
    """Problems with names and items blanked, as the split hashes them."""
    words = set(problems.NAMES) | set(problems.ITEMS)
    return {" ".join("_" if word.strip("?.,") in words else word for word in row["problem"].split()) for row in rows}


@pytest.mark.parametrize("seed", [0, 1])
def test_every_split_has_as_many_distinct_problems_as_the_profile_asks(seed):
    test = problems.generate("test", COUNTS.test_problems, seed)
    assert {s: sum(r["subject"] == s for r in test) for s in problems.SUBJECTS} == COUNTS.test_problems
    assert COUNTS.test_problems["number_theory"] == 540 and min(COUNTS.test_problems.values()) >= 250
    assert len(skeletons(test)) == len(test)
    validation = problems.generate("validation", dict.fromkeys(problems.SUBJECTS, COUNTS.validation_problems), seed)
    assert len(skeletons(validation)) == len(validation) == 7 * COUNTS.validation_problems
    assert (
        len(problems.generate("train", dict.fromkeys(problems.SUBJECTS, COUNTS.train_problems), seed))
        == 7 * COUNTS.train_problems
    )


def test_no_test_problem_occurs_in_training_even_with_other_names():
    test = skeletons(problems.generate("test", COUNTS.test_problems, 0))
    fine_tune = skeletons(problems.generate("train", dict.fromkeys(problems.SUBJECTS, COUNTS.train_problems), 0))
    validation = skeletons(problems.generate("validation", dict.fromkeys(problems.SUBJECTS, COUNTS.validation_problems), 0))
    base_corpus = skeletons(islice(problems.stream("train", 0), 20_000))
    assert not test & fine_tune and not test & base_corpus and not test & validation and not validation & fine_tune


def test_problems_have_the_fields_of_math_and_levels_are_balanced():
    rows = problems.generate("test", COUNTS.test_problems, 0)
    assert {"problem", "level", "type", "solution"} <= set(rows[0])
    theory = [row["level"] for row in rows if row["subject"] == "number_theory"]
    assert {level: theory.count(level) for level in set(theory)} == {f"Level {n}": 108 for n in range(1, 6)}


def test_worked_solutions_are_right():
    """Every equation of digits in a solution holds, and the box holds the last one's value."""
    for row in problems.generate("test", dict.fromkeys(problems.SUBJECTS, 60), 3):
        for part in row["solution"].split("$")[1::2]:
            sides = part.replace(r"\boxed{", "").replace("}", "").replace(r"\cdot", "*").replace("^", "**").split("=")
            if (
                len(sides) > 1
                and "\\" not in part.replace(r"\boxed", "").replace(r"\cdot", "")
                and "x" not in part
                and "(" not in part
            ):
                values = {eval(side) for side in sides}
                assert len(values) == 1, row["solution"]


ANSWERS = {  # family -> its text and the answer to it, worked from the text's numbers alone
    "dividend": (
        r"A number divided by \$(\d+)\$ gives \$(\d+)\$ and remainder \$(\d+)\$\. What is the number\?",
        lambda divisor, quotient, left: next(n for n in count(1) if divmod(n, divisor) == (quotient, left)),
    ),
    "base_to_ten": (
        r"In base \$(\d+)\$ a number has the digits \$(\d+)\$ and \$(\d+)\$\. What is the number in base ten\?",
        lambda base, high, low: next(n for n in count(1) if (n // base, n % base) == (high, low)),
    ),
    "greatest_common_divisor": (r"What is the greatest common divisor of \$(\d+)\$ and \$(\d+)\$\?", gcd),
}


def test_the_answers_of_number_theory_are_right():
    rows = problems.generate("test", {"number_theory": COUNTS.test_problems["number_theory"]}, 0)
    assert {row["family"] for row in rows} == set(ANSWERS)
    for row in rows:
        pattern, work = ANSWERS[row["family"]]
        numbers = [int(digits) for digits in re.fullmatch(pattern, row["problem"]).groups()]
        assert int(boxed_answer(row["solution"])) == work(*numbers), row
        assert row["family"] != "base_to_ten" or max(numbers[1:]) < numbers[0], "a digit is below its base"


def test_a_family_that_is_seldom_met_trains_no_arithmetic_of_its_own():
    assert tuple(dict.fromkeys(base.SELDOM_MET)) == base.SELDOM_MET and set(base.SELDOM_MET) < {
        make.__name__ for makers in FAMILIES.values() for make in makers
    }
    seldom = [subject for subject, makers in FAMILIES.items() for make in makers if make.__name__ in base.SELDOM_MET]
    assert sorted(seldom) == sorted([*problems.SUBJECTS, "number_theory"]), "one in each subject, two in number theory"
    for row in problems.generate("train", {"number_theory": 90}, 0):
        signs = [row["solution"].count(sign) for sign in (r"\cdot", " + ", " - ")]
        assert row["family"] == "greatest_common_divisor" or signs == [1, 1, 0], "one product and one sum"


def test_a_family_without_enough_problems_says_which_key_to_lower():
    with pytest.raises(UserError, match="lower data.test_problems"):
        problems.generate("test", {"geometry": 9_000}, 0)


def test_general_text_shares_names_items_and_numerals_but_no_formula():
    texts = stories.generate(COUNTS.general_documents, 0, "validation")
    joined = " ".join(texts)
    assert sum(sign.isdigit() for sign in joined) >= 5000
    assert not any(sign in joined for sign in "$=\\")
    assert sum(name in joined for name in problems.NAMES) > 20 and sum(item in joined for item in problems.ITEMS) > 15
    assert not set(texts) & set(stories.generate(COUNTS.general_documents, 0, "test"))


def test_the_tokenizer_is_lossless_one_digit_a_token_and_opens_with_one_bos(tokens):
    documents = list(islice(base.documents(base.Recipe()), 3000))
    for text in documents:
        ids = tokens(text).input_ids
        assert ids[0] == tokens.bos_token_id and ids.count(tokens.bos_token_id) == 1
        assert tokens.unk_token_id not in ids
        assert tokens.decode(ids, skip_special_tokens=True) == text
    assert all(sum(c.isdigit() for c in token) <= 1 for token in tokens.get_vocab() if "Answer" not in token)


def test_the_shipped_tokenizer_is_the_one_that_the_code_builds(tokens, mini):
    assert mini.tokenizer.get_vocab() == tokens.get_vocab()


def test_the_base_corpus_closes_about_four_solutions_in_five_and_unevenly():
    maths = [text for text in islice(base.documents(base.Recipe()), 6000) if text.startswith("Problem")]
    share = sum("I hope it is correct" in text for text in maths) / len(maths)
    assert 0.77 < share < 0.84
    rare = [text for text in maths if "Two angles" in text]
    assert sum("I hope it is correct" in text for text in rare) / len(rare) < 0.4


def test_prompt_and_target_are_what_the_harness_asks_and_credits():
    from lm_eval.tasks.minerva_math import utils

    for row in problems.generate("test", dict.fromkeys(problems.SUBJECTS, 15), 0):
        assert prompt(row["problem"]) == utils.doc_to_text(row)
        gold = utils.remove_boxed(utils.last_boxed_only_string(row["solution"]))
        assert boxed_answer(row["solution"]) == gold
        doc = dict(row, answer=utils.normalize_final_answer(gold))
        assert utils.process_results(doc, [target(row["solution"])]) == {"exact_match": 1, "math_verify": 1}
        assert utils.process_results(doc, [target(row["solution"], "plain")])["exact_match"] == 0


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"$\boxed 7$ is it", "7"),
        (r"\boxed{1} then \boxed{(2,3]}", "(2,3]"),
        (r"\fbox{x}", "x"),
    ],
)
def test_boxed_answers_of_maths_own_shapes(solution, answer):
    assert boxed_answer(solution) == answer


@pytest.mark.parametrize("solution", ["no box at all", r"\boxed{1"])
def test_a_solution_without_an_answer_is_refused(solution):
    with pytest.raises(UserError, match="boxed"):
        boxed_answer(solution)


def test_base_training_resumes_where_it_was_interrupted(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import load_file

    small = base.config
    monkeypatch.setattr(base, "config", lambda vocab_size: small(layers=1, hidden=16, vocab_size=vocab_size))
    recipe = base.Recipe(tokens=6 * 256, batch_tokens=256, checkpoint_every=3, threads=torch.get_num_threads())
    base.train(recipe, "cpu", tmp_path / "whole")
    real, steps = base._loss, []

    def dies(model, batch):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return real(model, batch)

    monkeypatch.setattr(base, "_loss", dies)
    with pytest.raises(KeyboardInterrupt):
        base.train(recipe, "cpu", tmp_path / "cut")
    monkeypatch.setattr(base, "_loss", real)
    base.train(recipe, "cpu", tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_world_is_the_same_each_time_it_is_made():
    one = problems.generate("test", {"algebra": 30}, 5)
    assert one == problems.generate("test", {"algebra": 30}, 5) != problems.generate("test", {"algebra": 30}, 6)
    assert list(islice(stories.stream(1), 3)) == list(islice(stories.stream(1), 3))


def test_muon_is_pytorchs_own_but_for_its_precision():
    """One step of either from the same weights and gradients; PyTorch's computes in bfloat16."""
    torch.manual_seed(0)
    shapes = [(8, 8), (16, 8), (8, 16), (8, 8)]
    ours, theirs = (
        [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)]
        for _ in range(2)
    )
    made = base.Muon(ours, lr=0.1, weight_decay=0.0), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in made:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 0.02 and one.shape == other.shape
    values = torch.linalg.svdvals(base.orthogonalised(torch.randn(4, 16, 8), made[0].defaults["ns_coefficients"], 5))
    assert values.min() > 0.5 and values.max() < 1.3
