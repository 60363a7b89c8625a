"""A model answers prompts: greedily, over transformers, each row until its own stop string.

    opening |  problem A  | answer ...          what all prompts open with (four shots) is computed once
            |  problem B  | answer .            a row leaves when it ends, and a waiting problem takes its slot
            |  problem C  | answer ......

The unit of record is a chunk of problems that never changes: what stands beside a row touches the last bits of its
answer, and within a chunk it depends on nothing else. Prompts of equal length are read together, so that nothing is
padded while reading; rows that join are padded on the *left* of everything, since pads after the opening would push it
out of a sliding window, which counts slots of the cache."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch

from stetholib.data.prompts import STOP
from stetholib.errors import UserError
from stetholib.models.loading import LanguageModel, token_ids
from stetholib.models.streams import common, no_cache

CHUNK = 512  # problems: many more than slots, few enough that a kill loses little
Cache = Any  # transformers' DynamicCache
Prompts = Mapping[str, str]  # by problem id
REFILL = 8  # rows are dropped and slots filled when one in so many has ended: each time the whole cache is copied


@dataclass(frozen=True)
class Answer:
    """One answer as the model gave it; `stopped_by` is `stop`, `eos` or `length`."""

    problem_id: str
    prompt_tokens: int
    completion: str
    completion_tokens: int
    stopped_by: str


@dataclass(frozen=True)
class Limits:
    """When an answer ends, and how many are under way at once."""

    max_new_tokens: int
    slots: int
    stops: tuple[str, ...] = (STOP,)


def plan(tokenizer: Any, prompts: Prompts, size: int = CHUNK) -> list[list[str]]:
    """Problem ids in the chunks that they are always answered in, whoever asks and whatever is known: longest first."""
    lengths = {name: len(tokenizer(text).input_ids) for name, text in prompts.items()}
    order = sorted(prompts, key=lambda name: (-lengths[name], prompts[name]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def planned(model: LanguageModel, prompts: Prompts, max_new_tokens: int) -> list[list[str]]:
    """The chunks of `plan`; raises UserError where the model's context has no room for a prompt and its answer."""
    longest = max(map(len, token_ids(model.tokenizer, prompts.values(), whole=True)))
    if model.context is not None and longest + max_new_tokens > model.context:
        raise UserError(
            f"evaluation: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {model.context}; "
            "lower evaluation.num_fewshot or evaluation.max_new_tokens"
        )
    return plan(model.tokenizer, prompts)


def answer_all(
    model: LanguageModel, prompts: Prompts, chunks: Iterable[Sequence[str]], limits: Limits, keep: Callable[[list[Answer]], None]
) -> None:
    """Answer these chunks greedily and hand each to `keep` as soon as it is done."""
    ends = Ends(model, limits)
    for names in chunks:
        ids = dict(zip(names, token_ids(model.tokenizer, [prompts[name] for name in names], whole=True), strict=True))
        new = _answered(model, ids, limits, ends)
        keep([_answer(name, len(ids[name]), new[name], model, limits.stops) for name in names])


def answer_some(model: LanguageModel, prompts: Prompts, limits: Limits) -> list[Answer]:
    """Answers to a few problems, in chunks of their own."""
    found: list[Answer] = []
    answer_all(model, prompts, plan(model.tokenizer, prompts), limits, found.extend)
    return found


@dataclass
class Row:
    """An answer under way: its problem, how many tokens the cache holds of it, its new tokens, of which the last is not in the
    cache yet, and whether it has ended."""

    name: str
    held: int
    new: list[int]
    done: bool


Rows = tuple[Cache, list[Row]]  # answers under way with their cache [row, ...], padded on the left


@torch.no_grad()
def _answered(model: LanguageModel, ids: Mapping[str, list[int]], limits: Limits, ends: "Ends") -> dict[str, list[int]]:
    """New tokens of every problem of a chunk, by problem id; ids: of the prompts, in the order that they take slots."""
    shared = min(common([*ids.values()]), min(map(len, ids.values())) - 1)
    opening = no_cache(model.model)
    if shared:
        _forward(model, opening, [next(iter(ids.values()))[:shared]], 0)
    found: dict[str, list[int]] = {}
    cache, rows, waiting = no_cache(model.model), list[Row](), list(ids)
    while waiting or rows:
        if REFILL * sum(row.done for row in rows) >= len(rows):
            found |= {row.name: row.new for row in rows if row.done}
            stay = [at for at, row in enumerate(rows) if not row.done]
            fresh, waiting = waiting[: limits.slots - len(stay)], waiting[limits.slots - len(stay) :]
            equal = (list(same) for _, same in groupby(fresh, lambda name: len(ids[name])))
            cache, rows = _joined(model, cache, rows, stay, [_read(model, opening, shared, names, ids, ends) for names in equal])
        if rows:
            _step(model, cache, rows, ends)
    return found


