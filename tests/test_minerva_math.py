import inspect

import pandas as pd
import pytest
import torch
import toys
from torch.utils.flop_counter import FlopCounterMode
from toys import TASK

from stetholib import minerva_math as mm
from stetholib.adapters import harness
from stetholib.commands import fabricate
from stetholib.data import prompts
from stetholib.data.mini import problems
from stetholib.errors import UserError
from stetholib.models import answering, loading


def ask(model, prompts, max_new_tokens, batch_size, keep):
    limits = answering.Limits(max_new_tokens, batch_size)
    answering.answer_all(model, prompts, answering.plan(model.tokenizer, prompts), limits, keep)


ROWS = problems.generate("validation", dict.fromkeys(problems.SUBJECTS, 6), 0)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return harness.load_tasks(folder, harness.write_tasks(folder, ROWS, num_fewshot=0))


@pytest.fixture(scope="module")
def answers(tasks, mini):
    found = []
    ask(mini, harness.prompts_of(tasks), 96, 16, found.extend)
    return {answer.problem_id: answer for answer in found}


def test_the_harness_asks_every_problem_with_our_prompt(tasks):
    assert harness.prompts_of(tasks) == {
        prompts.problem_id(row["subject"], row["problem"]): prompts.prompt(row["problem"]) for row in ROWS
    }


def test_four_shots_are_the_harnesss_own(tmp_path):
    four = harness.load_tasks(tmp_path, harness.write_tasks(tmp_path, ROWS[:8], num_fewshot=4))
    prompt = next(iter(harness.prompts_of(four).values()))
    assert prompt.count("Problem:") == 5 and "The final answer is $16$. I hope it is correct." in prompt


def test_a_task_that_lost_its_stop_string_is_refused(tmp_path):
    import yaml

    names = harness.write_tasks(tmp_path, ROWS[:3], num_fewshot=0)
    path = next(tmp_path.glob("*.yaml"))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"generation_kwargs": {"until": ["x"]}}))
    with pytest.raises(UserError, match="stops at"):
        harness.load_tasks(tmp_path, names)


def test_every_record_has_the_harnesss_own_verdicts_and_standard_error(tasks, answers):
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.tasks.minerva_math import utils

    verdicts, errors = harness.score(tasks, answers)
    records = pd.DataFrame(mm.records("base", ROWS, answers, verdicts))
    for row, record in zip(ROWS, records.itertuples(), strict=True):
        gold = utils.normalize_final_answer(prompts.boxed_answer(row["solution"]))
        direct = utils.process_results(dict(row, answer=gold), [record.completion])
        assert (record.exact_match, record.math_verify) == (direct["exact_match"], direct["math_verify"])
        assert record.level == row["level"] and record.stopped_by in ("eos", "stop", "length")
    table = mm.measure(records, {"base": 1.5}).set_index("subject")
    for subject, part in records.groupby("subject"):
        assert table.loc[subject, "stderr"] == pytest.approx(mean_stderr(part["exact_match"].tolist()), abs=1e-12)
        assert table.loc[subject, "stderr"] == pytest.approx(errors[subject], abs=1e-12)
    assert table.loc["all", "n"] == 42 and table.loc["all", "correct"] == records["exact_match"].sum()


