"""Step 02. Can we trust the instrument, and which features mean mathematics?

A sparse autoencoder is used here as a `Dictionary` of plain tensors with JumpReLU encoding, as Gemma Scope publishes
it and as SAELens' other architectures are saved for inference. Statistics are sums over documents, kept for every
block, feature and document; specificity, layer scores, permutations and resamples are all computed from those sums,
so the model reads each text once and nothing is stored per token.

Not covered: training or loading SAEs (`saes`), and scoring layers (`layer_selection`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stetholib.errors import UserError

CONTRASTS = ("corpus", "matched")
GENERAL = "general"
VARIANCE_FLOOR = 1e-6
BINS = 48
CELLS = 2**26
CLEARLY = 0.8  # neighbouring blocks are alike; a shifted SAE explains its true one far better than this
L0_RANGE = 3.0  # an SAE on its own site keeps its L0 within this factor on other text


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


def pieces(x: Float[Tensor, "token d_model"], d_sae: int) -> tuple[Float[Tensor, "token d_model"], ...]:
    """Activations in parts whose feature activations take about a quarter of a gibibyte."""
    return x.split(max(1, CELLS // d_sae))


def random_dictionary(x: Float[Tensor, "token d_model"], d_sae: int, l0: float, seed: int) -> Dictionary:
    """A dictionary of random unit directions with the same shape and the same L0 on `x`: the instrument's zero.

    Encoder and decoder are tied, inputs are centred on the mean of `x`, one threshold sets the L0, and the decoder
    carries the one gain that reconstructs `x` best, so that its FVU is the best such a dictionary can reach.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[1], generator=generator), dim=1).to(x.device)
    mean, some = x.mean(0), pieces(x, d_sae)[0]
    pre = (some - mean) @ directions.T
    rank = max(1, min(pre.numel() - 1, round(l0 * len(some))))
    cut = pre.flatten().topk(rank + 1).values[-1].clamp(min=0)
    draft = Dictionary(directions.T, -mean @ directions.T, directions, mean, cut.expand(d_sae).contiguous())
    guesses = [(draft.encode(part) @ directions, part - mean) for part in pieces(x, d_sae)]
    size = sum(guess.square().sum() for guess, _ in guesses)
    gain = sum((guess * part).sum() for guess, part in guesses) / size.clamp(min=1e-12)
    return Dictionary(draft.W_enc, draft.b_enc, directions * gain, mean, draft.threshold)


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


def check_fires(layer: int, found: SelfTest) -> None:
    """Refuse an SAE that hears nothing."""
    if not found.largest > 0 and found.largest == found.largest:
        raise UserError(
            f"SAE of layer {layer}: no feature fires on these texts; it is of another model or site, mend sae.release"
        )


def check_site(layer: int, own: float, neighbours: Mapping[int, float], l0: float, expected_l0: float | None) -> None:
    """Refuse an SAE that cannot be this block's: one that explains a neighbour clearly better, or whose L0 is far from its own.

    own, neighbours: FVU of the same SAE on the same tokens at this block, and at those before and after; expected_l0:
    what its registry says, if anything.
    """
    better = {at: fvu for at, fvu in neighbours.items() if fvu < CLEARLY * own}
    if better:
        at = min(better, key=better.__getitem__)
        raise UserError(
            f"SAE of layer {layer}: it explains layer {at} better than its own (unexplained {better[at]:.2f} against "
            f"{own:.2f}); the set is shifted or of another model, mend sae.release or sae.sae_id"
        )
    if expected_l0 and not expected_l0 / L0_RANGE <= l0 <= expected_l0 * L0_RANGE:
        raise UserError(
            f"SAE of layer {layer}: {l0:.1f} features fire a token, its registry says {expected_l0:g}; "
            "another release, site or model, mend sae.release or sae.sae_id"
        )


class Covariance:
    """Accumulates the covariance of activations [d_model, d_model], in float64, as batches pass by."""

    def __init__(self, width: int) -> None:
        """width: d_model."""
        self.count, self.first = 0, torch.zeros(width, dtype=torch.float64)
        self.second = torch.zeros(width, width, dtype=torch.float64)

    def add(self, x: Float[Tensor, "token d_model"]) -> None:
        """Add a batch."""
        wide = x.double().cpu()
        self.count, self.first, self.second = self.count + len(x), self.first + wide.sum(0), self.second + wide.T @ wide

    def value(self) -> Float[Tensor, "d_model d_model"]:
        """E[x x'] - E[x] E[x]'."""
        return self.second / self.count - torch.outer(self.first, self.first) / self.count**2