def _read(
    model: LanguageModel, opening: Cache, shared: int, names: list[str], ids: Mapping[str, list[int]], ends: "Ends"
) -> Rows:
    """Prompts of equal length, read after the opening that they share, each with its first new token."""
    cache = deepcopy(opening)
    cache.batch_repeat_interleave(len(names))
    tokens = _forward(model, cache, [ids[name][shared:] for name in names], shared).argmax(-1).tolist()
    return cache, [Row(name, len(ids[name]), [token], ends([token])) for name, token in zip(names, tokens, strict=True)]


def _step(model: LanguageModel, cache: Cache, rows: list[Row], ends: "Ends") -> None:
    """One more token of every row; those that have ended and wait to be dropped take part, and nobody reads what they say."""
    held, width = torch.tensor([[row.held] for row in rows], device=model.device), cache.get_seq_length()
    mask = torch.arange(width + 1, device=model.device) >= width - held
    logits = _forward(model, cache, [row.new[-1:] for row in rows], held, mask.long())
    for row, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
        row.held += 1
        if not row.done:
            row.new.append(token)
            row.done = ends(row.new)


def _forward(model: LanguageModel, cache: Cache, ids: list[list[int]], start: Any, mask: Any = None) -> torch.Tensor:
    """Logits after the last of these tokens [row, token], the first of which stands at `start`; the cache grows."""
    tokens = torch.tensor(ids, device=model.device)
    positions = (start + torch.arange(tokens.shape[1], device=model.device)).expand_as(tokens)
    inputs = dict(input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache)
    return model.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].float()


def _joined(model: LanguageModel, old: Cache, rows: list[Row], stay: list[int], read: Sequence[Rows]) -> Rows:
    """The rows that stay, of those under way, and those that were read, in one cache as wide as the longest of them."""
    if stay:
        old.batch_select_indices(torch.tensor(stay, device=model.device))
        read = [(old, [rows[at] for at in stay]), *read]
    joined = [row for _, some in read for row in some]
    width, cache = max((row.held for row in joined), default=0), no_cache(model.model)
    layer: Any
    for index, layer in enumerate(cache.layers if read else ()):
        kept: list[Any] = [part.layers[index] for part, _ in read]
        held = min(width, layer.sliding_window - 1) if layer.is_sliding else width
        layer.update(*(torch.cat([_fitted(getattr(one, kind), held) for one in kept]) for kind in ("keys", "values")))
        if layer.is_sliding:
            layer.cumulative_length = width
    return cache, joined


def _fitted(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values [row, head, slot, d] with so many slots: pads are dropped, or put, on the left."""
    missing = width - states.shape[2]
    return torch.nn.functional.pad(states, (0, 0, missing, 0)) if missing > 0 else states[:, :, -missing:]


class Ends:
    """Whether an answer has ended: at EOS, at its limit, or as soon as its text holds a stop string. Only rows whose last token
    is one of `last_signs` are decoded, so it costs next to nothing."""

    def __init__(self, model: LanguageModel, limits: Limits) -> None:
        """limits: the stop strings, and how many tokens an answer may have."""
        self._decode, self._limits = partial(model.tokenizer.decode, skip_special_tokens=True), limits
        self._signs, self._eos = last_signs(model.tokenizer, limits.stops), eos_of(model)
        self._longest = max(map(len, limits.stops))

    def __call__(self, new: list[int]) -> bool:
        """new: the tokens of one answer; what comes after its end is cut off later."""
        if len(new) >= self._limits.max_new_tokens or new[-1] in self._eos:
            return True
        return new[-1] in self._signs and _first_stop(self._decode(new[-self._longest :]), self._limits.stops) is not None


def eos_of(model: LanguageModel) -> set[int]:
    """The tokens that end a text."""
    eos = model.model.generation_config.eos_token_id
    return {eos} if isinstance(eos, int) else set(eos or ())


def last_signs(tokenizer: Any, stops: Sequence[str]) -> set[int]:
    """The tokens that hold the last sign of a stop string; only after one of these can a stop string be complete."""
    signs = {stop[-1] for stop in stops} | {"\N{REPLACEMENT CHARACTER}"}  # which stands for a part of a longer sign
    ids = sorted(tokenizer.get_vocab().values())
    return {
        index for index, text in zip(ids, tokenizer.batch_decode([[index] for index in ids]), strict=True) if signs & set(text)
    }


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins; None without one."""
    return min((found for stop in stops if (found := text.find(stop)) >= 0), default=None)


def _answer(name: str, prompt_tokens: int, tokens: list[int], model: LanguageModel, stops: Sequence[str] = (STOP,)) -> Answer:
    """What was said up to its end; a row goes on for a while after the token that completes a stop string."""
    ends, decode = eos_of(model), partial(model.tokenizer.decode, skip_special_tokens=True)
    ended = next((i for i, token in enumerate(tokens) if token in ends), None)
    body, text = tokens[:ended], decode(tokens[:ended])
    reason = "length" if ended is None else "eos"
    if (cut := _first_stop(text, stops)) is not None:
        complete = (end for end in range(1, len(body)) if _first_stop(decode(body[:end]), stops) is not None)
        body, reason = body[: next(complete, None)], "stop"
    return Answer(name, prompt_tokens, text[:cut], len(body), reason)
