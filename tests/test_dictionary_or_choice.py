"""Of what the scalpel misses: the dictionary's part and the choice's, where both are known."""

import pandas as pd
import pytest
import torch

from stetholib import dictionary_or_choice as dc
from stetholib.editing import TaskVector
from stetholib.models import subspaces
from stetholib.models.weights import MATRICES, SIDE
from stetholib.subspace_projection import own_moments

WIDTH, RANK = 16, 2


def moment():
    """Energies 8, 4, 2, 1 along the first four axes, a little elsewhere."""
    return torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0] + [0.05] * 12, dtype=torch.float64))


def found(features, rates):
    return dc.of_layer(moment(), features, rates, RANK, 400, torch.Generator().manual_seed(0))


def test_a_subspace_keeps_of_a_layer_what_its_projections_keep_of_the_matrices():
    generator = torch.Generator().manual_seed(0)
    vector = TaskVector({(0, m): torch.randn(20, WIDTH, generator=generator) if SIDE[m] == "reader" else torch.randn(WIDTH, 20, generator=generator) for m in MATRICES})  # fmt: skip
    directions = torch.randn(3, WIDTH, generator=generator)
    basis = subspaces.orthonormal(directions)
    energy = sum(float(subspaces.project(delta, basis, SIDE[m]).square().sum()) for (_, m), delta in vector.deltas.items())
    assert dc.kept(own_moments(vector, 0)["both"], directions) == pytest.approx(energy, rel=1e-5)


def test_each_choice_keeps_what_is_known():
    axes = torch.eye(WIDTH)
    features = axes[[4, 5, 2, 0, 1, 6, 7, 8]]  # most specific first: two axes on which nothing lies
    rates = torch.tensor([0.1, 0.1, 0.9, 0.8, 0.1, 0.1, 0.1, 0.1])
    said = found(features, rates)
    assert said["most_specific"] == pytest.approx(0.1) and said["most_frequent"] == pytest.approx(2 + 8)
    assert said["best_features"] == pytest.approx(12) == said["best_subspace"] and said["best_random"] < 12
    assert said["random_features"] == pytest.approx(2 * (0.05 * 5 + 2 + 8 + 4) / 8, rel=0.1)
    assert said["chance"] == pytest.approx(RANK / WIDTH * (15 + 0.6))


def test_the_gap_is_split_in_words():
    table = pd.DataFrame(dict(choice=[*dc.CHOICES], energy_retained=[0.05, 0.03, 0.06, 0.09, 0.045, 0.13, 0.03]))
    text = dc.summary(table)
    assert "keep 5.0%, more than features drawn at random (3.0%) and less than the most often firing (6.0%)" in text
    assert "of the gap to it, at least 50% is the choice of features, since others of the same dictionary" in text
    assert "**no more than** features drawn at random" in dc.summary(table.replace({0.05: 0.02}))
