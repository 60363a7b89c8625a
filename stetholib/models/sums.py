"""What features add up to over documents: sums, and the moments of two corpora under any weighting of the documents."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CONTRASTS = ("corpus", "matched")
BINS = 48
VARIANCE_FLOOR = 1e-6


class Covariance:
    """Accumulates the covariance of activations [d_model, d_model], in float64, as batches pass by, on their device."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """width: d_model."""
        self.count, self.first = 0, torch.zeros(width, dtype=torch.float64, device=device)
        self.second = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "token d_model"]) -> None:
        """Add a batch."""
        wide = x.double()
        self.count, self.first, self.second = self.count + len(x), self.first + wide.sum(0), self.second + wide.T @ wide

    def value(self) -> Float[Tensor, "d_model d_model"]:
        """E[x x'] - E[x] E[x]', in main memory."""
        return (self.second / self.count - torch.outer(self.first, self.first) / self.count**2).cpu()


@dataclass(frozen=True)
class DocumentSums:
    """Per-document sums of one block's features under one contrast's token weights.

    weight [doc], total / squares / fires [doc, d_sae]: sums over the document's content tokens of w, w*a, w*a^2 and
    w*(a > 0). histogram [corpus, bin, d_sae]: weighted counts of activations in fixed bins, for AUROC."""

    weight: Float[Tensor, " doc"]
    total: Float[Tensor, "doc d_sae"]
    squares: Float[Tensor, "doc d_sae"]
    fires: Float[Tensor, "doc d_sae"]
    histogram: Float[Tensor, "corpus bin d_sae"]


def sums_bytes(d_sae: int, documents: int, corpora: int) -> int:
    """Bytes of one block's `DocumentSums` in float32 under both contrasts."""
    return 4 * d_sae * (3 * documents + corpora * BINS) * len(CONTRASTS)


class FeatureSums:
    """Accumulates `DocumentSums` of one block, for every contrast, as batches of activations pass by, on their device."""

    def __init__(self, d_sae: int, corpus_of: Int[Tensor, " doc"], ceiling: float, device: torch.device | str = "cpu") -> None:
        """corpus_of: index of each document's corpus; ceiling: the activation at which the last histogram bin begins."""
        docs, corpora = len(corpus_of), int(corpus_of.max()) + 1
        self.corpus_of, self.ceiling = corpus_of.to(device), ceiling
        shapes = [(docs,), *[(docs, d_sae)] * 3, (corpora, BINS, d_sae)]
        self._sums = {name: DocumentSums(*(torch.zeros(shape, device=device) for shape in shapes)) for name in CONTRASTS}

    def add(
        self, acts: Float[Tensor, "token d_sae"], document: Int[Tensor, " token"], weights: Mapping[str, Float[Tensor, " token"]]
    ) -> None:
        """Add the content tokens of a batch; `document` says which document each belongs to."""
        fires = (acts > 0).to(acts.dtype)
        bins = (acts * ((BINS - 2) / self.ceiling)).ceil().clamp(0, BINS - 1).long()
        cell = self.corpus_of[document].unsqueeze(1) * BINS + bins
        for name, sums in self._sums.items():
            w = weights[name].unsqueeze(1)
            for target, values in ((sums.total, acts * w), (sums.squares, acts * acts * w), (sums.fires, fires * w)):
                target.index_add_(0, document, values)
            sums.weight.index_add_(0, document, w[:, 0])
            flat = sums.histogram.view(-1, acts.shape[1])
            flat.scatter_add_(0, cell, w.expand(-1, acts.shape[1]).contiguous())

    def value(self, contrast: str) -> DocumentSums:
        """What one contrast has added up to, in main memory."""
        return DocumentSums(*(one.cpu() for one in vars(self._sums[contrast]).values()))


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
    fix the mix of words, which a second weighting would undo."""
    draws, corpora, docs = multiplicity.shape
    flat = multiplicity.reshape(-1, docs)
    weight = (flat @ sums.weight).view(draws, corpora, 1)
    parts = [(flat @ part).view(draws, corpora, -1) for part in (sums.total, sums.squares, sums.fires)]
    if pool_subjects:
        weight, *parts = (torch.stack([one[:, :-1].sum(1), one[:, -1]], 1) for one in (weight, *parts))
    means = [part / weight.clamp(min=1e-12) for part in parts]
    (m1, q1, f1), (m0, q0, f0) = [mean[:, :-1].mean(1) for mean in means], [mean[:, -1] for mean in means]
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
    """Probability that a mathematical token activates a feature more than a general one does, ties counted half. From fixed bins,
    corpora weighted equally among the subjects; 0.5 is chance."""
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


def firing_rates(sums: DocumentSums, corpus_of: Int[Tensor, " doc"]) -> Float[Tensor, " d_sae"]:
    """How often each feature fires, the two corpora weighing equally."""
    m = moments(sums, one_hot(corpus_of, int(corpus_of.max()) + 1), False)
    return ((m.fires_maths + m.fires_general) / 2)[0]


def shuffled_labels(corpus_of: Int[Tensor, " doc"], draws: int, seed: int) -> Int[Tensor, "draw doc"]:
    """Permutations of the documents' corpus labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([corpus_of[torch.randperm(len(corpus_of), generator=generator)] for _ in range(draws)])


def resampled(
    corpus_of: Int[Tensor, " doc"], corpora: int, draws: int, seed: int, article_of: Int[Tensor, " doc"] | None = None
) -> Float[Tensor, "draw corpus doc"]:
    """Multiplicities of documents drawn with replacement within each corpus; all documents of an article are drawn together,
    since paragraphs of one are alike (without `article_of` each is an article of its own)."""
    rng = np.random.default_rng(seed)
    out = torch.zeros(draws, corpora, len(corpus_of))
    for corpus in range(corpora):
        where = torch.nonzero(corpus_of == corpus)[:, 0]
        articles, of = (where if article_of is None else article_of[where]).unique(return_inverse=True)
        counts = rng.multinomial(len(articles), np.full(len(articles), 1 / len(articles)), size=draws)
        out[:, corpus, where] = torch.from_numpy(counts).float()[:, of]
    return out
