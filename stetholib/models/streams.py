"""What runs through a model: texts as batches of tokens, taps on the residual stream, and losses."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from sys import maxsize
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stetholib.errors import UserError
from stetholib.models.loading import LanguageModel, check_finite, token_ids
from stetholib.models.weights import decoder_blocks

Texts = Sequence[tuple[str, str]]  # (context, scored text)
Tokenized = Sequence[tuple[list[int], int]]  # (token ids of both, how many of them are context)
Watch = Callable[[Sequence[Any], str], Iterable[Any]]  # (items, label) -> the items, with progress shown or not


def unwatched(items: Sequence[Any], label: str) -> Iterable[Any]:
    """Iterate and say nothing."""
    return items


OPENING = 64  # tokens: what is shorter is not worth a cache of its own


@dataclass(frozen=True)
class Batch:
    """Left-aligned token ids with their mask; `scored` marks the tokens whose loss, or features, count, and `closing` those
    of them that belong to the closing sentence. opening: the tokens that come before each row, the same for all of a pool."""

    documents: tuple[int, ...]
    input_ids: Int[Tensor, "doc seq"]
    attention_mask: Int[Tensor, "doc seq"]
    scored: Int[Tensor, "doc seq"]
    closing: Int[Tensor, "doc seq"]
    opening: tuple[int, ...] = ()


@dataclass(frozen=True)
class DocumentLosses:
    """Summed loss of each document, in nats: of the solution before its closing sentence, and of that sentence. tokens: how many
    are scored in the whole of it, which both parts are divided by, so that they add up to the whole's loss."""

    solution: Float[np.ndarray, " doc"]
    closing: Float[np.ndarray, " doc"]
    tokens: Float[np.ndarray, " doc"]

    def nats(self, part: str = "solution") -> Float[np.ndarray, " doc"]:
        """Summed loss of each document; part: `solution`, `closing` or `total`."""
        return self.solution + self.closing if part == "total" else getattr(self, part)

    def mean(self, part: str = "solution", where: np.ndarray | None = None) -> float:
        """Nats a token of the whole solution, over all documents or where a mask is True."""
        at = slice(None) if where is None else where
        return float(self.nats(part)[at].sum() / self.tokens[at].sum())


@contextmanager
def residual_stream(model: nn.Module) -> Iterator[dict[int, Float[Tensor, "doc seq d_model"]]]:
    """Tap the residual stream: inside, every forward pass fills the dict with each block's output. The block's own output is what
    Gemma Scope's SAEs read; `hidden_states[-1]` would be after the final norm."""
    taken: dict[int, Tensor] = {}

    def keep(layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        taken[layer] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for layer, block in enumerate(decoder_blocks(model)):
            hooks.enter_context(block.register_forward_hook(partial(keep, layer)))
        yield taken


def tokenize(model: LanguageModel, texts: Texts, max_tokens: int) -> list[tuple[list[int], int]]:
    """Token ids of each (context, scored text) pair and how many of them are context; texts are cut at `max_tokens`. The first
    token is never heard or scored, BOS or not: nothing comes before it that could predict it, and attention drains into it."""
    found = token_ids(model.tokenizer, [context + text for context, text in texts])
    shared = (_shared(model, context, ids) for (context, _), ids in zip(texts, found, strict=True))
    return [(ids[:max_tokens], min(held, max_tokens)) for ids, held in zip(found, shared, strict=True)]


def _shared(model: LanguageModel, opening: str, ids: Sequence[int]) -> int:
    """How many tokens of a text are those of its opening alone; one that spans the boundary belongs to what follows."""
    return common([model.tokenizer(opening).input_ids, ids])


def batches(
    pairs: Tokenized, batch_tokens: int, device: torch.device | str, closing_from: Mapping[int, int] | None = None
) -> list[Batch]:
    """Padded batches of at most `batch_tokens` tokens, texts of like length together; order is by length, then index.
    closing_from: where the closing sentence begins, in tokens, by the index of each text that has one."""
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), i))
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * len(pairs[index][0]) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_batch(pairs, group, device, closing_from or {}) for group in groups]


