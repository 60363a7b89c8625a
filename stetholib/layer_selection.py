"""Step 04. Which layers does the SAE point at (the stethoscope), and would chance have picked as well?

The score of a block is the mean specificity of its most specific features. Everything that says what a score is
worth (permutations, resamples, a random dictionary) is computed from the same per-document sums as the score.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy import stats
from torch import Tensor

from stetholib.layer_sets import named_sets, select
from stetholib.models.sums import CONTRASTS, DRAWN, DocumentSums, one_hot, resampled, shuffled_labels
from stetholib.sae_features import ScoreRule
from stetholib.statistics import Values


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


def measure(scores: Mapping[str, Scores], randoms: Mapping[str, Values], count: int, sets: pd.DataFrame) -> pd.DataFrame:
    """The table of step 04: one row a layer and contrast.

    sets: the table of layer sets, from which the effects come. A positive effect is a loss that falls:
    effect_alone against the base model, effect_left_out against `full` (how much worse without the layer).
    """
    change = sets.set_index(["selector", "draw"])["loss_change"]
    parts = []
    for contrast, result in scores.items():
        layers = np.arange(len(result.score))
        columns: dict[str, Any] = dict(layer=layers, contrast=contrast, score=result.score, score_random=randoms[contrast])
        columns |= {name: getattr(result, name) for name in ("p_value", "p_max", "selection_share")}
        columns["selected"] = np.isin(layers, select(result.score, count)).astype(int)
        columns["effect_alone"] = -change["only"][layers].to_numpy()
        columns["effect_left_out"] = change["without"][layers].to_numpy() - change["full", 0]
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def plain_scores(
    sums: Iterable[DocumentSums], corpus_of: Int[Tensor, " doc"], rule: ScoreRule, pool_subjects: bool
) -> list[float]:
    """Layer scores alone, without permutations and resamples."""
    labels = one_hot(corpus_of, int(corpus_of.max()) + 1)
    return [float(rule.score(one, labels, pool_subjects)[0]) for one in sums]


def agreement(scores: Mapping[tuple[str, str], Values], count: int, default: str) -> pd.DataFrame:
    """Layers that each definition of specificity selects, and its rank correlation with the default's scores.

    scores: by (contrast, definition).
    """
    rows = []
    for (contrast, kind), score in scores.items():
        layers = " ".join(map(str, select(score, count)))
        rho = spearman(score, scores[contrast, default])[0]
        rows.append(dict(contrast=contrast, definition=kind, layers=layers, rho_with_default=rho))
    return pd.DataFrame(rows)


def stability(ours: Values, theirs: Values, count: int) -> dict[str, object]:
    """Scores by SAEs of another seed beside ours: rho, the layers they select, how many of ours are among them, by chance."""
    chosen = select(theirs, count)
    layers, common = " ".join(map(str, chosen)), len(set(chosen) & set(select(ours, count)))
    return dict(rho=spearman(ours, theirs)[0], layers=layers, common=common, chance=count * count / len(ours))


def relations(table: pd.DataFrame, layer_energy: np.ndarray, seed: int) -> pd.DataFrame:
    """How layer scores go with effects over layers: Spearman with an interval, and given depth and |tau_l|."""
    depth = np.arange(len(layer_energy))
    by_contrast = {c: table[table["contrast"] == c].sort_values("layer") for c in CONTRASTS}
    scores = {c: rows["score"].to_numpy() for c, rows in by_contrast.items()}
    rows = []
    for effect in ("effect_alone", "effect_left_out"):
        y = by_contrast["corpus"][effect]
        for name, x in {**scores, "|tau|": layer_energy, "depth": depth}.items():
            rho, low, high = spearman(x, y, seed=seed)
            given = [v for other, v in (("|tau|", layer_energy), ("depth", depth)) if other != name]
            about = dict(predictor=name, effect=effect, rho=rho, low=low, high=high)
            rows.append(about | dict(partial=partial_spearman(x, y, given)))
    return pd.DataFrame(rows)


SPOKEN = {"corpus": "all tokens", "matched": "matched words"}


def chosen_layers(table: pd.DataFrame) -> dict[str, list[int]]:
    """The layers that each contrast selects, from the table of step 04."""
    return {c: table[(table["contrast"] == c) & (table["selected"] == 1)]["layer"].tolist() for c in CONTRASTS}


def summary(table: pd.DataFrame, sets: pd.DataFrame, relations: pd.DataFrame, level: float = 0.05) -> str:
    """What step 04 saw, as Markdown; the tables of layers, of sets, and of scores against effects."""
    chosen, share = chosen_layers(table), named_sets(sets)["percentile"]
    named = {"corpus": "stethoscope", "matched": "stethoscope_matched"}
    common, count = len(set(chosen["corpus"]) & set(chosen["matched"])), len(chosen["corpus"])
    rivals = share.drop(["full", "greedy", "stethoscope"], errors="ignore").dropna()
    better = [name.replace("_", " ") for name in rivals.index if rivals[name] > share["stethoscope"]]
    equal = [name.replace("_", " ") for name in rivals.index.drop(named["matched"]) if rivals[name] == share["stethoscope"]]
    by_chance = [SPOKEN[c] for c, name in named.items() if share[name] < 1 - level]
    untold = f" On {' and on '.join(by_chance)} that is **not told from chance**, which needs {1 - level:.0%}."
    effect = relations[relations["effect"] == "effect_alone"].set_index("predictor")
    rho, silent = effect["rho"], [SPOKEN[c] for c in CONTRASTS if not effect["low"][c] > 0]
    nothing = f" On {' and on '.join(silent)} **the score does not tell a layer's worth**: its interval is not above 0."
    return f"""
