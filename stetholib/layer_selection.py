"""Step 04. Which layers does the SAE point at (the stethoscope), and would chance have picked as well?

The score of a block is the mean specificity of its most specific features. Everything that says what a score is
worth (permutations, resamples, a random dictionary) is computed from the same per-document sums as the score.
Sets of blocks are judged by one cheap, quiet measure, the loss of gold solutions on the validation split after
injection; no test problem is read here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from random import Random

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from stetholib.errors import UserError
from stetholib.sae_features import DRAWN, DocumentSums, firing, moments, one_hot, specificity

LayerSet = tuple[int, ...]
CHUNK = 2**24  # entries (draw, corpus, feature) that are scored at once


@dataclass(frozen=True)
class ScoreRule:
    """How features become a layer's score: definition, share of the features that fire, floor on their number."""

    kind: str = "cohen_d"
    share: float = 0.02
    minimum: int = 10
    minimum_firing: float = 0.001

    def score(
        self, sums: DocumentSums, multiplicity: Float[Tensor, "draw corpus doc"], pool_subjects: bool
    ) -> Float[Tensor, " draw"]:
        """S: the mean of the largest specificities over the top share (at least `minimum`) of the features that fire."""
        draws, corpora, _ = multiplicity.shape
        at_once = max(1, CHUNK // (corpora * sums.total.shape[1]))
        if draws > at_once:
            return torch.cat([self.score(sums, part, pool_subjects) for part in multiplicity.split(at_once)])
        m = moments(sums, multiplicity, pool_subjects)
        eligible = firing(m, self.minimum_firing)
        ranked = torch.where(eligible, specificity(self.kind, sums, m), -torch.inf).sort(1, descending=True).values
        alive = eligible.sum(1)
        if int(alive.min()) < self.minimum:
            raise UserError(
                f"layer score: {self.minimum} features are needed but only {int(alive.min())} fire often enough; "
                "lower selection.score_minimum or features.minimum_firing"
            )
        counts = (alive * self.share).round().long().clamp(min=self.minimum)
        kept = torch.arange(ranked.shape[1]).unsqueeze(0) < counts.unsqueeze(1)
        return torch.where(kept, ranked, 0.0).sum(1) / counts


def shuffled_labels(corpus_of: Int[Tensor, " doc"], draws: int, seed: int) -> Int[Tensor, "draw doc"]:
    """Permutations of the documents' corpus labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([corpus_of[torch.randperm(len(corpus_of), generator=generator)] for _ in range(draws)])


def resampled(corpus_of: Int[Tensor, " doc"], corpora: int, draws: int, seed: int) -> Float[Tensor, "draw corpus doc"]:
    """Multiplicities of documents drawn with replacement within each corpus."""
    rng = np.random.default_rng(seed)
    out = torch.zeros(draws, corpora, len(corpus_of))
    for corpus in range(corpora):
        where = torch.nonzero(corpus_of == corpus)[:, 0]
        counts = rng.multinomial(len(where), np.full(len(where), 1 / len(where)), size=draws)
        out[:, corpus, where] = torch.from_numpy(counts).float()
    return out


@dataclass(frozen=True)
class Scores:
    """Layer scores with what they are worth; every array has one entry a layer.

    p_value: (1 + #) / (1 + B) over permutations of the documents' labels; p_max: against the largest score of any
    layer; selection_share: how often the layer is among the top m when documents are resampled. All three are NaN for
    AUROC, whose histograms are kept by corpus and not by document, so that nothing can be drawn again.
    """

    score: np.ndarray
    p_value: np.ndarray
    p_max: np.ndarray
    selection_share: np.ndarray
    permuted: np.ndarray
    resampled: np.ndarray


def score_layers(
    sums: Iterable[DocumentSums],
    corpus_of: Int[Tensor, " doc"],
    rule: ScoreRule,
    pool_subjects: bool,
    count: int,
    permutations: int,
    resamples: int,
    seed: int,
) -> Scores:
    """Score every layer, one at a time, and calibrate the scores; `count` is m, the number of layers to select.

    The matched contrast's token weights are those of the true labels in every permutation: a document carries its
    weighted sums with it. The null is then balanced in words only on average, which is stated, not hidden.
    """
    corpora = int(corpus_of.max()) + 1
    observed = one_hot(corpus_of, corpora)
    shuffled = one_hot(shuffled_labels(corpus_of, permutations, seed), corpora)
    redrawn = resampled(corpus_of, corpora, resamples, seed + 1)
    found = [[rule.score(s, labels, pool_subjects).numpy() for labels in (observed, shuffled, redrawn)] for s in sums]
    score, null, again = (np.stack(parts) for parts in zip(*found, strict=True))
    score = score[:, 0].astype(float)
    tops = [set(select(column, count)) for column in again.T]
    drawn = 1.0 if rule.kind in DRAWN else np.nan
    return Scores(
        score=score,
        p_value=drawn * (1 + (null >= score[:, None]).sum(1)) / (1 + permutations),
        p_max=drawn * (1 + (null.max(0)[None] >= score[:, None]).sum(1)) / (1 + permutations),
        selection_share=drawn * np.array([sum(layer in top for top in tops) / resamples for layer in range(len(score))]),
        permuted=null,
        resampled=again,
    )


def select(scores: Sequence[float], count: int) -> LayerSet:
    """The `count` layers with the largest scores, in order of depth; ties go to the earlier layer."""
    if count > len(scores):
        raise UserError(f"selection: {count} layers are wanted but the model has {len(scores)}; lower selection.layer_share")
    ranked = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    return tuple(sorted(ranked[:count]))


def layer_count(layers: int, share: float) -> int:
    """m = round(L * share), at least one; a third by default, fixed before any result."""
    return max(1, round(layers * share))


def sampled_sets(layers: int, count: int, wanted: int, seed: int) -> list[LayerSet]:
    """All sets of `count` layers where there are at most `wanted`, else that many different ones drawn at random."""
    if comb(layers, count) <= wanted:
        return list(combinations(range(layers), count))
    rng, found = Random(f"{seed}/sets"), {}
    while len(found) < wanted:
        found[tuple(sorted(rng.sample(range(layers), count)))] = None
    return list(found)


def percentile(value: float, others: Sequence[float]) -> float:
    """Share of the other sets whose loss change is worse (higher) than this one's, ties counted half; chance is 0.5."""
    others = np.asarray(others)
    return float(((others > value).sum() + 0.5 * (others == value).sum()) / len(others))


def greedy(loss_of: Callable[[LayerSet], float], layers: int, count: int) -> LayerSet:
    """Add, one at a time, the layer that lowers the loss most: the best set found with sight of the losses."""
    chosen: LayerSet = ()
    while len(chosen) < count:
        rest = [layer for layer in range(layers) if layer not in chosen]
        chosen = tuple(sorted((*chosen, min(rest, key=lambda layer: loss_of(tuple(sorted((*chosen, layer))))))))
    return chosen


def fixed_selectors(
    scores: Mapping[str, Sequence[float]], energies: Sequence[float], small_step: Sequence[float], count: int
) -> dict[str, tuple[str, LayerSet]]:
    """Every rule that picks `count` layers without trying them out, as selector -> (contrast, layers).

    scores: layer scores by contrast; energies: |tau_l|^2; small_step: loss change of each block at a small alpha.
    """
    depth = len(energies)
    first = (depth - count) // 2
    return {
        "stethoscope": ("corpus", select(scores["corpus"], count)),
        "stethoscope_matched": ("matched", select(scores["matched"], count)),
        "least_specific": ("corpus", select([-s for s in scores["corpus"]], count)),
        "largest_norm": ("-", select(energies, count)),
        "middle": ("-", tuple(range(first, first + count))),
        "last": ("-", tuple(range(depth - count, depth))),
        "small_step": ("-", select([-s for s in small_step], count)),
    }


def spearman(
    x: Sequence[float], y: Sequence[float], level: float = 0.05, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's rho with a bootstrap interval over layers: (rho, low, high)."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        pick = rng.integers(0, len(x), len(x))
        if len(set(x[pick])) > 1 and len(set(y[pick])) > 1:
            draws.append(_pearson(stats.rankdata(x[pick]), stats.rankdata(y[pick])))
    low, high = np.quantile(draws, [level / 2, 1 - level / 2]) if draws else (float("nan"),) * 2
    return _pearson(stats.rankdata(x), stats.rankdata(y)), float(low), float(high)


def partial_spearman(x: Sequence[float], y: Sequence[float], given: Sequence[Sequence[float]]) -> float:
    """Spearman's rho of x and y with other variables held fixed: correlation of rank residuals. NaN without variation."""
    ranks = [stats.rankdata(v).astype(float) for v in (x, y, *given)]
    design = np.column_stack([np.ones(len(ranks[0])), *ranks[2:]])
    residuals = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in ranks[:2]]
    if min(np.abs(r).max() for r in residuals) < 1e-9:
        return float("nan")
    return _pearson(*residuals)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else float("nan")


def measure(scores: Mapping[str, Scores], randoms: Mapping[str, Sequence[float]], count: int, sets: pd.DataFrame) -> pd.DataFrame:
    """The table of step 04: one row a layer and contrast.

    sets: the table of layer sets, from which the effects come. A positive effect is a loss that falls:
    effect_alone against the base model, effect_left_out against `full` (how much worse without the layer).
    """
    change = sets.set_index(["selector", "draw"])["loss_change"]
    whole = float(change["full", 0])
    rows = []
    for contrast, result in scores.items():
        chosen = select(result.score, count)
        for layer in range(len(result.score)):
            rows.append(
                dict(
                    layer=layer,
                    contrast=contrast,
                    score=result.score[layer],
                    score_random=randoms[contrast][layer],
                    p_value=result.p_value[layer],
                    p_max=result.p_max[layer],
                    selection_share=result.selection_share[layer],
                    selected=int(layer in chosen),
                    effect_alone=-float(change["only", layer]),
                    effect_left_out=float(change["without", layer]) - whole,
                )
            )
    return pd.DataFrame(rows)
