"""Step 04's rules beside the ledger's own, wired to a world: each on the budget of the stethoscope, none with sight of an injection."""

from collections.abc import Mapping

import numpy as np
import torch

from stetholib import probes, sae_features, selectors
from stetholib.data.prompts import closing
from stetholib.layer_sets import halving, layer_count, layer_energies
from stetholib.statistics import Values
from stetholib.study import instruments
from stetholib.study.losses import Losses
from stetholib.study.sae_features import SaeFeatures, again
from stetholib.study.task_vectors import TaskVectors
from stetholib.study.world import World

ENDS = {"corpus": "", "matched": "_matched"}


def rivals(
    world: World, vectors: TaskVectors, features: SaeFeatures, losses: Losses, scores: Mapping[str, Values]
) -> dict[str, tuple[str, Values]]:
    """selector -> (contrast, a score for each layer). scores: the paper's layer scores, by contrast."""
    tests, thorough = features.self_tests(), world.profile.selection.thorough
    several = instruments.random_scores(features) if thorough else {}
    share = world.profile.selection.layer_share
    found: dict[str, tuple[str, Values]] = {}
    for contrast, end in ENDS.items():
        random = tests[f"score_random_{contrast}"].to_numpy()
        found |= {
            f"stethoscope_rise{end}": (contrast, selectors.rise(scores[contrast])),
            f"excess{end}": (contrast, selectors.excess(scores[contrast], several.get(contrast, random[None]))),
            f"random_dictionary{end}": (contrast, random),
            f"random_dictionary_rise{end}": (contrast, selectors.rise(random)),
        }
        if thorough and features._spec.release == "train":
            found[f"frozen_decoder{end}"] = (contrast, np.array(instruments.scores_of(instruments.frozen(features), contrast)))
    without = {
        "listening_change": _listening_change(world, vectors, features),
        "mean_difference": _mean_difference(world, features),
        "zero_ablation": selectors.zero_ablation(losses.of(()).mean(), [one.mean() for one in losses.skipped()]),
    } | _by_gradient(world, vectors)
    found |= {name: ("-", score) for name, score in without.items()}
    believed = np.isin(np.arange(world.layers), features.believed)  # random sets are drawn of these, so rules choose of these
    placed = {name: (contrast, np.where(believed, score, np.nan)) for name, (contrast, score) in found.items()}
    return {name: one for name, one in placed.items() if np.isfinite(one[1]).sum() >= layer_count(world.layers, share)}


def _mean_difference(world: World, features: SaeFeatures) -> np.ndarray:
    """Without an SAE: how far documents lie apart along the difference of the two corpora's means."""
    listening, tests = features.listening, features.self_tests()
    limits = dict(zip(tests["layer"].tolist(), tests["norm_limit"].tolist(), strict=True))
    sizes = (listening.max_tokens, listening.batch_tokens, limits)
    means = world.store.made(probes.document_means, world.model, listening.texts, *sizes).value
    corpus_of = np.array(listening.corpus_of)
    half = halving([str(corpus) for corpus in listening.corpus_of], world.seed("halves of documents"))
    maths = corpus_of < corpus_of.max()
    return np.array([selectors.mean_difference(np.asarray(means[layer]), maths, half) for layer in range(world.layers)])


def _listening_change(world: World, vectors: TaskVectors, features: SaeFeatures) -> np.ndarray:
    """What the SAEs hear of the fine-tuned model beside the base, on the same mathematics."""
    tuned = again(features, world.other(vectors.identity, lambda: vectors.folder))
    corpus_of = torch.tensor(features.listening.corpus_of)
    with features.sums("corpus").opened() as sums:
        pairs = zip(sums, tuned, strict=True)
        maths, rule = corpus_of < corpus_of.max(), features.rule()
        return np.array([sae_features.change_score(one, other, maths, rule) if one else np.nan for one, other in pairs])


def _by_gradient(world: World, vectors: TaskVectors) -> dict[str, np.ndarray]:
    """The rules that read the vector's matrices and the gradients of solutions of training problems, asked as the fine-tune was."""
    p = world.profile
    texts = world.solved(world.per_subject("train", p.projection.gradient_problems))
    closings = [closing(text) for _, text in texts]
    longest = min(p.data.max_tokens, p.projection.gradient_tokens)
    met = world.store.made(probes.couplings, world.model, vectors.tau, texts, closings, longest).value
    shape = world.store.made(selectors.geometry, world.weights, vectors.tau).value
    energy = layer_energies(vectors.energies())
    return {
        "taylor": selectors.taylor(met.along),
        "fisher": selectors.fisher(met.weighted),
        "off_principal": selectors.off_principal(shape["outside"].to_numpy(), met.along, met.squared, energy),
        "signal_to_noise": shape["signal_to_noise"].to_numpy(),
    }
