"""The answering loop against transformers' own `generate`, one row at a time, where nothing is padded or shared."""

import pytest
import torch

from stetholib.data import prompts
from stetholib.data.mini import base, problems
from stetholib.errors import UserError
from stetholib.models import answering
from stetholib.models.answering import Limits
from stetholib.models.loading import LanguageModel

ROWS = problems.generate("validation", dict.fromkeys(problems.SUBJECTS, 2), 0)
ZERO = {f"{i:02}": prompts.prompt(row["problem"]) for i, row in enumerate(ROWS)}
SHOTS = "\n\n".join(prompts.prompt(row["problem"]) + prompts.target(row["solution"]) for row in ROWS[:2]) + "\n\n"
FEW = {name: SHOTS + text for name, text in ZERO.items()}


@pytest.fixture(scope="module")
def narrow(tokens):
    """An untrained Gemma 3 whose windows hold 16 tokens, so that openings and answers slide out of them."""
    from transformers import Gemma3ForCausalLM

    torch.manual_seed(1)
    config = base.config(layers=6, hidden=32, vocab_size=len(tokens))
    config.sliding_window = 16
    return LanguageModel(Gemma3ForCausalLM(config).eval().requires_grad_(False), tokens)


def alone(model, text, limit):
    """New tokens of one prompt, from transformers' `generate`."""
    ids = torch.tensor([model.tokenizer(text).input_ids])
    new = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0)
    return new[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("asked", "slots"), [(ZERO, 3), (FEW, 64), (FEW, 4)])
def test_answers_are_those_of_one_row_at_a_time_inside_and_outside_of_a_window(narrow, asked, slots):
    found = answering.answer_some(narrow, asked, Limits(24, slots))
    assert sorted(answer.problem_id for answer in found) == sorted(asked)
    expected = {name: answering._answer(name, 0, alone(narrow, text, 24), narrow) for name, text in asked.items()}
    wrong = [a.problem_id for a in found if a.completion != expected[a.problem_id].completion]
    assert not wrong
    assert {a.problem_id: (a.completion_tokens, a.stopped_by) for a in found} == {
        name: (one.completion_tokens, one.stopped_by) for name, one in expected.items()
    }


def test_the_shipped_model_answers_as_generate_does(mini):
    found = {answer.problem_id: answer for answer in answering.answer_some(mini, ZERO, Limits(96, 8))}
    for name in sorted(ZERO)[::4]:
        assert found[name].completion == answering._answer(name, 0, alone(mini, ZERO[name], 96), mini).completion
    assert {answer.stopped_by for answer in found.values()} <= {"eos", "stop", "length"}


def test_a_chunk_gives_the_same_bytes_whatever_else_is_asked(mini):
    chunks = answering.plan(mini.tokenizer, ZERO, 4)
    whole, last = [], []
    answering.answer_all(mini, ZERO, chunks, Limits(96, 4), whole.extend)
    answering.answer_all(mini, ZERO, chunks[-1:], Limits(96, 4), last.extend)
    assert whole[-len(last) :] == last and len(whole) == len(ZERO)


def test_the_opening_is_read_once_and_slots_are_refilled(mini, monkeypatch):
    passed, forward = [], answering._forward

    def counted(model, cache, ids, *rest):
        passed.append((len(ids), len(ids[0])))
        return forward(model, cache, ids, *rest)

    monkeypatch.setattr(answering, "_forward", counted)
    found = answering.answer_some(mini, FEW, Limits(60, 4))
    ids = [mini.tokenizer(text).input_ids for text in FEW.values()]
    shared = passed[0][1]
    assert shared > 80 and all(row[:shared] == ids[0][:shared] for row in ids)
    read = sum(rows * tokens for rows, tokens in passed[1:] if tokens > 1)
    assert read <= sum(len(row) - shared for row in ids)
    steps = sum(rows for rows, tokens in passed if tokens == 1)
    assert steps < 1.5 * sum(answer.completion_tokens for answer in found) + 60 * 4


def test_chunks_are_the_same_whatever_is_known_and_ranks_share_them_out(tokens):
    chunks = answering.plan(tokens, ZERO, 3)
    assert sorted(name for chunk in chunks for name in chunk) == sorted(ZERO) and len(chunks) == 5
    assert answering.plan(tokens, dict(reversed(ZERO.items())), 3) == chunks
    lengths = [len(tokens(ZERO[name]).input_ids) for chunk in chunks for name in chunk]
    assert lengths == sorted(lengths, reverse=True)


def test_a_row_ends_at_eos_at_its_limit_or_at_a_stop_string_and_not_before(mini):
    ends = answering.Ends(mini, Limits(30, 4))
    stop = mini.tokenizer(prompts.STOP + "\n", add_special_tokens=False).input_ids
    assert not ends([9, 9, *stop[:-1], 9]) and ends([9, 9, *stop]) and ends([9, 1]) and ends([9] * 30) and not ends([9] * 29)


def test_one_prompt_alone_and_equal_prompts_are_answered(mini):
    text = ZERO["00"]
    one = answering.answer_some(mini, {"a": text}, Limits(60, 4))
    three = answering.answer_some(mini, {"a": text, "b": text, "c": text}, Limits(60, 2))
    assert {answer.completion for answer in three} == {one[0].completion}


def test_a_tokenizer_that_adds_no_bos_asks_without_one_whatever_the_prompts_share(bare):
    apart = {"word": "What", "other": "Solve 1 + 2", "long": ZERO["00"]}
    for asked in (ZERO, apart, {"alone": "What"}):
        found = {answer.problem_id: answer for answer in answering.answer_some(bare, asked, Limits(12, 3))}
        for name, text in asked.items():
            new = alone(bare, text, 12)
            assert found[name] == answering._answer(name, len(bare.tokenizer(text).input_ids), new, bare)
    assert len(bare.tokenizer("What").input_ids) == 1


@pytest.mark.parametrize("text", ["<bos>What", "What<bos>", "\n<bos>What"])
def test_a_prompt_with_two_bos_is_refused(mini, text):
    for ask in (lambda asked: answering.planned(mini, asked, 4), lambda asked: answering.answer_some(mini, asked, Limits(4, 2))):
        with pytest.raises(UserError, match="<bos> exactly once, found 2"):
            ask({"a": ZERO["00"], "b": text})