def matched_weights(
    tokens: Sequence[Int[Tensor, " token"]], is_maths: Sequence[bool], minimum: int
) -> list[Float[Tensor, " token"]]:
    """A weight for every content token, so that both corpora hold the same words in the same amounts.

    tokens: ids of each document's content tokens. A surface form s that occurs at least `minimum` times in each of
    the two corpora gets min(n_M(s), n_G(s)) / n_C(s) in corpus C; every other token gets 0.
    """
    size = 1 + max(int(ids.max()) for ids in tokens if len(ids))
    counts = {side: torch.zeros(size, dtype=torch.float64) for side in (True, False)}
    for ids, maths in zip(tokens, is_maths, strict=True):
        counts[bool(maths)] += torch.bincount(ids, minlength=size)
    shared = (counts[True] >= minimum) & (counts[False] >= minimum)
    least = torch.minimum(counts[True], counts[False])
    weight = {side: torch.where(shared, least / counts[side].clamp(min=1), 0.0).float() for side in counts}
    return [weight[bool(maths)][ids] for ids, maths in zip(tokens, is_maths, strict=True)]


@dataclass(frozen=True)
class DocumentSums:
    """Per-document sums of one block's features under one contrast's token weights.

    weight [doc], total / squares / fires [doc, d_sae]: sums over the document's content tokens of w, w*a, w*a^2 and
    w*(a > 0). histogram [corpus, bin, d_sae]: weighted counts of activations in fixed bins, for AUROC.
    """

    weight: Float[Tensor, " doc"]
    total: Float[Tensor, "doc d_sae"]
    squares: Float[Tensor, "doc d_sae"]
    fires: Float[Tensor, "doc d_sae"]
    histogram: Float[Tensor, "corpus bin d_sae"]


def sums_bytes(d_sae: int, documents: int, corpora: int) -> int:
    """Bytes of one block's `DocumentSums` in float32 under both contrasts."""
    return 4 * d_sae * (3 * documents + corpora * BINS) * len(CONTRASTS)


class FeatureSums:
    """Accumulates `DocumentSums` of one block, for every contrast, as batches of activations pass by."""

    def __init__(self, d_sae: int, corpus_of: Int[Tensor, " doc"], ceiling: float, contrasts: Sequence[str] = CONTRASTS) -> None:
        """corpus_of: index of each document's corpus; ceiling: the activation at which the last histogram bin begins."""
        docs, corpora = len(corpus_of), int(corpus_of.max()) + 1
        self.corpus_of, self.ceiling = corpus_of, ceiling
        self.sums = {
            name: DocumentSums(
                torch.zeros(docs),
                torch.zeros(docs, d_sae),
                torch.zeros(docs, d_sae),
                torch.zeros(docs, d_sae),
                torch.zeros(corpora, BINS, d_sae),
            )
            for name in contrasts
        }

    def add(
        self,
        acts: Float[Tensor, "token d_sae"],
        document: Int[Tensor, " token"],
        weights: Mapping[str, Float[Tensor, " token"]],
    ) -> None:
        """Add the content tokens of a batch; `document` says which document each belongs to."""
        fires = (acts > 0).to(acts.dtype)
        bins = (acts * ((BINS - 2) / self.ceiling)).ceil().clamp(0, BINS - 1).long()
        cell = (self.corpus_of.to(acts.device)[document].unsqueeze(1) * BINS + bins).cpu()
        for name, sums in self.sums.items():
            w = weights[name].to(acts.device).unsqueeze(1)
            for target, values in ((sums.total, acts * w), (sums.squares, acts * acts * w), (sums.fires, fires * w)):
                target.index_add_(0, document.cpu(), values.cpu())
            sums.weight.index_add_(0, document.cpu(), w[:, 0].cpu())
            flat = sums.histogram.view(-1, acts.shape[1])
            flat.scatter_add_(0, cell, w.cpu().expand(-1, acts.shape[1]).contiguous())


@dataclass(frozen=True)
class Moments:
    """Weighted mean, variance and firing rate of each feature, on mathematics and on general text: [draw, d_sae]."""

    mean_maths: Float[Tensor, "draw d_sae"]
    var_maths: Float[Tensor, "draw d_sae"]
    fires_maths: Float[Tensor, "draw d_sae"]
    mean_general: Float[Tensor, "draw d_sae"]
    var_general: Float[Tensor, "draw d_sae"]
    fires_general: Float[Tensor, "draw d_sae"]


