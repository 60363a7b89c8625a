"""Step 02. Can we trust the instrument, and which features mean mathematics?

Specificity, layer scores, permutations and resamples are all computed from sums over documents (`models.sums`), so the
model reads each text once and nothing is stored per token.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stetholib.belief import explains
from stetholib.errors import UserError
from stetholib.models.dictionary import (
    OUTLIER,
    Dictionary,
    check_width,
    massive_dimensions,
    ordinary,
    random_dictionary,
    self_test,
)
from stetholib.models.loading import LanguageModel, check_finite
from stetholib.models.streams import Tokenized, Watch, collected, residual_batches, tokenize, unwatched, up_to
from stetholib.models.sums import CONTRASTS, DRAWN, Covariance, DocumentSums, FeatureSums, firing, moments, one_hot, specificity

SELF_TEST_TOKENS = 20_000
NEIGHBOUR_TOKENS = 2_000
CHUNK = 2**24  # entries (draw, corpus, feature) that are scored at once
GENERAL = "general"


def matched_weights(tokens: Sequence[Int[Tensor, " _"]], is_maths: Sequence[bool], minimum: int) -> list[Float[Tensor, " _"]]:
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


def most_specific(values: Float[Tensor, " d_sae"], eligible: Bool[Tensor, " d_sae"], count: int) -> Int[Tensor, " count"]:
    """Indices of the `count` most specific features that fire, most specific first; ties by index."""
    if (alive := int(eligible.sum())) < count:
        raise UserError(f"features: {count} are needed but only {alive} fire often enough; lower features.minimum_firing")
    ranked = torch.where(eligible, values, -torch.inf)
    return torch.sort(ranked, descending=True, stable=True).indices[:count]


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


@dataclass(frozen=True)
class Listening:
    """What is heard and how: texts [doc] with the corpus of each, cut at `max_tokens`, in batches of `batch_tokens`.

    matched_minimum: how often a word must occur in both corpora to count in the matched contrast. seeds: of the tokens
    that self-tests see (`sample`, `neighbours`), and by layer of the random dictionaries (`dictionary`).
    """

    texts: Sequence[str]
    corpus_of: Sequence[int]
    max_tokens: int
    batch_tokens: int
    matched_minimum: int
    sample_seed: int
    neighbour_seed: int
    dictionary_seeds: Mapping[int, int]


@dataclass(frozen=True)
class Heard:
    """What a group of layers heard: self-tests (one row a layer), document sums by `contrast.layer`, and the covariance
    of activations on mathematics by layer."""

    tests: pd.DataFrame
    sums: Mapping[str, DocumentSums]
    covariance: Mapping[int, Float[Tensor, "d_model d_model"]]


Layers = TypeVar("Layers", range, tuple[int, ...])


def groups(layers: Layers, each: int, memory_gib: float) -> list[Layers]:
    """Layers in groups whose sums fit into memory together; each: bytes of one layer's sums, its random double apart."""
    size = max(1, int(memory_gib * 2**30 / (2 * each)))
    return [layers[start : start + size] for start in range(0, len(layers), size)]


def hear(
    base: LanguageModel,
    listening: Listening,
    dictionaries: Mapping[int, Dictionary],
    rule: ScoreRule,
    group: Sequence[int],
    *,
    watch: Watch = unwatched,
) -> Heard:
    """One pass over all documents for a group of layers: sums of their SAEs, self-tests, and moments of activations.

    Outliers (`dictionary.ordinary`) are not heard: an SAE knows nothing of them, and one would drown a feature's other tokens.
    Of the random dictionaries only self-tests and layer scores are kept; the score is NaN where the SAE explains no more.
    """
    corpus_of = torch.tensor(listening.corpus_of)
    corpora = int(corpus_of.max()) + 1
    pairs = [(ids, 1) for ids, _ in tokenize(base, [("", text) for text in listening.texts], listening.max_tokens)]
    content = [torch.tensor(ids[1:], dtype=torch.long) for ids, _ in pairs]
    if set(range(corpora)) - {at for at, ids in zip(listening.corpus_of, content, strict=True) if len(ids)}:
        raise UserError("texts: all of one kind have one token each, and the first one is never heard; give longer ones")
    is_maths = corpus_of < corpora - 1
    matched = matched_weights(content, is_maths.tolist(), listening.matched_minimum)
    tests, instruments, sums = _tested(base, listening, pairs, dictionaries, group)
    moment = {layer: Covariance(instruments["sae", layer].W_dec.shape[1], base.device) for layer in group}
    passing = residual_batches(base, pairs, listening.batch_tokens, group, watch, "02 feature statistics")
    for batch, document, streams in passing:
        joined = torch.cat([matched[at] for at in batch.documents]).to(document.device)
        maths = is_maths.to(document.device)[document]
        for layer, x in streams.items():
            kept = (x.norm(dim=1) <= tests[layer]["norm_limit"]).float()
            weights = {"corpus": kept, "matched": joined * kept}
            for name in ("sae", "random"):
                sums[name, layer].add(instruments[name, layer].encode(x), document, weights)
            moment[layer].add(x[maths])
    labels = one_hot(corpus_of, corpora)
    for layer in group:
        for contrast in CONTRASTS:
            baseline = nan
            if explains(tests[layer]):
                baseline = float(rule.score(sums["random", layer].value(contrast), labels, contrast == "matched")[0])
            tests[layer][f"score_random_{contrast}"] = baseline
    found = {f"{contrast}.{layer}": sums["sae", layer].value(contrast) for layer in group for contrast in CONTRASTS}
    return Heard(pd.DataFrame([tests[layer] for layer in group]), found, {layer: moment[layer].value() for layer in group})


