"""Step 03, on the side. Of what the scalpel misses, how much is the dictionary's, and how much the choice of its features?

The most specific features stand beside others of the same SAE: drawn at random among those that fire, the most often firing,
and those that the vector itself would choose; beside what it would choose from a random dictionary; and beside the best
subspace of all. One subspace a layer for all its matrices, as the scalpel has, so that energies add up over the sides.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stetholib.editing import TaskVector
from stetholib.models.dictionary import Dictionary
from stetholib.models.subspaces import orthonormal, principal
from stetholib.models.sums import firing_rates
from stetholib.sae_features import Heard, most_specific, specificities
from stetholib.subspace_projection import own_moments

CHOICES = {
    "most_specific": "the most specific features (the scalpel)",
    "random_features": "features that fire, drawn at random",
    "most_frequent": "the most often firing features",
    "best_features": "the features that the vector would choose",
    "best_random": "random directions that it would choose",
    "best_subspace": "the best subspace",
    "chance": "chance",
}


def kept(moment: Float[Tensor, "d_model d_model"], directions: Float[Tensor, "rank d_model"]) -> float:
    """The energy tr(Q' M Q) that the span of some directions keeps."""
    q = orthonormal(directions)
    return float(((moment @ q) * q).sum())


def best(moment: Float[Tensor, "d_model d_model"], directions: Float[Tensor, "n d_model"], rank: int) -> Int[Tensor, " rank"]:
    """The directions that each keep most energy by themselves."""
    unit = torch.nn.functional.normalize(directions.double(), dim=1)
    return ((unit @ moment) * unit).sum(1).topk(rank).indices


def of_layer(
    moment: Float[Tensor, "d_model d_model"],
    features: Float[Tensor, "n d_model"],
    rates: Float[Tensor, " n"],
    rank: int,
    draws: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Energy kept by each choice of `rank` directions in one layer. features: decoders of those that fire, most specific first;
    rates: how often each does."""
    random = torch.randn(features.shape, generator=generator)
    picks = [torch.randperm(len(features), generator=generator)[:rank] for _ in range(draws)]
    chosen = {
        "most_specific": features[:rank],
        "most_frequent": features[rates.topk(rank).indices],
        "best_features": features[best(moment, features, rank)],
        "best_random": random[best(moment, random, rank)],
    }
    found = {name: kept(moment, directions) for name, directions in chosen.items()}
    found["random_features"] = sum(kept(moment, features[pick]) for pick in picks) / draws
    found["best_subspace"] = kept(moment, principal(moment)[:, :rank].T)
    return found | {"chance": float(moment.trace()) * rank / len(moment)}


def measure(
    vector: TaskVector,
    heard: Mapping[int, Heard],
    dictionaries: Mapping[int, Dictionary],
    corpus_of: Sequence[int],
    kind: str,
    minimum_firing: float,
    rank: int,
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """Columns choice and energy_retained, over all layers of the vector, whose SAEs are believed."""
    labels, generator = torch.tensor(list(corpus_of)), torch.Generator().manual_seed(seed)
    total, energy = dict.fromkeys(CHOICES, 0.0), 0.0
    for layer in vector.layers:  # one at a time: the sums of all layers of a large model are gigabytes
        one = heard[layer].sums[f"corpus.{layer}"]
        (features,) = specificities([one], labels, kind, minimum_firing, False)
        assert features is not None
        ranked = most_specific(*features, int(features[1].sum()))
        moment, decoder = own_moments(vector, layer)["both"], dictionaries[layer].W_dec
        decoders, rates = decoder[ranked.to(decoder.device)].cpu(), firing_rates(one, labels)[ranked]
        for name, value in of_layer(moment, decoders, rates, rank, draws, generator).items():
            total[name] += value
        energy += float(moment.trace())
    return pd.DataFrame([(name, value / energy) for name, value in total.items()], columns=["choice", "energy_retained"])


def summary(table: pd.DataFrame) -> str:
    """What of the gap between the scalpel and the best subspace is the choice's, and what the dictionary's, in words."""
    share = table.set_index("choice")["energy_retained"]
    gap = share["best_subspace"] - share["most_specific"]
    chosen = (share["best_features"] - share["most_specific"]) / gap if gap > 0 else float("nan")
    than = "**no more than**" if share["most_specific"] <= share["random_features"] else "more than"
    often = "less" if share["most_specific"] < share["most_frequent"] else "more"
    return (
        f"The most specific features keep {share['most_specific']:.1%}, {than} features drawn at random ({share['random_features']:.1%}) "
        f"and {often} than the most often firing ({share['most_frequent']:.1%}). Those that the vector itself would choose keep "
        f"{share['best_features']:.1%}, of a random dictionary {share['best_random']:.1%}, the best subspace {share['best_subspace']:.1%}: "
        f"of the gap to it, at least {chosen:.0%} is the choice of features, since others of the same dictionary, each chosen by "
        f"itself, keep so much more."
    )
