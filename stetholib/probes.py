"""What a model says of its layers without any SAE: what it loses when one is skipped, how gradients meet a task vector, and what
documents leave in the residual stream."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from stetholib.editing import TaskVector
from stetholib.models.loading import LanguageModel, check_finite
from stetholib.models.streams import (
    Batch,
    DocumentLosses,
    Texts,
    Watch,
    document_losses,
    pool_of,
    residual_batches,
    token_losses,
    tokenize,
    unwatched,
)
from stetholib.models.weights import Key, decoder_blocks, edit_weights


@contextmanager
def skipped(model: nn.Module, layer: int) -> Iterator[nn.Module]:
    """The model with one block skipped: its input is handed on as its output."""

    def hand_on(block: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hook = decoder_blocks(model)[layer].register_forward_hook(hand_on, with_kwargs=True)
    try:
        yield model
    finally:
        hook.remove()


def losses_skipping(base: LanguageModel, layer: int, pool: Sequence[Batch]) -> DocumentLosses:
    """The losses of each document without one block."""
    with skipped(base.model, layer) as changed:
        return document_losses(changed, pool)


@dataclass(frozen=True)
class Couplings:
    """How the gradient of each problem's loss at theta_0 meets a task vector, by layer: <g, tau_l>, |g_l|^2 and <g^2, tau_l^2>."""

    along: Float[np.ndarray, "problem layer"]
    squared: Float[np.ndarray, "problem layer"]
    weighted: Float[np.ndarray, "problem layer"]


def couplings(
    base: LanguageModel, vector: TaskVector, texts: Texts, closings: Sequence[str], max_tokens: int, *, watch: Watch = unwatched
) -> Couplings:
    """Of the summed loss of each gold solution before its closing sentence; one problem a backward pass. A matrix's gradient is
    dropped as soon as it has been met, so that memory is that of the model, of the vector in its dtype, and of one gradient."""
    pool, weights = pool_of(base, texts, max_tokens, 1, closings, share=False), edit_weights(base.model)
    held = {where: vector.deltas[where].to(weight.dtype) for where, weight in weights.items()}
    found = np.zeros((3, len(texts), 1 + max(layer for layer, _ in weights)))

    def meet(where: Key, weight: Tensor) -> None:
        g, tau = weight.grad.float(), held[where].to(weight.device).float()  # type: ignore[union-attr]  # it was just written
        weight.grad, along = None, g * tau
        sums = torch.stack([one.sum(dtype=torch.float64) for one in (along, g.square(), along.square())])
        check_finite({f"the loss gradient at layer {where[0]}": sums})
        found[:, row, where[0]] += sums.cpu().numpy()

    with ExitStack() as undone:
        for where, weight in weights.items():
            undone.callback(weight.requires_grad_, False)
            hook = weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(meet, where))
            undone.callback(hook.remove)
        for batch in watch(pool, "04 gradients"):
            (row,) = batch.documents
            (token_losses(base.model, batch) * (batch.scored - batch.closing)).sum().backward()
    return Couplings(*found)


def document_means(
    base: LanguageModel,
    texts: Sequence[str],
    max_tokens: int,
    batch_tokens: int,
    limits: Mapping[int, float],
    *,
    watch: Watch = unwatched,
) -> dict[int, Float[np.ndarray, "doc d_model"]]:
    """The mean activation of each document after each layer, in float64, without tokens whose norm is above the layer's limit."""
    pairs = [(ids, 1) for ids, _ in tokenize(base, [("", text) for text in texts], max_tokens)]
    total: dict[int, Tensor] = {}
    count = {layer: torch.zeros(len(texts), 1, dtype=torch.float64) for layer in limits}
    for _, document, streams in residual_batches(base, pairs, batch_tokens, limits, watch, "04 mean activations"):
        for layer, x in streams.items():
            kept = x.norm(dim=1) <= limits[layer]
            at, wide = document[kept].cpu(), x[kept].double().cpu()
            total.setdefault(layer, torch.zeros(len(texts), x.shape[1], dtype=torch.float64)).index_add_(0, at, wide)
            count[layer].index_add_(0, at, torch.ones(len(at), 1, dtype=torch.float64))
    return {layer: (total[layer] / count[layer].clamp(min=1)).numpy() for layer in limits}
