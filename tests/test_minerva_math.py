import pandas as pd
import pytest
import torch
from toys import TASK

from stetholib import fabricate
from stetholib import minerva_math as mm
from stetholib.errors import UserError
from stetholib.mini import problems


def ask(model, prompts, max_new_tokens, batch_size, keep):
    mm.answer_all(model, prompts, mm.plan(model.tokenizer, prompts, batch_size), max_new_tokens, keep)


ROWS = problems.generate("validation", dict.fromkeys(problems.SUBJECTS, 6), 0)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return mm.load_tasks(folder, mm.write_tasks(folder, ROWS, num_fewshot=0))


@pytest.fixture(scope="module")
def answers(tasks, mini):
    found = []
    ask(mini, mm.prompts_of(tasks), 96, 16, found.extend)
    return {answer.problem_id: answer for answer in found}


def test_the_harness_asks_every_problem_with_our_prompt(tasks):
    prompts = mm.prompts_of(tasks)
    assert prompts == {mm.problem_id(row["subject"], row["problem"]): mm.prompt(row["problem"]) for row in ROWS}


def test_four_shots_are_the_harnesss_own(tmp_path):
    four = mm.load_tasks(tmp_path, mm.write_tasks(tmp_path, ROWS[:8], num_fewshot=4))
    prompt = next(iter(mm.prompts_of(four).values()))
    assert prompt.count("Problem:") == 5 and "The final answer is $16$. I hope it is correct." in prompt


def test_a_task_that_lost_its_stop_string_is_refused(tmp_path):
    import yaml

    names = mm.write_tasks(tmp_path, ROWS[:3], num_fewshot=0)
    path = next(tmp_path.glob("*.yaml"))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"generation_kwargs": {"until": ["x"]}}))
    with pytest.raises(UserError, match="stops at"):
        mm.load_tasks(tmp_path, names)


def test_every_record_has_the_harnesss_own_verdicts_and_standard_error(tasks, answers):
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.tasks.minerva_math import utils

    verdicts, errors = mm.score(tasks, answers)
    records = pd.DataFrame(mm.records("base", ROWS, answers, verdicts))
    for row, record in zip(ROWS, records.itertuples(), strict=True):
        gold = utils.normalize_final_answer(mm.boxed_answer(row["solution"]))
        direct = utils.process_results(dict(row, answer=gold), [record.completion])
        assert (record.exact_match, record.math_verify) == (direct["exact_match"], direct["math_verify"])
        assert record.level == row["level"] and record.stopped_by in ("eos", "stop", "length")
    table = mm.measure(records, {"base": 1.5}).set_index("subject")
    for subject, part in records.groupby("subject"):
        assert table.loc[subject, "stderr"] == pytest.approx(mean_stderr(part["exact_match"].tolist()), abs=1e-12)
        assert table.loc[subject, "stderr"] == pytest.approx(errors[subject], abs=1e-12)
    assert table.loc["all", "n"] == 42 and table.loc["all", "correct"] == records["exact_match"].sum()


def test_the_harnesss_own_hf_model_gives_the_same_completions(tasks, answers, mini):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    prompts = mm.prompts_of(tasks)
    model = HFLM(pretrained=mini.model, tokenizer=mini.tokenizer, batch_size=16, max_length=512)
    names = list(prompts)
    kwargs = {"until": [mm.STOP], "do_sample": False, "temperature": 0, "max_gen_toks": 96}
    requests = [Instance("generate_until", {}, (prompts[name], dict(kwargs)), i) for i, name in enumerate(names)]
    theirs = model.generate_until(requests, disable_tqdm=True)
    same = sum(answers[name].completion == text for name, text in zip(names, theirs, strict=True))
    assert same >= 0.99 * len(names)


def test_a_repetition_and_other_batches_give_the_same_answers(tasks, answers, mini):
    prompts = dict(list(mm.prompts_of(tasks).items())[:20])
    once, again, smaller = [], [], []
    for found, batch_size in ((once, 16), (again, 16), (smaller, 5)):
        ask(mini, prompts, 96, batch_size, found.extend)
    assert once == again and len(once) == 20
    for found in (once, smaller):  # sums in another order may tip one answer
        assert sum(answer.completion == answers[answer.problem_id].completion for answer in found) >= 19