def moments(sums: DocumentSums, multiplicity: Float[Tensor, "draw corpus doc"], pool_subjects: bool) -> Moments:
    """Moments of the two corpora under any weighting of the documents.

    multiplicity: how often each document counts in each corpus; the last corpus is the general one. One-hot labels
    give the observed statistic, shuffled ones a permutation, multinomial counts a resample. The subjects weigh
    equally, whatever their token counts, unless `pool_subjects`: in the matched contrast the token weights already
    fix the mix of words, which a second weighting would undo.
    """
    draws, corpora, docs = multiplicity.shape
    flat = multiplicity.reshape(-1, docs)
    weight = (flat @ sums.weight).view(draws, corpora, 1)
    parts = [(flat @ part).view(draws, corpora, -1) for part in (sums.total, sums.squares, sums.fires)]
    if pool_subjects:
        groups = [(weight[:, :-1].sum(1), [p[:, :-1].sum(1) for p in parts]), (weight[:, -1], [p[:, -1] for p in parts])]
        means = [[p / w.clamp(min=1e-12) for p in ps] for w, ps in groups]
    else:
        each = [p / weight.clamp(min=1e-12) for p in parts]
        means = [[p[:, :-1].mean(1) for p in each], [p[:, -1] for p in each]]
    (m1, q1, f1), (m0, q0, f0) = means
    return Moments(m1, (q1 - m1 * m1).clamp(min=0), f1, m0, (q0 - m0 * m0).clamp(min=0), f0)


def one_hot(corpus_of: Int[Tensor, "*draw doc"], corpora: int) -> Float[Tensor, "draw corpus doc"]:
    """Multiplicities of plain corpus labels, observed or shuffled."""
    labels = corpus_of if corpus_of.ndim == 2 else corpus_of.unsqueeze(0)
    return torch.nn.functional.one_hot(labels.long(), corpora).transpose(1, 2).float()


def cohen_d(m: Moments) -> Float[Tensor, "draw d_sae"]:
    """d = (mean_M - mean_G) / sqrt((var_M + var_G) / 2 + 1e-6): the specificity of DESIGN 3."""
    return (m.mean_maths - m.mean_general) / ((m.var_maths + m.var_general) / 2 + VARIANCE_FLOOR).sqrt()


def firing_log_ratio(m: Moments) -> Float[Tensor, "draw d_sae"]:
    """log of the ratio of firing rates, mathematics over general, each with one part in 10,000 added."""
    return ((m.fires_maths + 1e-4) / (m.fires_general + 1e-4)).log()


DRAWN = {"cohen_d": cohen_d, "firing_log_ratio": firing_log_ratio}  # definitions that follow the draws of documents


def auroc(histogram: Float[Tensor, "corpus bin d_sae"]) -> Float[Tensor, " d_sae"]:
    """Probability that a mathematical token activates a feature more than a general one does, ties counted half.

    From fixed bins, corpora weighted equally among the subjects; 0.5 is chance.
    """
    share = histogram / histogram.sum(1, keepdim=True).clamp(min=1e-12)
    maths, general = share[:-1].mean(0), share[-1]
    below = general.cumsum(0) - general
    return (maths * (below + general / 2)).sum(0)


def specificity(kind: str, sums: DocumentSums, m: Moments) -> Float[Tensor, "draw d_sae"]:
    """The chosen definition; `auroc` comes from the histograms and is the same in every draw."""
    return DRAWN[kind](m) if kind in DRAWN else auroc(sums.histogram).unsqueeze(0)


def firing(m: Moments, minimum: float) -> Bool[Tensor, "draw d_sae"]:
    """Which features fire on at least `minimum` of the tokens, the two corpora weighing equally."""
    return (m.fires_maths + m.fires_general) / 2 >= minimum


def most_specific(values: Float[Tensor, " d_sae"], eligible: Bool[Tensor, " d_sae"], count: int) -> Int[Tensor, " count"]:
    """Indices of the `count` most specific features that fire, most specific first; ties by index."""
    if int(eligible.sum()) < count:
        raise UserError(
            f"features: {count} are needed but only {int(eligible.sum())} fire often enough; lower features.minimum_firing"
        )
    ranked = torch.where(eligible, values, -torch.inf)
    return torch.sort(ranked, descending=True, stable=True).indices[:count]


def measure(tests: Mapping[int, SelfTest], randoms: Mapping[int, SelfTest], tops: pd.DataFrame, d_sae: int) -> pd.DataFrame:
    """The table of step 02: one row a layer and contrast; `tops` brings layer, contrast, top_feature, top_specificity."""
    table = tops.copy()
    table["d_sae"] = d_sae
    for name in ("l0", "fvu", "alive"):
        table[name] = [getattr(tests[layer], name) for layer in table["layer"]]
    table["fvu_random"] = [randoms[layer].fvu for layer in table["layer"]]
    table["l0_random"] = [randoms[layer].l0 for layer in table["layer"]]
    return table