def _tested(
    base: LanguageModel, listening: Listening, pairs: Tokenized, dictionaries: Mapping[int, Dictionary], group: Sequence[int]
) -> tuple[dict[int, dict[str, Any]], dict[tuple[str, int], Dictionary], dict[tuple[str, int], FeatureSums]]:
    """Self-tests of a group's SAEs, what `belief.refusals` goes by, the SAEs with their random doubles, and empty sums for both."""
    last, corpus_of = max(listening.dictionary_seeds), torch.tensor(listening.corpus_of)
    near_group = range(max(0, group[0] - 1), min(last + 1, group[-1] + 2))
    sample = _sample(base, listening, pairs, near_group)
    generator = torch.Generator().manual_seed(listening.neighbour_seed)
    some = torch.randperm(len(sample[group[0]]), generator=generator)[:NEIGHBOUR_TOKENS].to(base.device)
    kept = {layer: ordinary(x) for layer, x in sample.items()}
    tests, instruments, sums = {}, {}, {}
    for layer in group:
        one, every = dictionaries[layer], sample[layer]
        check_width(layer, one, every)
        x = every[kept[layer]]
        found = self_test(one, x)
        beside = [at for at in (layer - 1, layer, layer + 1) if at in sample]
        near = {at: self_test(one, sample[at][some][kept[at][some]]).fvu for at in beside}
        own = near.pop(layer)
        double = random_dictionary(x, one.d_sae, found.l0, listening.dictionary_seeds[layer])
        chance = self_test(double, x)
        tests[layer] = dict(layer=layer, d_sae=one.d_sae) | asdict(found)
        tests[layer] |= {f"{name}_random": value for name, value in asdict(chance).items()}
        tests[layer] |= dict(fvu_here=own, fvu_neighbour=min(near.values(), default=nan)) | _outliers(one, every, kept[layer])
        for name, instrument, said in (("sae", one, found), ("random", double, chance)):
            check_finite({f"what the {name} dictionary of layer {layer} hears": torch.tensor(said.largest)})
            instruments[name, layer] = instrument
            sums[name, layer] = FeatureSums(one.d_sae, corpus_of, said.largest or 1.0, base.device)
    return tests, instruments, sums


def _outliers(one: Dictionary, x: Float[Tensor, "token d_model"], kept: Bool[Tensor, " token"]) -> dict[str, Any]:
    """What self-tests leave out: the share of outliers, the norm above which a token is one, the variance left unexplained with
    them, and the dimensions in which activations are massive."""
    limit = float(OUTLIER * x.norm(dim=1).median())
    whole = self_test(one, x).fvu if not kept.all() else nan
    massive = " ".join(map(str, massive_dimensions(x)))
    return dict(norm_limit=limit, outliers=1 - float(kept.float().mean()), fvu_with_outliers=whole, massive=massive)


def _sample(
    base: LanguageModel, listening: Listening, pairs: Tokenized, layers: Iterable[int]
) -> dict[int, Float[Tensor, "token d_model"]]:
    """Activations of a random part of the documents, for self-tests and the random dictionaries."""
    order = list(range(len(pairs)))
    random.Random(listening.sample_seed).shuffle(order)
    kept, _ = up_to((pairs[index] for index in order), SELF_TEST_TOKENS)
    return collected(base, kept, listening.batch_tokens, layers)


