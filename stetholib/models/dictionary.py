"""A sparse autoencoder as a dictionary of plain tensors, its random double, and what both explain of activations.

JumpReLU encoding, as Gemma Scope publishes it and as SAELens' other architectures are saved for inference."""

from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stetholib.errors import UserError

CELLS = 2**26
OUTLIER, MASSIVE = 10, 100


@dataclass(frozen=True)
class Dictionary:
    """The weights of one SAE. `a = relu(pre) * (pre > threshold)`, `pre = x @ W_enc + b_enc`; decode `a @ W_dec + b_dec`."""

    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " d_sae"]

    def encode(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_sae"]:
        """Feature activations."""
        pre = x @ self.W_enc + self.b_enc
        return torch.relu(pre) * (pre > self.threshold)

    def decode(self, acts: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_model"]:
        """The reconstruction."""
        return acts @ self.W_dec + self.b_dec

    @property
    def d_sae(self) -> int:
        """How many features."""
        return self.W_dec.shape[0]


def pieces(x: Float[Tensor, "token d_model"], d_sae: int) -> tuple[Float[Tensor, "_ d_model"], ...]:
    """Activations in parts whose feature activations take about a quarter of a gibibyte."""
    return x.split(max(1, CELLS // d_sae))


def random_dictionary(x: Float[Tensor, "token d_model"], d_sae: int, l0: float, seed: int) -> Dictionary:
    """A dictionary of random unit directions with the same shape and the same L0 on `x`: the instrument's zero."""
    generator = torch.Generator().manual_seed(seed)
    return tied_dictionary(x, torch.randn(d_sae, x.shape[1], generator=generator), l0)


def tied_dictionary(x: Float[Tensor, "token d_model"], directions: Float[Tensor, "d_sae d_model"], l0: float) -> Dictionary:
    """A dictionary of given directions: encoder and decoder are tied, inputs are centred on the mean of `x`, one threshold sets
    the L0, and the decoder carries the one gain that reconstructs `x` best: no gain gives a lower FVU."""
    d_sae, directions = len(directions), torch.nn.functional.normalize(directions, dim=1).to(x.device)
    mean, largest = x.mean(0), x.new_empty(0)
    rank = max(1, min(len(x) * d_sae - 1, round(l0 * len(x))))
    for part in pieces(x, d_sae):  # of all tokens: texts come by length, and the first are the shortest
        seen = torch.cat([largest, ((part - mean) @ directions.T).flatten()])
        largest = seen.topk(min(rank + 1, len(seen))).values
    cut = largest[-1].clamp(min=0)
    draft = Dictionary(directions.T, -mean @ directions.T, directions, mean, cut.expand(d_sae).contiguous())
    guesses = [(draft.encode(part) @ directions, part - mean) for part in pieces(x, d_sae)]
    size = sum((guess.square().sum() for guess, _ in guesses), torch.tensor(0))
    gain = sum((guess * part).sum() for guess, part in guesses) / size.clamp(min=1e-12)
    return Dictionary(draft.W_enc, draft.b_enc, directions * gain, mean, draft.threshold)


def ordinary(x: Float[Tensor, "token d_model"]) -> Bool[Tensor, " token"]:
    """Which tokens have at most ten times the median norm. Attention drains into some others, whose few dimensions outweigh all
    else (Sun et al., 2024, arXiv 2402.17762): one in 40,000 can hold half of a layer's variance."""
    norms = x.norm(dim=1)
    return norms <= OUTLIER * norms.median()


def massive_dimensions(x: Float[Tensor, "token d_model"]) -> list[int]:
    """The dimensions that somewhere reach a hundred times the median magnitude of an activation, largest first."""
    largest = x.abs().amax(0)
    found = torch.nonzero(largest > MASSIVE * x.abs().flatten()[:: 1 + x.numel() // CELLS].median())[:, 0]
    return found[largest[found].argsort(descending=True)].tolist()


@dataclass(frozen=True)
class SelfTest:
    """What an SAE does on the model's own activations: fraction of variance unexplained, L0, share of features that fire,
    and the largest feature activation."""

    fvu: float
    l0: float
    alive: float
    largest: float


def self_test(dictionary: Dictionary, x: Float[Tensor, "token d_model"]) -> SelfTest:
    """FVU is 0 for a perfect reconstruction and 1 for always answering the mean; L0 is active features a token."""
    residual, active, largest = 0.0, 0, -inf
    alive = torch.zeros(dictionary.d_sae, dtype=torch.bool, device=x.device)
    for part in pieces(x, dictionary.d_sae):
        acts = dictionary.encode(part)
        residual += float((part - dictionary.decode(acts)).double().square().sum())
        active += int((acts > 0).sum())
        alive |= (acts > 0).any(0)
        value = float(acts.max())
        largest = max(largest, value) if value == value else value  # NaN is handed on
    total = float((x - x.mean(0)).double().square().sum())
    return SelfTest(residual / total, active / len(x), float(alive.double().mean()), largest)


def check_width(layer: int, dictionary: Dictionary, x: Float[Tensor, "token d_model"]) -> None:
    """Refuse an SAE of a residual stream of another width."""
    if (width := dictionary.W_dec.shape[1]) != x.shape[1]:
        raise UserError(
            f"SAE of layer {layer}: it reads a stream of width {width}, the model's is {x.shape[1]}; it is of another model, mend sae.release"
        )
