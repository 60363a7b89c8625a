"""A model answers prompts: greedily, in batches that are always the same, each row until its own stop string."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stetholib.data.prompts import STOP
from stetholib.errors import UserError
from stetholib.models.loading import LanguageModel


@dataclass(frozen=True)
class Answer:
    """One answer as the model gave it; `stopped_by` is `stop`, `eos` or `length`."""

    problem_id: str
    prompt_tokens: int
    completion: str
    completion_tokens: int
    stopped_by: str


def plan(tokenizer: Any, prompts: Mapping[str, str], batch_size: int) -> list[list[str]]:
    """Problem ids in the batches that they are always answered in, whoever asks and whatever is known: longest first.

    Padding touches the last bits of an answer, so the batches are fixed. Among prompts of about the same length, those
    that open alike share a batch: their answers tend to end together.
    """
    lengths = {name: len(tokenizer(text).input_ids) for name, text in prompts.items()}
    order = sorted(prompts, key=lambda name: (-(lengths[name] // 8), prompts[name]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def answer_all(
    model: LanguageModel,
    prompts: Mapping[str, str],
    batches: Iterable[Sequence[str]],
    max_new_tokens: int,
    keep: Callable[[list[Answer]], None],
    stops: Sequence[str] = (STOP,),
) -> None:
    """Answer these batches greedily and hand each to `keep` as soon as it is done.

    prompts: by problem id. Batches are padded on the left. Generation ends at a stop string, at EOS or at the limit.
    """
    tokenizer = model.tokenizer
    enders = last_signs(tokenizer, stops)
    for names in batches:
        encoded = tokenizer([prompts[name] for name in names], return_tensors="pt", padding=True).to(model.device)
        _assert_one_bos(encoded.input_ids, tokenizer)
        with torch.no_grad():
            output = model.model.generate(
                **{k: v for k, v in encoded.items() if k in ("input_ids", "attention_mask")},
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stopping_criteria=[stop_rows(tokenizer, encoded.input_ids.shape[1], enders, stops)],
                pad_token_id=tokenizer.pad_token_id,
            )
        new, lengths = output[:, encoded.input_ids.shape[1] :].tolist(), encoded.attention_mask.sum(1).tolist()
        keep([_answer(*row, model, stops) for row in zip(names, lengths, new, strict=True)])


def answer_some(
    model: LanguageModel, prompts: Mapping[str, str], batch_size: int, max_new_tokens: int, stops: Sequence[str]
) -> list[Answer]:
    """Answers to a few problems, in batches of their own."""
    found: list[Answer] = []
    answer_all(model, prompts, plan(model.tokenizer, prompts, batch_size), max_new_tokens, found.extend, stops)
    return found


def planned(model: LanguageModel, prompts: Mapping[str, str], batch_size: int, max_new_tokens: int) -> list[list[str]]:
    """The batches of `plan`; raises UserError where the model's context has no room for a prompt and its answer."""
    longest = max(len(model.tokenizer(text).input_ids) for text in prompts.values())
    if model.context is not None and longest + max_new_tokens > model.context:
        raise UserError(
            f"evaluation: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {model.context}; "
            "lower evaluation.num_fewshot or evaluation.max_new_tokens"
        )
    return plan(model.tokenizer, prompts, batch_size)


def last_signs(tokenizer: Any, stops: Sequence[str]) -> set[int]:
    """The tokens that hold the last sign of a stop string; only after one of these can a stop string be complete."""
    signs = {stop[-1] for stop in stops} | {"\N{REPLACEMENT CHARACTER}"}  # which stands for a part of a longer sign
    ids = sorted(tokenizer.get_vocab().values())
    return {
        index for index, text in zip(ids, tokenizer.batch_decode([[index] for index in ids]), strict=True) if signs & set(text)
    }


def stop_rows(tokenizer: Any, prompt_width: int, enders: set[int], stops: Sequence[str] = (STOP,)) -> Callable[..., torch.Tensor]:
    """A stopping criterion that ends each row of a batch on its own as soon as its new text holds a stop string.

    Only rows whose last token is one of `enders` are decoded, so it costs next to nothing.
    """
    longest = max(map(len, stops))

    def done(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        last = input_ids[:, -1].tolist()
        recent = input_ids[:, prompt_width:][:, -longest:]
        return torch.tensor(
            [
                token in enders and _first_stop(tokenizer.decode(row, skip_special_tokens=True), stops) is not None
                for token, row in zip(last, recent, strict=True)
            ],
            device=input_ids.device,
        )

    return done


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins; None without one."""
    return min((found for stop in stops if (found := text.find(stop)) >= 0), default=None)


def _assert_one_bos(ids: torch.Tensor, tokenizer: Any) -> None:
    """Every prompt opens with BOS exactly once; a doubled one quietly costs accuracy."""
    counts = (ids == tokenizer.bos_token_id).sum(1)
    if int(counts.min()) != 1 or int(counts.max()) != 1:
        raise UserError(f"minerva_math: each prompt must hold {tokenizer.bos_token} exactly once, found {int(counts.max())}")


def _answer(name: str, prompt_tokens: int, tokens: list[int], model: LanguageModel, stops: Sequence[str] = (STOP,)) -> Answer:
    eos = model.model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    ended = next((i for i, token in enumerate(tokens) if token in ends), None)
    body = tokens if ended is None else tokens[:ended]
    text = model.tokenizer.decode(body, skip_special_tokens=True)
    if (cut := _first_stop(text, stops)) is not None:
        body, reason = _until_stop(body, model.tokenizer, stops), "stop"
    else:
        reason = "length" if ended is None else "eos"
    return Answer(name, prompt_tokens, text[:cut], len(body), reason)


def _until_stop(tokens: list[int], tokenizer: Any, stops: Sequence[str]) -> list[int]:
    """The tokens up to the one that completes a stop string; batched generation pads on after it."""
    for end in range(1, len(tokens)):
        if _first_stop(tokenizer.decode(tokens[:end], skip_special_tokens=True), stops) is not None:
            return tokens[:end]
    return tokens