SENTENCE = "Final Answer: The final answer is ${}$. I hope it is correct."
ODD = [  # gold answers of MATH's own kinds, each with ways to write it, or something near it
    (r"\frac{1}{2}", ["1/2", "0.5", r"\dfrac12", r"\frac12", r"\tfrac{2}{4}", r"\frac{1}{3}", r"\frac{1}{", r"\frac"]),
    ("7", ["7", "7.0", "07", "-7", "7,000", "x = 7", r"\text{seven}", r"\boxed{7}", "7 dollars", r"7\%", "", "7\n", "{7"]),
    (r"(2,5]", ["(2,5]", "(2, 5]", "[2,5]", r"\left(2,5\right]"]),
    (r"3\sqrt{2}", [r"3\sqrt2", r"\sqrt{18}", r"3 \cdot \sqrt{2}", "4.2426", r"\sqrt{"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)"]),
    (r"x^2 + 2x + 1", ["(x+1)^2", "x^2+2x+1", "x^2 + 2x", "1 + x*(x+2)"]),
    (r"\text{Evelyn}", ["Evelyn", r"\text{Evelyn}", r"\text{evelyn}"]),
    (r"10^{3}", ["1000", "1,000", "10^3", "$1000"]),
]


def completions_of(gold):
    """Right, wrong and missing answers to one gold answer, as a model may write them."""
    yield f" It is so. {SENTENCE.format(gold)}"
    yield f" {SENTENCE.format(gold)} {SENTENCE.format(gold + '1')}"
    yield f" The answer is $\\boxed{{{gold}}}$."
    yield f" {SENTENCE.format(gold).replace(' I hope it is correct.', '')}"
    yield f" {SENTENCE.format(gold + '1')}"
    yield ""


def test_the_memory_of_verdicts_says_what_the_harnesss_own_scorer_says(tasks, tmp_path):
    """The harness's module, read afresh from its file, judges the same completions."""
    from importlib.util import module_from_spec, spec_from_file_location

    from lm_eval.tasks.minerva_math import utils

    spec = spec_from_file_location("minerva_as_released", utils.__file__)
    fresh = module_from_spec(spec)
    spec.loader.exec_module(fresh)
    cases = [(prompts.boxed_answer(row["solution"]), row["solution"], []) for row in ROWS]
    cases += [(gold, rf"So it is $\boxed{{{gold}}}$.", ways) for gold, ways in ODD]
    given = next(iter(tasks["tasks"].values())).config.process_results
    again = next(iter(harness.load_tasks(tmp_path, harness.write_tasks(tmp_path, ROWS[:3], 0))["tasks"].values()))
    seen = []
    for gold, solution, ways in cases:
        doc = dict(solution=solution, answer=fresh.normalize_final_answer(gold))
        for text in [*completions_of(gold), *(f" {SENTENCE.format(way)}" for way in ways)]:
            expected = fresh.process_results(doc, [text])
            assert given(doc, [text]) == expected == given(doc, [text]), (gold, text)
            seen.append(expected["exact_match"])
    assert len(seen) > 280 and 0.2 < sum(seen) / len(seen) < 0.8
    assert utils.is_equiv.__module__ == utils.__name__ and utils.is_equiv.__closure__ is None  # the harness's own, untouched
    memory = lambda function: inspect.getclosurevars(inspect.unwrap(function)).nonlocals["memory"]  # noqa: E731
    assert len(memory(given)) >= 0.9 * len(seen) and not memory(again.config.process_results)


def test_the_harnesss_own_hf_model_gives_the_same_completions(tasks, answers, mini):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = harness.prompts_of(tasks)
    model = HFLM(pretrained=mini.model, tokenizer=mini.tokenizer, batch_size=16, max_length=512)
    names = list(asked)
    kwargs = {"until": [prompts.STOP], "do_sample": False, "temperature": 0, "max_gen_toks": 96}
    requests = [Instance("generate_until", {}, (asked[name], dict(kwargs)), i) for i, name in enumerate(names)]
    theirs = model.generate_until(requests, disable_tqdm=True)
    same = sum(answers[name].completion == text for name, text in zip(names, theirs, strict=True))
    assert same >= 0.99 * len(names)


def test_a_repetition_and_other_batches_give_the_same_answers(tasks, answers, mini):
    asked = dict(list(harness.prompts_of(tasks).items())[:20])
    once, again, smaller = [], [], []
    for found, batch_size in ((once, 16), (again, 16), (smaller, 5)):
        ask(mini, asked, 96, batch_size, found.extend)
    assert once == again and len(once) == 20
    for found in (once, smaller):  # sums in another order may tip one answer
        assert sum(answer.completion == answers[answer.problem_id].completion for answer in found) >= 19


def answer_of(tokens, mini, text):
    return answering._answer("id", 3, tokens(text, add_special_tokens=False).input_ids, mini)


def test_an_answer_ends_at_eos_at_the_stop_string_or_at_the_limit(tokens, mini):
    ids = tokens(" So it is $5$.", add_special_tokens=False).input_ids
    assert answering._answer("id", 3, [*ids, 1, 0, 0], mini).stopped_by == "eos"
    assert answering._answer("id", 3, [*ids, 1, 0, 0], mini).completion_tokens == len(ids)
    assert answer_of(tokens, mini, " So it is $5$.").stopped_by == "length"
    stopped = answer_of(tokens, mini, " So it is $5$.\nProblem:\nWhat")
    assert stopped.stopped_by == "stop" and stopped.completion == " So it is $5$.\n"


def test_any_stop_string_ends_an_answer_and_the_first_one_counts(tokens, mini):
    ids = tokens(" So it is $5$.\nProblem:\nWhat", add_special_tokens=False).input_ids
    cut = answering._answer("id", 3, ids, mini, ["\n", prompts.STOP])
    assert (cut.completion, cut.stopped_by) == (" So it is $5$.", "stop")
    assert tokens("\n", add_special_tokens=False).input_ids[-1] in answering.last_signs(tokens, ["\n"])


def test_the_chat_template_wraps_each_prompt_and_its_examples_and_leaves_bos_to_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    fabricate.tokenizer(tmp_path / "tokenizer", 1000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    four = harness.load_tasks(tmp_path, harness.write_tasks(tmp_path, ROWS[:3], num_fewshot=4))
    plain, asked = harness.prompts_of(four), harness.prompts_of(four, tokenizer)
    for name, text in asked.items():
        assert text.startswith("<start_of_turn>user\nProblem:") and text.endswith("<start_of_turn>model\n")
        assert text.count("<start_of_turn>") == 10 and text.count("<bos>") == 0
        assert plain[name].rsplit("Problem:", 1)[1].strip() in text
        assert tokenizer(text).input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("bos", ["<bos>", "<start_of_turn>", None])
def test_the_chat_template_is_left_as_it_is_where_the_tokenizer_adds_no_bos(tmp_path, bos):
    fabricate.tokenizer(tmp_path / "tokenizer", 1000)
    toys.opening(tmp_path / "tokenizer", bos=bos)
    tokenizer = loading.read_tokenizer(tmp_path / "tokenizer")
    if bos == "<start_of_turn>":  # as in SmolLM2, whose BOS is the mark of a turn
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("{{ bos_token }}")
    turns = [dict(role="user", content="What?")]
    text = harness._chat(tokenizer, turns)
    assert text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.count("<start_of_turn>") == 2 and text.startswith(bos or "<start_of_turn>")
    (ids,) = loading.token_ids(tokenizer, [text], whole=True)
    assert ids == tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids


def test_a_pass_costs_the_same_whether_there_is_a_bos_or_not(bare):
    ids = torch.full((1, 32), 2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bare.model(input_ids=ids, use_cache=False)
    assert mm.running_cost(bare)["flops"] == counter.get_total_flops() > 0


def test_a_task_of_ones_own_is_asked_and_scored_by_the_harness(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(TASK)
    rows = [dict(subject="sums", problem=f"{i} + {i}", solution=str(2 * i), hint="add") for i in range(4)]
    loaded = harness.load_tasks(tmp_path / "t", harness.write_tasks(tmp_path / "t", rows, 0, str(path)), str(path))
    asked = harness.prompts_of(loaded)
    assert asked[prompts.problem_id("sums", "3 + 3")] == "Q: 3 + 3\nA:" and harness.stops_of(loaded) == ("\n", "Q:")
    texts = {"0 + 0": " 0", "1 + 1": " it is 2", "2 + 2": " 5", "3 + 3": " none"}
    answers = {(name := prompts.problem_id("sums", q)): answering.Answer(name, 3, text, 2, "eos") for q, text in texts.items()}
    verdicts, errors = harness.score(loaded, answers, task=str(path))
    records = pd.DataFrame(mm.records("base", rows, answers, verdicts))
    assert records["exact_match"].tolist() == [1, 1, 0, 0] and records["extracted"].tolist() == ["0", "2", "5", prompts.INVALID]
    table = mm.measure(records, {"base": 1.0}).set_index("subject")
    assert table.loc["sums", "stderr"] == pytest.approx(errors["sums"]) and pd.isna(table.loc["all", "math_verify"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("generate_until", "loglikelihood", "generate_until"),
        ("metric: exact_match", "metric: acc", "exact_match"),
        ("do_sample: false", "do_sample: true", "no sampling"),
        ('["\\n", "Q:"]', '"Q:"', "a list of strings"),
    ],
)
def test_a_task_that_cannot_be_used_here_is_refused_in_one_line(tmp_path, old, new, said):
    path = tmp_path / "own.yaml"
    path.write_text(TASK.replace(old, new))
    names = harness.write_tasks(tmp_path / "t", [dict(subject="sums", problem="1", solution="1")], 0, str(path))
    with pytest.raises(UserError, match=said):
        harness.load_tasks(tmp_path / "t", names, str(path))
    with pytest.raises(UserError, match="there is no file"):
        harness.write_tasks(tmp_path / "t", ROWS[:1], 0, "absent.yaml")


def test_only_answered_problems_are_scored_when_asked_so(tasks, answers):
    some = dict(list(answers.items())[:3])
    verdicts, _ = harness.score(tasks, some, some=True)
    assert set(verdicts["problem_id"]) == set(some)
    with pytest.raises(KeyError):
        harness.score(tasks, some)


def test_a_problem_that_occurs_twice_is_asked_once_and_recorded_twice(tmp_path, mini):
    rows = problems.generate("test", {"number_theory": 3}, 0)
    rows = [*rows, dict(rows[1])]
    loaded = harness.load_tasks(tmp_path, harness.write_tasks(tmp_path, rows, 0))
    asked, found = harness.prompts_of(loaded), []
    assert len(asked) == 3
    ask(mini, asked, 8, 4, found.extend)
    answers = {answer.problem_id: answer for answer in found}
    verdicts, _ = harness.score(loaded, answers)
    records = mm.records("base", rows, answers, verdicts)
    assert len(records) == 4 and records[1] == records[3]
    table = mm.measure(pd.DataFrame(records), {"base": 1.0}).set_index("subject")
    assert table.loc["number_theory", "n"] == 4 and table.loc["number_theory", "stderr"] >= 0


def test_the_recorded_model_answers_generations_only(answers):
    with pytest.raises(NotImplementedError):
        harness.recorded_model(answers).loglikelihood([])


def test_accuracy_under_a_lower_limit_is_what_asking_again_gives(tasks, answers, mini):
    length = lambda text: len(mini.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    records = pd.DataFrame(mm.records("base", ROWS, answers, harness.score(tasks, answers)[0]))
    needed = [mm.tokens_to_answer(*row, length) for row in zip(records["completion"], records["extracted"], strict=True)]
    limits = (30, 45, 60)
    table = mm.accuracy_by_limit(records, needed, limits).set_index("limit")["accuracy"]
    assert table.is_monotonic_increasing and table[30] < table[60]
    for limit in limits:
        found = []
        ask(mini, harness.prompts_of(tasks), limit, 16, found.extend)
        again, _ = harness.score(tasks, {answer.problem_id: answer for answer in found})
        assert table[limit] == pytest.approx(again["exact_match"].mean())


def test_an_answer_that_was_never_readable_took_no_number_of_tokens():
    sentence = "Final Answer: The final answer is $4$. I hope it is correct."
    assert mm.tokens_to_answer(f"2 + 2. {sentence} Problem", "4", len) == len(f"2 + 2. {sentence}")
    assert mm.tokens_to_answer("so it is 4", prompts.INVALID, len) is None


def test_the_table_worked_by_hand():
    rows = [("algebra", 1, "7", "eos", 10), ("algebra", 0, prompts.INVALID, "length", 20), ("geometry", 0, "3", "eos", 30)]
    records = pd.DataFrame(rows, columns=["subject", "exact_match", "extracted", "stopped_by", "completion_tokens"]).assign(
        variant="base", math_verify=1
    )
    table = mm.measure(records, {"base": 2.0}).set_index("subject")
    assert table.loc["all", ["n", "correct", "mean_tokens", "general_loss"]].tolist() == [3, 1, 20, 2.0]
    assert table.loc["algebra", ["accuracy", "extractable", "truncated", "accuracy_given_extractable"]].tolist() == [
        0.5,
        0.5,
        0.5,
        1.0,
    ]
    assert table.loc["algebra", "stderr"] == pytest.approx(0.5)


def test_the_whole_vector_shrunk_to_the_stethoscopes_energy_is_in_every_layer():
    chosen = dict.fromkeys(("stethoscope", "stethoscope_matched", "least_specific", "largest_norm"), (0, 2))
    made = mm.variants(3, range(3), chosen, [(0, 1)], mm.NEEDED, 0.58)
    assert tuple(made) == mm.NEEDED and made["full_shrunk"] == mm.Variant("full_shrunk", "raw", (0, 1, 2), alpha=0.58)
    assert made["full"] == mm.Variant("full", "raw", (0, 1, 2)) and made["stethoscope"].layers == (0, 2)
    with pytest.raises(UserError, match="full_shrunk is not there"):
        mm.variants(3, range(3), chosen, [(0, 1)], [name for name in mm.NEEDED if name != "full_shrunk"], 0.58)
    with pytest.raises(UserError, match="unknown variant 'shrunk'"):
        mm.variants(3, range(3), chosen, [(0, 1)], [*mm.NEEDED, "shrunk"], 0.58)


def test_families_are_those_of_the_test_problems_or_none():
    from types import SimpleNamespace

    from stetholib.study.minerva_math import MinervaMath

    families = lambda rows: MinervaMath.families(SimpleNamespace(_problems=rows))  # noqa: E731
    found = families(ROWS)
    assert {found[prompts.problem_id(row["subject"], row["problem"])] for row in ROWS[:3]} == {r["family"] for r in ROWS[:3]}
    assert len(found) == len(ROWS) and families([dict(subject="algebra", problem="1 + 1")]) is None