def hear_again(
    tuned: LanguageModel,
    listening: Listening,
    dictionaries: Mapping[int, Dictionary],
    tests: pd.DataFrame,
    group: Sequence[int],
    *,
    watch: Watch = unwatched,
) -> dict[int, DocumentSums]:
    """What theta_0's SAEs hear of theta_1 on the same mathematics, by layer: sums over all tokens of each of its documents. tests:
    of `hear`, for the norm above which a token is an outlier."""
    corpus_of, known = torch.tensor(listening.corpus_of), tests.set_index("layer")
    texts = [text for text, corpus in zip(listening.texts, listening.corpus_of, strict=True) if corpus < corpus_of.max()]
    pairs = [(ids, 1) for ids, _ in tokenize(tuned, [("", text) for text in texts], listening.max_tokens)]
    every = torch.zeros(len(texts), dtype=torch.long)
    held = {layer: dictionaries[layer] for layer in group}  # each is read once
    ceilings = {layer: float(known["largest"][layer]) or 1.0 for layer in group}
    sums = {layer: FeatureSums(one.d_sae, every, ceilings[layer], tuned.device) for layer, one in held.items()}
    passing = residual_batches(tuned, pairs, listening.batch_tokens, group, watch, "04 features after the fine-tune")
    for _, document, streams in passing:
        for layer, x in streams.items():
            kept = (x.norm(dim=1) <= known["norm_limit"][layer]).float()
            sums[layer].add(held[layer].encode(x), document, dict.fromkeys(CONTRASTS, kept))
    return {layer: one.value("corpus") for layer, one in sums.items()}


def change_score(before: DocumentSums, after: DocumentSums, maths: Bool[Tensor, " doc"], rule: ScoreRule) -> float:
    """The layer score of theta_1 against theta_0 on the same mathematics: the stethoscope that listens to the fine-tune. before:
    sums of all documents under theta_0; after: of those of mathematics (`maths`) under theta_1. AUROC, whose histograms know
    no such corpora, gives way to Cohen's d."""
    names = ("weight", "total", "squares", "fires")
    joined = {name: torch.cat([getattr(after, name), getattr(before, name)[maths]]) for name in names}
    labels = torch.tensor([0] * len(after.weight) + [1] * int(maths.sum()))
    same = rule if rule.kind in DRAWN else replace(rule, kind="cohen_d")
    return float(same.score(DocumentSums(**joined, histogram=after.histogram), one_hot(labels, 2), True)[0])


def doubles(
    base: LanguageModel, listening: Listening, wanted: Mapping[int, tuple[int, float]], seed: int
) -> dict[int, Dictionary]:
    """Random dictionaries by layer, of the width and L0 that are wanted: other draws of the instrument's zero than `hear` makes."""
    pairs = [(ids, 1) for ids, _ in tokenize(base, [("", text) for text in listening.texts], listening.max_tokens)]
    sample = _sample(base, listening, pairs, wanted)
    found = {}
    for layer, (d_sae, l0) in wanted.items():
        x = sample.pop(layer)
        found[layer] = random_dictionary(x[ordinary(x)], d_sae, l0, seed + layer)
    return found


def specificities(
    sums: Iterable[DocumentSums | None], corpus_of: Int[Tensor, " doc"], kind: str, minimum_firing: float, pool_subjects: bool
) -> Iterator[tuple[Float[Tensor, " d_sae"], Bool[Tensor, " d_sae"]] | None]:
    """(specificity, whether it fires) of every feature, layer by layer; None where a layer is refused."""
    labels = one_hot(corpus_of, int(corpus_of.max()) + 1)
    for one in sums:
        if one is None:
            yield None
            continue
        m = moments(one, labels, pool_subjects)
        yield specificity(kind, one, m)[0], firing(m, minimum_firing)[0]


