"""Planted truth: worlds whose right layer and features are known by design calibrate the instrument before it is believed."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from stetholib.layer_selection import ScoreRule, score_layers
from stetholib.sae_features import DocumentSums

CORPORA, DOCUMENTS, TOKENS, D_SAE, FEATURES = 8, 6, 20, 40, 5
RULE = ScoreRule(minimum=5, minimum_firing=0.0)


def planted_sums(layers: int, planted: int, effect: float, seed: int) -> tuple[list[DocumentSums], Int[Tensor, " doc"]]:
    """Document sums of a world where only layer `planted` hears mathematics, in its first features.

    There are as many general documents as mathematical ones. Activations are rectified Gaussians with a component shared
    by a document, and `effect` standard deviations more on mathematics.
    """
    generator = torch.Generator().manual_seed(seed)
    subject_of = torch.arange(CORPORA - 1).repeat_interleave(DOCUMENTS)
    corpus_of = torch.cat([subject_of, torch.full_like(subject_of, CORPORA - 1)])
    maths = (corpus_of < CORPORA - 1).float()
    sums = []
    for layer in range(layers):
        shape = (len(corpus_of), TOKENS, D_SAE)
        a = torch.randn(shape, generator=generator) + 0.5 * torch.randn(len(corpus_of), 1, D_SAE, generator=generator)
        if layer == planted:
            a[:, :, :FEATURES] += effect * maths[:, None, None]
        a = torch.relu(a)
        histogram = torch.ones(CORPORA, 2, D_SAE)
        weight = torch.full((len(corpus_of),), float(TOKENS))
        sums.append(DocumentSums(weight, a.sum(1), a.square().sum(1), (a > 0).float().sum(1), histogram))
    return sums, corpus_of


def null_p_values(worlds: int, permutations: int = 99) -> np.ndarray:
    """Permutation p of one layer's score in worlds without any signal; uniform if the test is honest."""
    found = []
    for seed in range(worlds):
        sums, corpus_of = planted_sums(1, planted=-1, effect=0.0, seed=seed)
        found.append(score_layers(sums, corpus_of, RULE, False, 1, permutations, 2, seed).p_value[0])
    return np.array(found)


def power_curve(effects: Sequence[float], worlds: int, layers: int = 6, permutations: int = 39) -> pd.DataFrame:
    """Share of worlds in which the planted layer is heard (p < .05), and in which it scores highest, by effect."""
    rows = []
    for effect in effects:
        heard, top = [], []
        for seed in range(worlds):
            sums, corpus_of = planted_sums(layers, planted=seed % layers, effect=effect, seed=1000 + seed)
            result = score_layers(sums, corpus_of, RULE, False, 1, permutations, 2, seed)
            heard.append(result.p_value[seed % layers] < 0.05)
            top.append(int(result.score.argmax()) == seed % layers)
        rows.append(dict(effect=effect, power=np.mean(heard), top=np.mean(top), chance=1 / layers, worlds=worlds))
    return pd.DataFrame(rows)
