"""Rules that score layers without trying them out: what the paper's score is held against, on the same budget.

Each returns one number a layer; the m layers with the largest are its set. None of them sees what an injection does to a loss.
Layers that a rule cannot score are NaN, and are not selected.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from stetholib.editing import TaskVector
from stetholib.models import subspaces
from stetholib.models.streams import Watch, unwatched
from stetholib.models.weights import Weights
from stetholib.statistics import Values


def rise(scores: Values) -> Float[np.ndarray, " layer"]:
    """What a layer adds to the score of the one before, S_l - S_(l-1). The residual stream adds up, so that a score of the stream
    stays high after the layers that wrote it. The first layer has none before it and counts as one that adds nothing; a layer
    after one without a score has none. Ours, from trials on networks whose layers were known."""
    score = np.asarray(scores, float)
    return np.diff(score, prepend=score[:1])


def excess(scores: Values, randoms: Float[np.ndarray, "dictionary layer"]) -> Float[np.ndarray, " layer"]:
    """What a score is above the mean of the scores of random dictionaries, which hear the geometry of the stream alone."""
    return np.asarray(scores, float) - randoms.mean(0)


def mean_difference(
    means: Float[np.ndarray, "doc d_model"], maths: Bool[np.ndarray, " doc"], half: Bool[np.ndarray, " doc"]
) -> float:
    """A layer without any SAE: Cohen's d of documents' mean activations along the difference of the two corpora's means (Marks and
    Tegmark, 2024, arXiv 2310.06824). The direction is found on one half of the documents and judged on the other, both ways."""
    found = []
    for seen in (half, ~half):
        direction = means[seen & maths].mean(0) - means[seen & ~maths].mean(0)
        one, other = means[~seen & maths] @ direction, means[~seen & ~maths] @ direction
        found.append((one.mean() - other.mean()) / np.sqrt((one.var() + other.var()) / 2))
    return float(np.mean(found))


def zero_ablation(base: float, skipped: Values) -> Float[np.ndarray, " layer"]:
    """How much the unedited model's loss on solutions rises when a block is skipped, its input handed on as its output. After the
    layer-wise ablation of arXiv 2506.22638, by which the layers that mathematics needs are fixed in pre-training."""
    return np.asarray(skipped, float) - base


def taylor(along: Float[np.ndarray, "problem layer"]) -> Float[np.ndarray, " layer"]:
    """How far the loss on solutions would fall to first order, -<g, tau_l> (Molchanov et al., 2019, arXiv 1906.10771).

    along: inner product of each problem's gradient at theta_0 with the vector in a layer."""
    return -along.mean(0)


def fisher(weighted: Float[np.ndarray, "problem layer"]) -> Float[np.ndarray, " layer"]:
    """Energy of the vector weighted by the diagonal of the empirical Fisher information (Matena and Raffel, 2022,
    arXiv 2111.09832). weighted: <g^2, tau_l^2> of each problem's gradient."""
    return weighted.mean(0)


def off_principal(
    outside: Values, along: Float[np.ndarray, "problem layer"], squared: Float[np.ndarray, "problem layer"], energy: Values
) -> Float[np.ndarray, " layer"]:
    """Energy outside the weights' principal subspaces times the coupling to the gradient, the cosine of the two in root mean
    square. After the off-principal directions of arXiv 2511.08567 and the ranking of MAST (arXiv 2606.19222).

    outside: that energy; along, squared: <g, tau_l> and |g_l|^2 of each problem's gradient; energy: |tau_l|^2."""
    size = squared.mean(0) * np.asarray(energy, float)
    coupling = np.sqrt(np.divide((along**2).mean(0), size, out=np.zeros(len(size)), where=size > 0))
    return np.asarray(outside, float) * coupling


def signal_to_noise(values: Float[np.ndarray, " rank"], shape: tuple[int, ...]) -> float:
    """Spectrum (Hartford et al., 2024, arXiv 2406.06623) on a matrix of the vector, by its singular values: those above the edge
    of noise over those below, divided by the largest. The edge is Marchenko and Pastur's, of the spread between quartiles; 0
    where the matrix is zero, NaN where most of it is numerical dust, as a LoRA's is, and where nothing is noise the smallest
    value stands for it."""
    dust = values.max() * max(shape) * np.finfo(np.float32).eps
    if values.max() > 0 and (values <= dust).mean() > 0.5:
        return float("nan")
    high, low = np.quantile(values, [0.75, 0.25])
    edge = (high - low) / 1.349 * (1 + np.sqrt(min(shape) / max(shape)))
    signal, noise = values[values > edge].sum(), values[values <= edge].sum() or values.min()
    return float(signal / noise / values.max()) if noise else 0.0


def geometry(before: Weights, vector: TaskVector, *, watch: Watch = unwatched) -> pd.DataFrame:
    """What a vector's matrices say of a layer beside the weights that they change: columns layer, outside (energy outside the
    weights' principal subspaces, summed) and signal_to_noise (the mean over matrices). before: theta_0's matrices."""
    rows = []
    for layer, matrix in watch(list(vector.deltas), "04 spectra of the change"):
        delta = vector.deltas[layer, matrix]
        values = subspaces.singular_energies(delta).sqrt().numpy()
        outside = subspaces.outside_principal(delta, before[layer, matrix])
        rows.append((layer, outside, signal_to_noise(values, tuple(delta.shape))))
    table = pd.DataFrame(rows, columns=["layer", "outside", "signal_to_noise"])
    return table.groupby("layer", as_index=False).agg({"outside": "sum", "signal_to_noise": "mean"})


def place(layers: int) -> dict[str, Float[np.ndarray, " layer"]]:
    """The rules that know a layer's depth alone: first, middle and last."""
    depth = np.arange(layers, dtype=float)
    return {"first": -depth, "middle": -np.abs(depth - (layers - 1) / 2), "last": depth}


def auroc(scores: Values, known: Sequence[int]) -> float:
    """Probability that a known layer scores above another, equals counted half; 0.5 is chance. Layers without a score count as
    the lowest."""
    score = np.nan_to_num(np.asarray(scores, float), nan=-np.inf)
    inside = np.isin(np.arange(len(score)), known)
    ahead = score[inside][:, None] - score[~inside][None]
    return float((np.sign(np.nan_to_num(ahead)) / 2 + 0.5).mean())