- {_heard(table, level)}
- The layers selected are {chosen["corpus"]} on all tokens and {chosen["matched"]} on matched words: {common} of {count} in common.
- Injected there, the raw vector does better than **{share["stethoscope"]:.0%}** of random sets (all tokens) and **{share["stethoscope_matched"]:.0%}** (matched words); chance is 50 %.{untold if by_chance else ""}
- Rules that do better than the stethoscope: {", ".join(better) or "none"}{f"; as well as it: {', '.join(equal)}" if equal else ""}.
- Score against effect over layers: rho = {rho["corpus"]:+.2f} (all tokens), {rho["matched"]:+.2f} (matched words), {rho["|tau|"]:+.2f} (size of the change), {rho["depth"]:+.2f} (depth).{nothing if silent else ""}
""".strip()


def _heard(table: pd.DataFrame, level: float) -> str:
    """In how many layers mathematics is heard beyond chance; that it is heard nowhere is said, not counted."""
    if table["p_max"].isna().all():
        return "Whether a layer hears mathematics beyond chance **was not tested**: this definition of specificity cannot be permuted."
    layers, test = table["layer"].nunique(), "(permutation, maximum over layers)"
    corpus, matched = (int((table[table["contrast"] == c]["p_max"] < level).sum()) for c in CONTRASTS)
    if not corpus and not matched:
        return f"**No layer hears mathematics beyond chance**, neither on all tokens nor on matched words {test}."
    counted = f"{corpus or '**None**'} of {layers} layers hear mathematics beyond chance on all tokens, {matched or '**none**'} on matched words {test}."
    return f"{counted} Hearing is not the question." if corpus and matched else counted


def spearman(x: Values, y: Values, level: float = 0.05, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rho with a bootstrap interval over layers: (rho, low, high)."""
    one, other = np.asarray(x, float), np.asarray(y, float)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(one), (resamples, len(one)))
    ranks = zip(stats.rankdata(one[picks], axis=1), stats.rankdata(other[picks], axis=1), strict=True)  # not one by one: seconds
    draws = [_pearson(a, b) for a, b in ranks if np.ptp(a) and np.ptp(b)]
    low, high = np.quantile(draws, [level / 2, 1 - level / 2]) if draws else (float("nan"),) * 2
    return _pearson(stats.rankdata(one), stats.rankdata(other)), float(low), float(high)


def partial_spearman(x: Values, y: Values, given: Sequence[Values]) -> float:
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
