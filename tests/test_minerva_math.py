import pandas as pd
import pytest
import torch

from stetholib import minerva_math as mm
from stetholib.errors import UserError
from stetholib.mini import problems

ROWS = problems.generate("validation", dict.fromkeys(problems.SUBJECTS, 6), 0)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return mm.load_tasks(folder, mm.write_tasks(folder, ROWS, num_fewshot=0))


@pytest.fixture(scope="module")
def answers(tasks, mini):
    found = []
    mm.answer_all(mini, mm.prompts_of(tasks), 96, 16, found.extend)
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
    for batch_size, exact in ((16, True), (5, False)):
        found = []
        mm.answer_all(mini, prompts, 96, batch_size, found.extend)
        same = [answer.completion == answers[answer.problem_id].completion for answer in found]
        assert sum(same) >= 19 and (not exact or len(same) == 20)


def test_rows_stop_one_by_one_at_the_stop_string(tokens):
    done = mm.stop_rows(tokens, prompt_width=3)
    stop = tokens(mm.STOP + "\n", add_special_tokens=False).input_ids
    rows = torch.tensor([[2, 9, 9, 10, *stop], [2, 9, 9, *stop, 11]])
    assert done(rows, None).tolist() == [True, False]
    assert done(rows[:, :-1], None).tolist() == [False, True]
    prompt_only = torch.tensor([[2, *stop, 30]])
    assert mm.stop_rows(tokens, prompt_width=2)(prompt_only, None).tolist() == [False]


def answer_of(tokens, mini, text):
    return mm._answer("id", 3, tokens(text, add_special_tokens=False).input_ids, mini)


def test_an_answer_ends_at_eos_at_the_stop_string_or_at_the_limit(tokens, mini):
    ids = tokens(" So it is $5$.", add_special_tokens=False).input_ids
    assert mm._answer("id", 3, [*ids, 1, 0, 0], mini).stopped_by == "eos"
    assert mm._answer("id", 3, [*ids, 1, 0, 0], mini).completion_tokens == len(ids)
    assert answer_of(tokens, mini, " So it is $5$.").stopped_by == "length"
    stopped = answer_of(tokens, mini, " So it is $5$.\nProblem:\nWhat")
    assert stopped.stopped_by == "stop" and stopped.completion == " So it is $5$.\n"


def test_a_prompt_with_two_bos_is_refused(tokens):
    with pytest.raises(UserError, match="exactly once"):
        mm._assert_one_bos(torch.tensor([[2, 2, 5]]), tokens)


def test_only_answered_problems_are_scored_when_asked_so(tasks, answers):
    some = dict(list(answers.items())[:3])
    verdicts, _ = mm.score(tasks, some, partial=True)
    assert set(verdicts["problem_id"]) == set(some)
    with pytest.raises(KeyError):
        mm.score(tasks, some)


def test_the_recorded_model_answers_generations_only(answers):
    with pytest.raises(NotImplementedError):
        mm.recorded_model(answers).loglikelihood([])


def test_accuracy_under_a_lower_limit_is_what_asking_again_gives(tasks, answers, mini):
    length = lambda text: len(mini.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    records = pd.DataFrame(mm.records("base", ROWS, answers, mm.score(tasks, answers)[0]))
    needed = [mm.tokens_to_answer(text, length) for text in records["completion"]]
    limits = (30, 45, 60)
    table = mm.accuracy_by_limit(records, needed, limits).set_index("limit")["accuracy"]
    assert table.is_monotonic_increasing and table[30] < table[60]
    for limit in limits:
        found = []
        mm.answer_all(mini, mm.prompts_of(tasks), limit, 16, found.extend)
        again, _ = mm.score(tasks, {answer.problem_id: answer for answer in found})
        assert table[limit] == pytest.approx(again["exact_match"].mean())


def test_an_answer_that_was_never_readable_took_no_number_of_tokens():
    sentence = "Final Answer: The final answer is $4$. I hope it is correct."
    assert mm.tokens_to_answer(f"2 + 2. {sentence} Problem", len) == len(f"2 + 2. {sentence}")
    assert mm.tokens_to_answer("so it is 4", len) is None


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