def measure(
    tests: pd.DataFrame, heard: Mapping[str, Iterable[tuple[Tensor, Tensor] | None]], refused: Mapping[int, str]
) -> pd.DataFrame:
    """The table of step 02: one row a layer and contrast. tests: self-tests, one row a layer; heard: by contrast, (specificity,
    fires) of every feature, layer by layer, None for a refused one, whose top_feature is -1; refused: why, by layer."""
    rows = []
    for contrast, layers in heard.items():
        for layer, one in enumerate(layers):
            top = int(most_specific(*one, 1)[0]) if one else -1
            about = dict(top_feature=top, top_specificity=float(one[0][top]) if one else nan, refused=refused.get(layer, ""))
            rows.append(dict(layer=layer, contrast=contrast) | about)
    shown = ["d_sae", "l0", "fvu", "fvu_random", "alive", "l0_random"]
    shown += ["fvu_neighbour", "outliers", "fvu_with_outliers", "massive"]
    return pd.DataFrame(rows).join(tests.set_index("layer")[shown], on="layer")


def top_tokens(
    base: LanguageModel, listening: Listening, dictionaries: Mapping[int, Dictionary], layer: int, feature: int, count: int
) -> pd.DataFrame:
    """The surface forms on which a feature is most active, with mean activation and occurrences (20 at least)."""
    d, parts = dictionaries[layer], []
    one = Dictionary(d.W_enc[:, [feature]], d.b_enc[[feature]], d.W_dec[[feature]], d.b_dec, d.threshold[[feature]])
    pairs = [(ids, 1) for ids, _ in tokenize(base, [("", text) for text in listening.texts], listening.max_tokens)]
    for batch, _, streams in residual_batches(base, pairs, listening.batch_tokens, [layer]):
        ids = batch.input_ids[batch.scored.bool()].cpu()
        parts.append(pd.DataFrame({"id": ids, "activation": one.encode(streams[layer])[:, 0].cpu()}))
    heard = pd.concat(parts).groupby("id")["activation"].agg(["mean", "size"]).query("size >= 20")
    best = heard.sort_values("mean", ascending=False).head(count).reset_index()
    best.insert(0, "token", [base.tokenizer.decode([i]) for i in best["id"]])
    return best.drop(columns="id").rename(columns={"mean": "mean_activation", "size": "occurrences"})


def best_features(table: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """(layer, feature) of the most specific feature under each contrast, from the table of step 02."""
    tops = {contrast: rows.nlargest(1, "top_specificity").iloc[0] for contrast, rows in table.groupby("contrast")}
    return {contrast: (int(tops[contrast]["layer"]), int(tops[contrast]["top_feature"])) for contrast in CONTRASTS}


FAINT = {"cohen_d": (0.0, 0.2), "firing_log_ratio": (0.0, 0.2), "auroc": (0.5, 0.05)}  # chance; what above it is hardly anything


def summary(table: pd.DataFrame, kind: str = "cohen_d") -> str:
    """What step 02 saw, as Markdown; table: of step 02, kind: the definition of specificity."""
    once, tops = table[table["contrast"] == "corpus"], table.groupby("contrast")["top_specificity"].max()
    best, (chance, faint) = best_features(table), FAINT.get(kind, FAINT["cohen_d"])
    fvu = f"mean FVU {once['fvu'].mean():.2f} against {once['fvu_random'].mean():.2f}"
    trust = f"Every SAE reconstructs better than a random dictionary of the same L0: **True** ({fvu})."
    if len(odd := once[once["refused"].fillna("") != ""]):
        reasons = "; ".join(f"layer {row.layer}: {row.refused}" for row in odd.itertuples())
        trust = f"**{len(odd)} of {len(once)} SAEs cannot be believed**, and their layers are left out ({fvu}): {reasons}."
    left = (tops["matched"] - chance) / (tops["corpus"] - chance) if tops["corpus"] > chance else float("nan")
    means = "what is lost was vocabulary" if left < 1 else "vocabulary does not explain the best feature"
    words = f"Holding the words equal leaves {left:.0%} of the best specificity ({tops['matched']:.2f} of {tops['corpus']:.2f}): {means}."
    if tops["corpus"] < chance + faint:
        words = f"**No feature prefers mathematics by more than a trace**: the best specificity is {tops['corpus']:.2f} on all tokens, chance {chance:g}."
    elif tops["matched"] < chance + faint:
        words = (
            f"Holding the words equal leaves **no feature that prefers mathematics by more than a trace** "
            f"({tops['matched']:.2f} of {tops['corpus']:.2f}, chance {chance:g}): what was heard was vocabulary."
        )
    return f"""
- {trust}
- {once["alive"].mean():.0%} of the features fire at all; the mean L0 is {once["l0"].mean():.1f}.
- {words}
- The best layer is {best["corpus"][0]} on all tokens and {best["matched"][0]} on matched words.
""".strip()
