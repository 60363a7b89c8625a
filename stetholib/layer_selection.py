"""Step 04. Which layers does the SAE point at (the stethoscope), and would chance have done as well?

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

from stetholib.layer_sets import RELIABLE, RESOLVED, named_sets, reliability_of_sets, select, tells_apart
from stetholib.models.sums import CONTRASTS, DRAWN, DocumentSums, one_hot, resampled, shuffled_labels
from stetholib.sae_features import ScoreRule
from stetholib.statistics import Values

LEVEL = 0.05  # of what the summary and the titles call beyond chance


@dataclass(frozen=True)
class Scores:
    """Layer scores with what they are worth; every array has one entry a layer.

    p_value: (1 + #) / (1 + B) over permutations of the documents' labels; p_max: against the largest score of any
    layer; selection_share: how often the layer is among the top m when articles of documents are resampled. All three are NaN for
    AUROC, whose histograms are kept by corpus and not by document, so that nothing can be drawn again.
    """

    score: np.ndarray
    p_value: np.ndarray
    p_max: np.ndarray
    selection_share: np.ndarray
    permuted: np.ndarray
    resampled: np.ndarray


def score_layers(
    sums: Iterable[DocumentSums | None],
    corpus_of: Int[Tensor, " doc"],
    rule: ScoreRule,
    pool_subjects: bool,
    count: int,
    permutations: int,
    resamples: int,
    seed: int,
    article_of: Int[Tensor, " doc"] | None = None,
) -> Scores:
    """Score every layer, one at a time, and calibrate the scores; `count` is m, the number of layers to select.

    The matched contrast's token weights are those of the true labels in every permutation: a document carries its
    weighted sums with it. The null is then balanced in words only on average, which is stated, not hidden.
    """
    return calibrated(drawn_scores(sums, corpus_of, rule, pool_subjects, permutations, resamples, seed, article_of), rule, count)


def drawn_scores(
    sums: Iterable[DocumentSums | None],
    corpus_of: Int[Tensor, " doc"],
    rule: ScoreRule,
    pool_subjects: bool,
    permutations: int,
    resamples: int,
    seed: int,
    article_of: Int[Tensor, " doc"] | None = None,
) -> list[list[np.ndarray]]:
    """The scores of each layer as its documents are labelled [1], under permuted labels [permutation] and on documents drawn
    again, by article [resample]; the same draws for every layer. NaN where a layer is refused (None)."""
    corpora = int(corpus_of.max()) + 1
    observed = one_hot(corpus_of, corpora)
    shuffled = one_hot(shuffled_labels(corpus_of, permutations, seed), corpora)
    redrawn = resampled(corpus_of, corpora, resamples, seed + 1, article_of)
    drawn = (observed, shuffled, redrawn)
    return [
        [rule.score(s, labels, pool_subjects).numpy() if s else np.full(len(labels), np.nan) for labels in drawn] for s in sums
    ]


def calibrated(found: Sequence[Sequence[np.ndarray]], rule: ScoreRule, count: int) -> Scores:
    """Layer scores with what they are worth, from what `drawn_scores` gives of all layers."""
    score, null, again = (np.stack(parts) for parts in zip(*found, strict=True))
    score = score[:, 0].astype(float)
    tops = [set(select(column, count)) for column in again.T]
    drawn = np.where(np.isnan(score), np.nan, 1.0 if rule.kind in DRAWN else np.nan)
    ahead = ((than >= score[:, None]).sum(1) for than in (null, np.nanmax(null, 0)[None]))
    p_value, p_max = (drawn * (1 + reached) / (1 + null.shape[1]) for reached in ahead)
    share = drawn * np.array([sum(layer in top for top in tops) / len(tops) for layer in range(len(score))])
    return Scores(score, p_value, p_max, share, permuted=null, resampled=again)


def measure(scores: Mapping[str, Scores], randoms: Mapping[str, Values], count: int, sets: pd.DataFrame) -> pd.DataFrame:
    """The table of step 04: one row a layer and contrast.

    sets: the table of layer sets, from which the effects come. A positive effect is a loss that falls: alone against the
    base model, left out against `full` (how much worse without the layer); of the solution (effect_) and its closing sentence.
    """
    change = sets.set_index(["selector", "draw"])
    parts = []
    for contrast, result in scores.items():
        layers = np.arange(len(result.score))
        columns: dict[str, Any] = dict(layer=layers, contrast=contrast, score=result.score, score_random=randoms[contrast])
        columns |= {name: getattr(result, name) for name in ("p_value", "p_max", "selection_share")}
        columns["selected"] = np.isin(layers, select(result.score, count)).astype(int)
        for effect, of in (("effect", change["loss_change"]), ("closing", change["closing_change"])):
            columns[f"{effect}_alone"] = -of["only"][layers].to_numpy()
            columns[f"{effect}_left_out"] = of["without"][layers].to_numpy() - of["full", 0]
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def plain_scores(
    sums: Iterable[DocumentSums | None], corpus_of: Int[Tensor, " doc"], rule: ScoreRule, pool_subjects: bool
) -> list[float]:
    """Layer scores alone, without permutations and resamples; NaN where a layer is refused."""
    labels = one_hot(corpus_of, int(corpus_of.max()) + 1)
    return [float(rule.score(one, labels, pool_subjects)[0]) if one else np.nan for one in sums]


def agreement(scores: Mapping[tuple[str, str], Values], count: int, default: str) -> pd.DataFrame:
    """Layers that each definition of specificity selects, and its rank correlation with the default's scores. scores: by
    (contrast, definition)."""
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
    return dict(rho=spearman(ours, theirs)[0], layers=layers, common=common, chance=count * count / np.isfinite(ours).sum())


def relations(table: pd.DataFrame, layer_energy: np.ndarray, seed: int) -> pd.DataFrame:
    """How layer scores go with effects over layers: Spearman with an interval, and given depth and |tau_l|."""
    depth = np.arange(len(layer_energy))
    by_contrast = {c: table[table["contrast"] == c].sort_values("layer") for c in CONTRASTS}
    scores = {c: rows["score"].to_numpy() for c, rows in by_contrast.items()}
    rows = []
    for effect in ("effect_alone", "effect_left_out", "closing_alone", "closing_left_out"):
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


def summary(table: pd.DataFrame, sets: pd.DataFrame, relations: pd.DataFrame, reliability: pd.DataFrame) -> str:
    """What step 04 saw, as Markdown; the tables of layers, of sets, of scores against effects, and of reliability."""
    chosen = chosen_layers(table)
    common, count = len(set(chosen["corpus"]) & set(chosen["matched"])), len(chosen["corpus"])
    effect = relations[relations["effect"] == "effect_alone"].set_index("predictor")
    rho, silent = effect["rho"], [SPOKEN[c] for c in CONTRASTS if not effect["low"][c] > 0]
    nothing = f" On {' and on '.join(silent)} **the score does not tell a layer's worth**: its interval is not above 0."
    return f"""
- {_heard(table)}
- The layers selected are {chosen["corpus"]} on all tokens and {chosen["matched"]} on matched words: {common} of {count} in common.
- Injected alone, {_place(relations, "effect_alone")} do most for the solution, {_place(relations, "closing_alone")} for its closing sentence (rho with depth {_depth(relations, "effect_alone")["rho"]:+.2f} and {_depth(relations, "closing_alone")["rho"]:+.2f}).
- {_told_apart(reliability)}
- {_beside_chance(sets, reliability)}
- {_beside_full(sets)}
- Score against effect over layers: rho = {rho["corpus"]:+.2f} (all tokens), {rho["matched"]:+.2f} (matched words), {rho["|tau|"]:+.2f} (size of the change), {rho["depth"]:+.2f} (depth).{nothing if silent else ""}
""".strip()


def _depth(relations: pd.DataFrame, effect: str) -> Any:
    return relations.set_index(["predictor", "effect"]).loc[("depth", effect)]


def _place(relations: pd.DataFrame, effect: str) -> str:
    """Where in the model an effect is large, in words."""
    trend = _trend(relations, effect)
    return f"{trend} layers" if trend else "**layers of no particular depth**"


def _trend(relations: pd.DataFrame, effect: str) -> str:
    """`late` or `early`, where an effect is larger there; empty where its rank correlation with depth is not told from 0."""
    row = _depth(relations, effect)
    return "late" if row["low"] > 0 else "early" if row["high"] < 0 else ""


def effects_title(relations: pd.DataFrame, part: str) -> str:
    """The finding of a figure of effects by layer; part: `solution` or `closing`."""
    effect, said = {"solution": ("effect_alone", "The solution"), "closing": ("closing_alone", "The closing sentence")}[part]
    row = _depth(relations, effect)
    trend = _trend(relations, effect)
    place = f"{trend} layers do most" if trend else "no trend with depth is told"
    return f"{said}: {place} (rho {row['rho']:+.2f}, {row['low']:+.2f} to {row['high']:+.2f})"


def _told_apart(reliability: pd.DataFrame) -> str:
    row = reliability_of_sets(reliability)
    if np.isnan(row["reliability"]) or np.isnan(row["r_held_out"]):
        return "Whether this world tells sets of layers apart **cannot be said**: its losses rank nothing, so percentiles say nothing."
    verdict, end = "This world **tells sets of layers apart**", "."
    if not tells_apart(reliability):
        verdict = "**This world does not tell sets of layers apart**"
        end = f" (wanted: {RELIABLE:.1f} and {RESOLVED:.0%}), so percentiles say nothing."
    return (
        f"{verdict}: two halves of the problems rank {row['n']:.0f} sets with rho {row['reliability']:+.2f}, and the best set found on "
        f"one half beats the median random one on the other by {row['r_held_out']:.0%} of the whole vector's effect{end}"
    )


def _beside_chance(sets: pd.DataFrame, reliability: pd.DataFrame) -> str:
    """How the stethoscope's sets stand among random ones and beside other rules, with intervals."""
    named = named_sets(sets)
    share = named["percentile"]
    told, unsure = {}, []
    for contrast, name in {"corpus": "stethoscope", "matched": "stethoscope_matched"}.items():
        low, high = named["percentile_low"][name], named["percentile_high"][name]
        told[contrast] = f"**{share[name]:.1%}** ({low:.0%} to {high:.0%}; {SPOKEN[contrast]})"
        unsure += [SPOKEN[contrast]] if low < 1 - LEVEL else []
    rivals = share.drop(["full", "full_shrunk", "stethoscope", "known", "outside"], errors="ignore").dropna()
    better = [name.replace("_", " ") for name in rivals.index if rivals[name] > share["stethoscope"]]
    by_chance = f" On {' and on '.join(unsure)} that is **not told from chance**, which needs {1 - LEVEL:.0%} at the interval's lower end."
    ahead = "Rules that do better" if tells_apart(reliability) else "Rules that look better, which this world cannot tell"
    return (
        f"Injected there, the raw vector does better than {told['corpus']} and {told['matched']} of random sets; chance is 50 %."
        f"{by_chance if unsure else ''} {ahead}: {', '.join(better) or 'none'}."
    )


def _beside_full(sets: pd.DataFrame) -> str:
    """The stethoscope beside the whole vector, also at equal energy: selecting layers against shrinking all of them."""
    named = named_sets(sets)
    change, closing = named["loss_change"], named["closing_change"]
    if not change["full"] < 0:
        return f"The whole vector **does not lower the solution's loss** ({change['full']:+.2g} nats a token): nothing can be shared out."
    ours, shrunk = (change[name] / change["full"] for name in ("stethoscope", "full_shrunk"))
    verdict = "**does no better than shrinking all**" if shrunk >= ours else "does better than shrinking all"
    said = f"Of the fall that the whole vector brings, the stethoscope's set brings {ours:.0%}, the whole vector shrunk to its energy {shrunk:.0%}: selecting layers {verdict}."
    if not closing["full"] < 0:
        return said
    shares = [closing[name] / closing["full"] for name in ("stethoscope", "full_shrunk")]
    return f"{said} Of the closing sentence's fall they bring {shares[0]:.0%} and {shares[1]:.0%}."


def sets_title(sets: pd.DataFrame, reliability: pd.DataFrame) -> str:
    """The finding of the figure of sets: what the stethoscope's beat, and whether beyond chance; or that this world cannot tell."""
    row = named_sets(sets).loc["stethoscope"]
    beaten = f"beats {row['percentile']:.1%} of random sets ({row['percentile_low']:.0%} to {row['percentile_high']:.0%})"
    if not tells_apart(reliability):
        return f"This world cannot tell sets apart (the stethoscope's {beaten})"
    return f"The stethoscope's set {beaten}" + ("" if row["percentile_low"] >= 1 - LEVEL else ": not beyond chance")


def scales_title(sets: pd.DataFrame) -> str:
    """The finding of the figure of scales: the fall of the solution's loss at the stethoscope's energy."""
    change = named_sets(sets)["loss_change"]
    if not change["full"] < 0:
        return "The whole vector does not lower the solution's loss"
    shares = [change[name] / change["full"] for name in ("full_shrunk", "stethoscope")]
    return f"At equal energy, all layers bring {shares[0]:.0%} of the whole fall, the stethoscope's {shares[1]:.0%}"


def _heard(table: pd.DataFrame) -> str:
    """In how many layers mathematics is heard beyond chance; that it is heard nowhere is said, not counted."""
    if table["p_max"].isna().all():
        return "Whether a layer hears mathematics beyond chance **was not tested**: this definition of specificity cannot be permuted."
    layers, test = table["layer"].nunique(), "(permutation, maximum over layers)"
    corpus, matched = (int((table[table["contrast"] == c]["p_max"] < LEVEL).sum()) for c in CONTRASTS)
    if not corpus and not matched:
        return f"**No layer hears mathematics beyond chance**, neither on all tokens nor on matched words {test}."
    counted = f"{corpus or '**None**'} of {layers} layers hear mathematics beyond chance on all tokens, {matched or '**none**'} on matched words {test}."
    ahead = [(rows["score_random"] >= rows["score"]).sum() for rows in (table[table["contrast"] == c] for c in CONTRASTS)]
    dumb = f"A random dictionary of the same sparsity scores at least as high in {ahead[0]} on all tokens and in {ahead[1]} on matched words."
    return f"{counted} {dumb}"


def spearman(x: Values, y: Values, level: float = 0.05, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rho with a bootstrap interval over layers: (rho, low, high); layers without a score do not count."""
    one, other = _scored(x, y)
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(one), (resamples, len(one)))
    ranks = zip(stats.rankdata(one[picks], axis=1), stats.rankdata(other[picks], axis=1), strict=True)  # not one by one: seconds
    draws = [_pearson(a, b) for a, b in ranks if np.ptp(a) and np.ptp(b)]
    low, high = np.quantile(draws, [level / 2, 1 - level / 2]) if draws else (float("nan"),) * 2
    return _pearson(stats.rankdata(one), stats.rankdata(other)), float(low), float(high)


def partial_spearman(x: Values, y: Values, given: Sequence[Values]) -> float:
    """Spearman's rho of x and y with other variables held fixed: correlation of rank residuals. NaN without variation."""
    ranks = [stats.rankdata(v).astype(float) for v in _scored(x, y, *given)]
    design = np.column_stack([np.ones(len(ranks[0])), *ranks[2:]])
    residuals = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in ranks[:2]]
    if min(np.abs(r).max() for r in residuals) < 1e-9:
        return float("nan")
    return _pearson(*residuals)


def _scored(*columns: Values) -> np.ndarray:
    """The columns, [column, layer], without the layers at which one of them is NaN."""
    values = np.array([np.asarray(column, float) for column in columns])
    return values[:, np.isfinite(values).all(0)]


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else float("nan")