def test_rows_stop_one_by_one_at_the_stop_string(tokens):
    enders = mm.last_signs(tokens, [mm.STOP])
    done = mm.stop_rows(tokens, 3, enders)
    stop = tokens(mm.STOP + "\n", add_special_tokens=False).input_ids
    rows = torch.tensor([[2, 9, 9, 10, *stop], [2, 9, 9, *stop, 11]])
    assert done(rows, None).tolist() == [True, False]
    assert done(rows[:, :-1], None).tolist() == [False, True]
    prompt_only = torch.tensor([[2, *stop, 30]])
    assert mm.stop_rows(tokens, 2, enders)(prompt_only, None).tolist() == [False]


def answer_of(tokens, mini, text):
    return mm._answer("id", 3, tokens(text, add_special_tokens=False).input_ids, mini)


def test_an_answer_ends_at_eos_at_the_stop_string_or_at_the_limit(tokens, mini):
    ids = tokens(" So it is $5$.", add_special_tokens=False).input_ids
    assert mm._answer("id", 3, [*ids, 1, 0, 0], mini).stopped_by == "eos"
    assert mm._answer("id", 3, [*ids, 1, 0, 0], mini).completion_tokens == len(ids)
    assert answer_of(tokens, mini, " So it is $5$.").stopped_by == "length"
    stopped = answer_of(tokens, mini, " So it is $5$.\nProblem:\nWhat")
    assert stopped.stopped_by == "stop" and stopped.completion == " So it is $5$.\n"


def test_any_stop_string_ends_an_answer_and_the_first_one_counts(tokens, mini):
    ids = tokens(" So it is $5$.\nProblem:\nWhat", add_special_tokens=False).input_ids
    cut = mm._answer("id", 3, ids, mini, ["\n", mm.STOP])
    assert (cut.completion, cut.stopped_by) == (" So it is $5$.", "stop")
    assert tokens("\n", add_special_tokens=False).input_ids[-1] in mm.last_signs(tokens, ["\n"])


def test_batches_are_the_same_whatever_is_known_and_ranks_share_them_out(tasks, tokens):
    prompts = mm.prompts_of(tasks)
    batches = mm.plan(tokens, prompts, 5)
    assert sorted(name for batch in batches for name in batch) == sorted(prompts) and len(batches) == 9
    shuffled = dict(sorted(prompts.items(), key=lambda item: item[0][::-1]))
    assert mm.plan(tokens, shuffled, 5) == batches
    assert sorted(map(tuple, batches[0::2] + batches[1::2])) == sorted(map(tuple, batches))


