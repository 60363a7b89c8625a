"""Other instruments in the place of a world's SAEs: other draws of random dictionaries, a decoder frozen at random, other seeds.

What they cost is that of step 02, each time. They run where a profile is thorough, and in `make organisms`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch

from stetholib import layer_selection, layer_sets, sae_features
from stetholib.editing import Lazy
from stetholib.models.dictionary import Dictionary
from stetholib.models.subspaces import orthonormal, principal_cosines
from stetholib.models.sums import CONTRASTS
from stetholib.store.artefacts import Artefact
from stetholib.store.values import Input, hashed
from stetholib.study.sae_features import SaeFeatures, beside

DICTIONARIES = 10


class Doubles(SaeFeatures):
    """Random dictionaries as wide and as sparse as a step's SAEs, believed where these are."""

    def __init__(self, step: SaeFeatures, seed: int) -> None:
        """step: whose SAEs; seed: of the directions."""
        super().__init__(step._world, step._spec)
        self._step, self._seed, self._refused, self._groups = step, seed, step._refused, step._groups

    @cached_property
    def _all(self) -> Artefact:
        wanted = {row.layer: (row.d_sae, row.l0) for row in self._step.self_tests().itertuples()}
        seed = self._world.seed(f"doubles {self._seed}")
        return self._store.made(sae_features.doubles, self._world.model, self.listening, wanted, seed)

    def _of(self, layers: range) -> Input[Mapping[int, Dictionary]]:
        kept = self._all
        return Input.of(hashed([kept, list(layers)]), lambda: Lazy(layers, lambda layer: self._placed(kept.value[layer])))


def scores_of(step: SaeFeatures, contrast: str, kind: str | None = None) -> list[float]:
    """Layer scores alone, under any definition of specificity."""
    inputs = (step.sums(contrast), torch.tensor(step.listening.corpus_of), step.rule(kind), contrast == "matched")
    return step._store.made(layer_selection.plain_scores, *inputs).value


def random_scores(step: SaeFeatures, count: int = DICTIONARIES) -> dict[str, np.ndarray]:
    """Layer scores of `count` random dictionaries, [dictionary, layer], by contrast."""
    drawn = [Doubles(step, seed) for seed in range(count)]
    return {contrast: np.stack([scores_of(one, contrast) for one in drawn]) for contrast in CONTRASTS}


def frozen(step: SaeFeatures) -> SaeFeatures:
    """SAEs of which only the encoder was trained, over a decoder that stays at random; believed where the others are."""
    return beside(step, replace(step._spec, frozen_decoder=True))


def reseeded(step: SaeFeatures, seeds: int) -> list[SaeFeatures]:
    """SAEs of other seeds; none where they are fetched, since a release has one."""
    spec = step._spec
    drawn = range(spec.seed + 1, spec.seed + 1 + seeds) if spec.release == "train" else ()
    return [SaeFeatures(step._world, replace(spec, seed=seed)) for seed in drawn]


def over_seeds(step: SaeFeatures, others: Sequence[SaeFeatures], count: int) -> pd.DataFrame:
    """What other seeds of the SAEs change: one row a contrast and layer, with score, seed_share (of all seeds, how many select the
    layer), agreement (overlap |P_A P_B|^2 / k of the subspaces of the k most specific decoders, mean over seeds; features may differ
    where subspaces do not, arXiv 2606.12138), chance (k / d) and weighted, the score times that agreement."""
    parts = []
    for contrast in CONTRASTS:
        scores = np.stack([scores_of(one, contrast) for one in (step, *others)])
        chosen = [layer_sets.select(score, count) for score in scores]
        ours, *theirs = (_subspaces(one, contrast) for one in (step, *others))
        met = [[_overlap(ours.get(layer), one.get(layer)) for one in theirs] for layer in range(scores.shape[1])]
        agreement, rank = np.array([np.mean(row) for row in met]), next(iter(ours.values())).shape
        share = np.array([np.mean([layer in one for one in chosen]) for layer in range(scores.shape[1])])
        columns = dict(contrast=contrast, layer=np.arange(scores.shape[1]), score=scores[0], seed_share=share)
        columns |= dict(agreement=agreement, chance=rank[1] / rank[0], weighted=scores[0] * agreement)
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _subspaces(step: SaeFeatures, contrast: str) -> dict[int, torch.Tensor]:
    """The subspace of each believed layer's most specific decoders."""
    rank, found = step.rule().minimum, {}
    with step.dictionaries.opened() as every:
        for layer, one in enumerate(step.specificities(contrast)):
            if one:
                decoders = every[layer].W_dec
                found[layer] = orthonormal(decoders[sae_features.most_specific(*one, rank).to(decoders.device)].cpu())
    return found


def _overlap(one: torch.Tensor | None, other: torch.Tensor | None) -> float:
    return float("nan") if one is None or other is None else float(principal_cosines(one, other).square().mean())