def _batch(pairs: Tokenized, group: list[int], device: torch.device | str, closing_from: Mapping[int, int]) -> Batch:
    width = max(len(pairs[i][0]) for i in group)
    ids, mask, scored, closing = (torch.zeros(len(group), width, dtype=torch.long) for _ in range(4))
    for row, index in enumerate(group):
        tokens, context = pairs[index]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        scored[row, max(context, 1) : len(tokens)] = 1
        closing[row, closing_from.get(index, width) :] = 1
    closing *= scored
    return Batch(tuple(group), ids.to(device), mask.to(device), scored.to(device), closing.to(device))


def token_losses(model: nn.Module, batch: Batch, opened: Any = None) -> Float[Tensor, "doc seq"]:
    """Cross-entropy of each scored token, in nats; zero elsewhere. Position t is the loss of predicting token t.
    opened: the cache of the batch's opening, of `opening_cache`, where it has one."""
    inputs: dict[str, Any] = dict(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    if opened is not None:
        rows, width, held = *batch.input_ids.shape, len(batch.opening)
        cache = deepcopy(opened)
        cache.batch_repeat_interleave(rows)
        positions = held + torch.arange(width, device=batch.input_ids.device).expand(rows, width)
        mask = nn.functional.pad(batch.attention_mask, (held, 0), value=1)
        inputs |= dict(attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    columns = batch.scored.any(0).nonzero()[:, 0]  # a vocabulary's logits of the prompt are most of the work, and of no use
    logits = model(**inputs, logits_to_keep=columns - 1).logits.flatten(0, 1).float()
    losses = nn.functional.cross_entropy(logits, batch.input_ids[:, columns].flatten(), reduction="none")
    found = torch.zeros_like(batch.scored, dtype=losses.dtype)
    return found.index_copy(1, columns, losses.view(len(batch.input_ids), len(columns))) * batch.scored


def no_cache(model: nn.Module) -> Any:
    """Keys and values of nothing yet, as transformers keeps them for this model."""
    from transformers import DynamicCache  # here, so that what runs no model starts without transformers

    config: Any = model.config
    return DynamicCache(config=config)


def opening_cache(model: nn.Module, opening: Sequence[int], device: torch.device) -> Any:
    """Keys and values of what all rows of a pool open with, computed once; None where that is nothing."""
    if not opening:
        return None
    cache = no_cache(model)
    model(input_ids=torch.tensor([opening], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def document_losses(model: nn.Module, pool: Sequence[Batch]) -> DocumentLosses:
    """The losses of every document, in document order."""
    found = torch.zeros(3, sum(len(batch.documents) for batch in pool), dtype=torch.float64)
    opened = opening_cache(model, pool[0].opening, pool[0].input_ids.device) if pool else None
    for batch in pool:
        losses = token_losses(model, batch, opened).double()
        closing = (losses * batch.closing).sum(1)
        parts = torch.stack([losses.sum(1) - closing, closing, batch.scored.sum(1)])
        found[:, torch.tensor(batch.documents)] = parts.cpu()
    return DocumentLosses(*found.numpy())


def scored_tokens(pool: Sequence[Batch]) -> Float[np.ndarray, " doc"]:
    """How many tokens of every document are scored, in document order."""
    counts = {index: int(n) for batch in pool for index, n in zip(batch.documents, batch.scored.sum(1), strict=True)}
    return np.array([counts[index] for index in sorted(counts)], float)


@torch.no_grad()
def residual_batches(
    base: LanguageModel, pairs: Tokenized, batch_tokens: int, layers: Collection[int], watch: Watch = unwatched, label: str = ""
) -> Iterator[tuple[Batch, Int[Tensor, " token"], dict[int, Float[Tensor, "token d_model"]]]]:
    """Run texts through a model: (batch, document of each content token, residual stream after each of the layers). Streams are
    in float32. Raises ModelError where one holds NaN or Inf."""
    with residual_stream(base.model) as taken:
        for batch in watch(batches(pairs, batch_tokens, base.device), label):
            # for the taps alone: logits of the last position are enough
            base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
            keep = batch.scored.bool()
            check_finite({f"the output of layer {layer}": taken[layer][keep] for layer in layers})
            document = torch.tensor(batch.documents, device=keep.device).unsqueeze(1).expand_as(keep)[keep]
            yield batch, document, {layer: taken[layer][keep].float() for layer in layers}


def up_to(pairs: Iterable[tuple[list[int], int]], wanted: int) -> tuple[list[tuple[list[int], int]], int]:
    """Texts in their order until they hold so many content tokens, the first of each aside, and how many they hold."""
    total, kept = 0, []
    for pair in pairs:
        if total >= wanted:
            break
        kept.append(pair)
        total += len(pair[0]) - 1
    return kept, total


def collected(
    base: LanguageModel,
    pairs: Tokenized,
    batch_tokens: int,
    layers: Iterable[int],
    watch: Watch = unwatched,
    label: str = "",
    device: str | None = None,
) -> dict[int, Float[Tensor, "token d_model"]]:
    """The residual streams of `residual_batches` by layer, all tokens of all texts; on the model's device unless told."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for _, _, streams in residual_batches(base, pairs, batch_tokens, found, watch, label):
        for layer, x in streams.items():
            found[layer].append(x.to(device or x.device))
    return {layer: torch.cat(found.pop(layer)) for layer in [*found]}  # one at a time, since all of it may fill the memory


def gradient_moments(
    base: LanguageModel, texts: Texts, max_tokens: int, batch_tokens: int, *, watch: Watch = unwatched
) -> dict[int, Float[Tensor, "d_model d_model"]]:
    """Second moments of the loss gradient at each layer's output, in float64; texts are (prompt, scored solution)."""
    pool = pool_of(base, texts, max_tokens, batch_tokens, share=False)
    moments: dict[int, Tensor] = {}
    embedding = base.model.get_input_embeddings().weight
    embedding.requires_grad_(True)
    try:
        for batch in watch(pool, "03 gradients"):
            with residual_stream(base.model) as taken:
                loss = token_losses(base.model, batch).sum()
            for layer, grad in zip(taken, torch.autograd.grad(loss, [*taken.values()]), strict=True):
                g = grad[batch.attention_mask.bool()].double()
                check_finite({f"the loss gradient at layer {layer}": g})
                moments[layer] = moments.get(layer, 0) + g.T @ g
    finally:
        embedding.requires_grad_(False)
    return {layer: one.cpu() for layer, one in moments.items()}


def text_loss(base: LanguageModel, texts: Sequence[str], max_tokens: int, batch_tokens: int) -> float:
    """Mean loss on plain texts, nats a token."""
    return document_losses(base.model, pool_of(base, [("", text) for text in texts], max_tokens, batch_tokens)).mean("total")


def pool_of(
    base: LanguageModel, texts: Texts, max_tokens: int, batch_tokens: int, closings: Sequence[str] = (), share: bool = True
) -> list[Batch]:
    """Texts, each (context, scored text), in batches on the model's device. closings: the closing sentence that each scored text
    ends with, or an empty string. Where contexts open with the same 64 tokens or more, as with four shots, these are the batches' opening,
    computed once for all (`share`); `max_tokens` does not count them."""
    every = tokenize(base, texts, maxsize)
    held = common([ids[: max(0, context - 1)] for ids, context in every])
    held = held if share and held >= OPENING else 0
    opening = tuple(every[0][0][:held]) if held else ()
    longest = held + min(max_tokens, max(len(ids) for ids, _ in every) - held)
    if base.context is not None and held and longest > base.context:
        raise UserError(
            f"evaluation: {held} tokens of opening and a problem make {longest}, the model's context is {base.context}; "
            "lower evaluation.num_fewshot or data.max_tokens"
        )
    pairs, starts = [(ids[held:][:max_tokens], min(context - held, max_tokens)) for ids, context in every], {}
    for index, ((context, text), end) in enumerate(zip(texts, closings or [""] * len(texts), strict=True)):
        if end:
            starts[index] = _shared(base, context + text.removesuffix(end), every[index][0]) - held
    return [replace(batch, opening=opening) for batch in batches(pairs, batch_tokens, base.device, starts)]


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows open with."""
    return sum(1 for _ in takewhile(lambda column: len({*column}) == 1, zip(*rows)))