def test_the_chat_template_wraps_each_prompt_and_its_examples_and_leaves_bos_to_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    fabricate.tokenizer(tmp_path / "tokenizer", 1000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    four = mm.load_tasks(tmp_path, mm.write_tasks(tmp_path, ROWS[:3], num_fewshot=4))
    plain, asked = mm.prompts_of(four), mm.prompts_of(four, tokenizer)
    for name, text in asked.items():
        assert text.startswith("<start_of_turn>user\nProblem:") and text.endswith("<start_of_turn>model\n")
        assert text.count("<start_of_turn>") == 10 and text.count("<bos>") == 0
        assert plain[name].rsplit("Problem:", 1)[1].strip() in text
        assert tokenizer(text).input_ids.count(tokenizer.bos_token_id) == 1


def test_a_task_of_ones_own_is_asked_and_scored_by_the_harness(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(TASK)
    rows = [dict(subject="sums", problem=f"{i} + {i}", solution=str(2 * i), hint="add") for i in range(4)]
    loaded = mm.load_tasks(tmp_path / "t", mm.write_tasks(tmp_path / "t", rows, 0, str(path)), str(path))
    prompts = mm.prompts_of(loaded)
    assert prompts[mm.problem_id("sums", "3 + 3")] == "Q: 3 + 3\nA:" and mm.stops_of(loaded) == ("\n", "Q:")
    texts = {"0 + 0": " 0", "1 + 1": " it is 2", "2 + 2": " 5", "3 + 3": " none"}
    answers = {(name := mm.problem_id("sums", q)): mm.Answer(name, 3, text, 2, "eos") for q, text in texts.items()}
    verdicts, errors = mm.score(loaded, answers, task=str(path))
    records = pd.DataFrame(mm.records("base", rows, answers, verdicts))
    assert records["exact_match"].tolist() == [1, 1, 0, 0] and records["extracted"].tolist() == ["0", "2", "5", mm.INVALID]
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
    names = mm.write_tasks(tmp_path / "t", [dict(subject="sums", problem="1", solution="1")], 0, str(path))
    with pytest.raises(UserError, match=said):
        mm.load_tasks(tmp_path / "t", names, str(path))
    with pytest.raises(UserError, match="there is no file"):
        mm.write_tasks(tmp_path / "t", ROWS[:1], 0, "absent.yaml")


def test_a_prompt_with_two_bos_is_refused(tokens):
    with pytest.raises(UserError, match="exactly once"):
        mm._assert_one_bos(torch.tensor([[2, 2, 5]]), tokens)


def test_only_answered_problems_are_scored_when_asked_so(tasks, answers):
    some = dict(list(answers.items())[:3])
    verdicts, _ = mm.score(tasks, some, some=True)
    assert set(verdicts["problem_id"]) == set(some)
    with pytest.raises(KeyError):
        mm.score(tasks, some)


def test_a_problem_that_occurs_twice_is_asked_once_and_recorded_twice(tmp_path, mini):
    rows = problems.generate("test", {"number_theory": 3}, 0)
    rows = [*rows, dict(rows[1])]
    loaded = mm.load_tasks(tmp_path, mm.write_tasks(tmp_path, rows, 0))
    prompts, found = mm.prompts_of(loaded), []
    assert len(prompts) == 3
    ask(mini, prompts, 8, 4, found.extend)
    answers = {answer.problem_id: answer for answer in found}
    verdicts, _ = mm.score(loaded, answers)
    records = mm.records("base", rows, answers, verdicts)
    assert len(records) == 4 and records[1] == records[3]
    table = mm.measure(pd.DataFrame(records), {"base": 1.0}).set_index("subject")
    assert table.loc["number_theory", "n"] == 4 and table.loc["number_theory", "stderr"] >= 0


def test_the_recorded_model_answers_generations_only(answers):
    with pytest.raises(NotImplementedError):
        mm.recorded_model(answers).loglikelihood([])


def test_accuracy_under_a_lower_limit_is_what_asking_again_gives(tasks, answers, mini):
    length = lambda text: len(mini.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    records = pd.DataFrame(mm.records("base", ROWS, answers, mm.score(tasks, answers)[0]))
    needed = [mm.tokens_to_answer(*row, length) for row in zip(records["completion"], records["extracted"], strict=True)]
    limits = (30, 45, 60)
    table = mm.accuracy_by_limit(records, needed, limits).set_index("limit")["accuracy"]
    assert table.is_monotonic_increasing and table[30] < table[60]
    for limit in limits:
        found = []
        ask(mini, mm.prompts_of(tasks), limit, 16, found.extend)
        again, _ = mm.score(tasks, {answer.problem_id: answer for answer in found})
        assert table[limit] == pytest.approx(again["exact_match"].mean())


def test_an_answer_that_was_never_readable_took_no_number_of_tokens():
    sentence = "Final Answer: The final answer is $4$. I hope it is correct."
    assert mm.tokens_to_answer(f"2 + 2. {sentence} Problem", "4", len) == len(f"2 + 2. {sentence}")
    assert mm.tokens_to_answer("so it is 4", mm.INVALID, len) is None


def test_the_table_worked_by_hand():
    rows = [("algebra", 1, "7", "eos", 10), ("algebra", 0, mm.INVALID, "length", 20), ("geometry", 0, "3", "eos", 30)]
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
