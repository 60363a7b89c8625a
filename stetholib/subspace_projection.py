"""Step 03. What survives when SAE directions filter the task vector (the scalpel), and why so little?

A subspace of the residual stream filters a reader from the right (tau Q Q') and a writer from the left (Q Q' tau).
The energy it keeps, rho, is set beside what a random subspace of the same rank keeps (rank / d) and what the best
one keeps (`own_svd_layer`: like the scalpel, one subspace for all matrices of a layer). What is lost splits into what any subspace of that rank must lose and what this one loses by
pointing elsewhere: 1 - rho = (1 - ceiling) + (ceiling - rho).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from stetholib.editing import Edit, TaskVector, losses_by_document, matched_scales, rounded, survival, survival_shares
from stetholib.models import subspaces
from stetholib.models.dictionary import Dictionary
from stetholib.models.loading import LanguageModel
from stetholib.models.streams import Batch, Watch, unwatched
from stetholib.models.subspaces import Basis, LossSplit, Ranks, energy_by_rank, orthonormal, principal, project, through_gain
from stetholib.models.weights import READERS, SIDE, WRITERS, Key, Weights
from stetholib.profiles import FineTune
from stetholib.sae_features import Heard, most_specific, specificities
from stetholib.statistics import bootstrap_ratio

COVECTORS = ("sae_encoder", "gradient_pca")


def own_moments(vector: TaskVector, layer: int) -> dict[str, Float[Tensor, "d_model d_model"]]:
    """Where a block's change lies in the residual stream: the sum of tau' tau over its readers, of tau tau' over its writers, and of
    the two. A subspace Q keeps the energy tr(Q' M Q)."""
    moments = {}
    for side, matrices in (("reader", READERS), ("writer", WRITERS)):
        deltas = (vector.deltas[layer, matrix].double() for matrix in matrices)
        parts = [delta.T @ delta if side == "reader" else delta @ delta.T for delta in deltas]
        moments[side] = torch.stack(parts).sum(0).cpu()
    return moments | {"both": moments["reader"] + moments["writer"]}


def own_svd(vector: TaskVector, layer: int) -> dict[str, Basis]:
    """The best single subspace for a block's readers, for its writers, and for both together: the ceilings, eigenvectors of
    `own_moments`."""
    return {name: principal(moment) for name, moment in own_moments(vector, layer).items()}


@dataclass(frozen=True)
class Directions:
    """Where the bases of one site come from: by name, an orthonormal basis of the residual stream after that block."""

    by_name: Mapping[str, Basis]


Sites = Mapping[int, Directions]  # at each block's output, by layer
Gains = Mapping[Key, Float[Tensor, " d_model"]]  # between a matrix and the residual stream


def measure(
    vector: TaskVector, sites: Sites, gains: Gains, ranks: Ranks, random_draws: int, seed: int, *, watch: Watch = unwatched
) -> pd.DataFrame:
    """The table of step 03: energy retained by layer, matrix, basis and rank, with both sensitivities at the default rank. sites:
    the directions at each block's output; a basis of fewer directions than a rank keeps there what all of them keep. Random subspaces
    are drawn anew for every layer and matrix."""
    rows = []
    width = next(iter(gains.values())).shape[0]
    generator = torch.Generator().manual_seed(seed)
    for layer in watch(vector.layers, "03 projections"):
        best = own_svd(vector, layer)
        for (where, matrix), delta in vector.restrict([layer]).deltas.items():
            side = SIDE[matrix]
            cell = (where, matrix, side)
            kept = {name: energy_by_rank(delta, basis, side) for name, basis in sites[layer].by_name.items()}
            kept["own_svd_layer"], kept["own_svd"] = (energy_by_rank(delta, best[of], side) for of in ("both", side))
            kept["own_svd_matrix"] = subspaces.singular_energies(delta).cumsum(0) / delta.double().square().sum().cpu()
            drawn = (subspaces.random_basis(width, max(ranks.grid), generator) for _ in range(random_draws))
            draws = torch.stack([energy_by_rank(delta, one, side) for one in drawn])
            kept["random"] = draws.mean(0)
            for rank in ranks.grid:
                for name, energies in kept.items():
                    spread = float(draws[:, rank - 1].std()) if name == "random" else 0.0
                    at = min(rank, len(energies)) - 1
                    rows.append((*cell, name, rank, layer, "plain", float(energies[at]), spread))
            rows += _sensitivities(cell, delta, sites, gains[where, matrix], ranks.default)
    columns = ["layer", "matrix", "side", "basis", "rank", "sae_layer", "gains", "energy_retained", "energy_sd"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(chance=table["rank"] / width)


def _sensitivities(cell: tuple[int, str, str], delta: Tensor, sites: Sites, gain: Tensor, rank: int) -> list[tuple[Any, ...]]:
    """The default rank again through the norm's gain, and for readers with the site one block earlier."""
    layer, _, side = cell
    places = {layer, max(layer - 1, 0)} if side == "reader" else {layer}
    rows = []
    for place in sorted(places):
        for name, basis in sites[place].by_name.items():
            for gains in ("norm",) if place == layer else ("plain", "norm"):
                q = basis[:, :rank] if gains == "plain" else through_gain(basis[:, :rank], gain, side, name in COVECTORS)
                kept = float(energy_by_rank(delta, q, side)[-1])
                rows.append((*cell, name, rank, place, gains, kept, 0.0))
    return rows


def scalpel(vector: TaskVector, bases: Mapping[int, Basis]) -> TaskVector:
    """The projected task vector: every matrix filtered through its own block's subspace."""
    return vector.map(lambda where, delta: project(delta, bases[where[0]], SIDE[where[1]]))


def mechanism(vector: TaskVector, sites: Sites, rank: int) -> pd.DataFrame:
    """Overlap of each side's best subspace with SAE, activation and gradient directions at the blocks a side touches.

    If updates are sums of outer products of gradients and activations, readers should lie along activations *at
    their input* (the block before) and writers along gradients at their output. One row a layer, side and basis;
    `angle` is the smallest principal angle, in degrees.
    """
    rows = []
    for layer in vector.layers:
        best = own_svd(vector, layer)
        for side, place in (("reader", layer - 1), ("writer", layer)):
            if place < 0:
                continue
            for name, basis in sites[place].by_name.items():
                cosines = subspaces.principal_cosines(best[side][:, :rank], basis[:, :rank])
                angle = float(cosines[0].acos().rad2deg())
                rows.append(dict(layer=layer, side=side, basis=name, overlap=float(cosines.square().mean()), angle=angle))
    return pd.DataFrame(rows).assign(chance=rank / next(iter(sites.values())).by_name["activation_pca"].shape[0])


def lora_start(vector: TaskVector, start: Weights, sites: Sites, rank: int, random_draws: int, seed: int) -> pd.DataFrame:
    """Do a LoRA's readers read from where its A began? One row a layer and reader; start: A as initialised, [lora_rank, d_in].

    With delta W = B A and an A that starts at random and hardly moves, readers lie at chance in every basis, whatever SAEs do.
    overlap: the share of tau's energy in the row space of that A, beside chance, lora_rank / d_in. For each basis of a site at
    this rank, `<basis>_kept` is the share of tau's energy that it keeps and `<basis>_left` the share that it still keeps once
    A's row space is taken out, beside basis_chance, rank / d_in, of the whole and of what is left. Rounding of tau lies anywhere.
    """
    rows, generator = [], torch.Generator().manual_seed(seed)
    for (layer, matrix), delta in vector.restrict(vector.layers, READERS).deltas.items():
        began, wide, width = torch.linalg.qr(start[layer, matrix].double().T)[0], delta.double(), delta.shape[1]
        rest, overlap = wide - project(wide, began, "reader"), float(energy_by_rank(wide, began, "reader")[-1])
        bases = {name: [basis[:, :rank]] for name, basis in sites[layer].by_name.items()}
        bases["random"] = [subspaces.random_basis(width, rank, generator) for _ in range(random_draws)]
        row: dict[str, Any] = dict(layer=layer, matrix=matrix, energy=float(wide.square().sum()))
        row |= dict(lora_rank=began.shape[1], overlap=overlap, chance=began.shape[1] / width, basis_chance=rank / width)
        for name, group in bases.items():
            kept, left = (fmean(float(energy_by_rank(part, q, "reader")[-1]) for q in group) for part in (wide, rest))
            row |= {f"{name}_kept": kept, f"{name}_left": left * (1 - overlap)}
        rows.append(row)
    return pd.DataFrame(rows)


def lora_told(table: pd.DataFrame | None, made: FineTune) -> str:
    """What `lora_start` says, as Markdown, or why there is no such table."""
    if table is None and made.finetuned:
        return (
            "The vector lies between two checkpoints that were given: whether a LoRA is behind it, and began where, is not known."
        )
    if table is None:
        return "The vector is of a full fine-tune, which has no A to start from, so that this cannot be the cause."
    share, chance = subspaces.lora_share(table), table["chance"].mean()
    where, said = "was drawn at random", "no basis is expected to keep more of that than chance, **whatever SAEs do**"
    if made.lora_start not in ("kaiming", "gaussian"):
        where = f"was put by {made.lora_start}"
        said = "what a basis keeps of that, it shares with the start, **not with what was learnt**"
    if share <= 0.5:
        said = "most of it lies elsewhere, where training or rounding put it (step 01), so that this is not the whole cause"
    return f"The vector is a {made.lora}: **{share:.1%}** of its readers' energy lies where A {where} before training (chance {chance:.1%}); {said}."


def directions(
    heard: Mapping[int, Heard],
    dictionaries: Mapping[int, Dictionary],
    gradients: Mapping[int, Float[Tensor, "d_model d_model"]],
    corpus_of: Sequence[int],
    kind: str,
    minimum_firing: float,
    ranks: Ranks,
    believed: Sequence[int],
) -> dict[int, Directions]:
    """The directions at each layer's output: of the features that are most specific on all tokens, of the activations on
    mathematics, and of the loss gradient (second moments by layer), as many as the largest rank. Those of features are there for
    the layers whose SAE is believed, and fewer where fewer fire.

    kind, minimum_firing: the definition of specificity, and how often a feature must fire. Raises UserError where fewer fire
    than the default rank.
    """
    sums = (one.sums[f"corpus.{layer}"] if layer in believed else None for layer, one in heard.items())
    found, count = {}, max(ranks.grid)
    for layer, features in enumerate(specificities(sums, torch.tensor(corpus_of), kind, minimum_firing, False)):
        bases: dict[str, Basis] = {}
        if features:
            firing = min(count, max(ranks.default, int(features[1].sum())))
            top, one = most_specific(*features, firing), dictionaries[layer]
            bases["sae_decoder"] = orthonormal(one.W_dec[top].cpu())
            bases["sae_encoder"] = orthonormal(one.W_enc[:, top].T.cpu())
        moments = {"activation_pca": heard[layer].covariance[layer], "gradient_pca": gradients[layer]}
        bases |= {name: principal(moment)[:, :count].contiguous() for name, moment in moments.items()}
        found[layer] = Directions(bases)
    return found


VECTORS = ("raw", "projected", "projected_rescaled", "raw_shrunk")


def vector_of(name: str, raw: TaskVector, sites: Sites, rank: int) -> TaskVector:
    """raw; projected (the scalpel); projected_rescaled (to the full energy); raw_shrunk (to the scalpel's)."""
    if name == "raw":
        return raw
    projected = scalpel(raw, {layer: sites[layer].by_name["sae_decoder"][:, :rank] for layer in raw.layers})
    if name == "projected":
        return projected
    kept, energies = projected.energies(), raw.energies()
    if name == "projected_rescaled":
        return projected * matched_scales(energies, kept)
    return raw * matched_scales(kept, energies)


def rounding_of_edits(base: Weights, raw: TaskVector, sites: Sites, rank: int) -> pd.DataFrame:
    """What a model in bfloat16 can carry of each edit: columns vector, unmoved, energy_kept, cosine."""
    rows = []
    for name in VECTORS:
        exact = vector_of(name, raw, sites, rank)
        rows.append(dict(vector=name) | survival_shares(survival(exact, rounded(base, exact, torch.bfloat16))))
    return pd.DataFrame(rows)


def energy_or_direction(
    base: LanguageModel, pool: Sequence[Batch], raw: TaskVector, sites: Sites, rank: int, seed: int
) -> pd.DataFrame:
    """Validation loss of the scalpel and its controls: did it lose energy, or direction?

    Columns variant, energy (share of the whole vector's), loss_change of the solution (nats a token; negative is better) with
    a paired interval (low, high), and the same against the variant's `rival`: for `scalpel` that is `raw_shrunk`, of the same
    energy, for `scalpel_rescaled` it is `full`. closing_change is that of the closing sentence.
    """
    every, whole = raw.layers, sum(raw.energies().values())
    names = {"full": "raw", "scalpel": "projected", "scalpel_rescaled": "projected_rescaled", "raw_shrunk": "raw_shrunk"}
    rivals = {"scalpel": "raw_shrunk", "scalpel_rescaled": "full"}
    vectors = {name: vector_of(source, raw, sites, rank) for name, source in names.items()}
    before = losses_by_document(base.model, Edit(raw, ()), pool)
    losses = {name: losses_by_document(base.model, Edit(vector, every), pool) for name, vector in vectors.items()}
    rows = []
    for name, vector in vectors.items():
        against = {"": before} | ({"_against_rival": losses[rivals[name]]} if name in rivals else {})
        row = dict(variant=name, energy=vector.energy() / whole, rival=rivals.get(name, ""))
        for end, start in against.items():
            found = bootstrap_ratio(losses[name].solution - start.solution, before.tokens, seed)
            row |= {key + end: value for key, value in zip(("loss_change", "low", "high"), found, strict=True)}
        rows.append(row | dict(closing_change=losses[name].mean("closing") - before.mean("closing")))
    return pd.DataFrame(rows)


def summary(
    splits: Mapping[str, LossSplit], rank: int, test: pd.DataFrame, control: pd.DataFrame, carried: pd.DataFrame, dtype: str
) -> str:
    """What step 03 saw, as Markdown.

    splits: of `splits_by_side` at this rank; test: of `mechanism_test`; control: losses of the scalpel and its
    controls, by column variant; carried: what bfloat16 keeps of each edit, by column vector; dtype: the rung's own.
    """
    whole, sides, change = splits["all"], test.set_index("side"), control.set_index("variant")["loss_change"]
    by_rank = ", so most is lost **by construction** of the rank" if whole.chance < 0.1 else ""
    index = f"The misalignment index (0 best, 1 random) is **{whole.index:.2f}**; beside the best subspace of each side, {splits['readers'].index:.2f} for readers and {splits['writers'].index:.2f} for writers."
    if whole.index != whole.index:
        index = "A random one keeps as much: **there is no misalignment to tell**."
    measured = "; ".join(_closer(str(side), row) for side, row in sides.iterrows())
    left: Any = carried.set_index("vector")
    return f"""
- The scalpel discards **{1 - whole.retained:.1%}** at rank {rank} (Paper: about 97 %). A random subspace discards {1 - whole.chance:.1%}{by_rank}.
- The SAE's subspace keeps {_beside_chance(whole)}. The best one of that rank for all matrices of a layer, as the scalpel has one, keeps {whole.ceiling:.1%}. {index}
- Outer products predict readers along activations and writers along gradients. Measured: {measured}.
- {_direction(control.set_index("variant"))} Scaled back to full energy it changes the loss by {change["scalpel_rescaled"]:+.2g}, the raw vector by {change["full"]:+.2g}.
- In bfloat16, {left.loc["projected", "unmoved"]:.0%} of the weights would not notice the scalpel's edit ({left.loc["raw", "unmoved"]:.0%} for the raw vector); what is left of it has {left.loc["projected", "energy_kept"]:.0%} of its energy at a cosine of {left.loc["projected", "cosine"]:.2f} ({left.loc["raw_shrunk", "cosine"]:.2f} for the raw vector shrunk to its energy). This rung computes in {dtype}.
""".strip()


def _beside_chance(split: LossSplit) -> str:
    """What is kept beside random subspaces: the ratio, and how many of their standard deviations it is off."""
    times = f"{split.retained / split.chance:.1f} times"
    if abs(split.z) >= 2:
        return f"**{times} what chance keeps**, {abs(split.z):.0f} sd {'above' if split.z > 0 else 'below'} random subspaces"
    return f"**as much as chance**, {times}: nothing that can be told from random subspaces"


def _closer(side: str, row: Any) -> str:
    """What the mechanism's test says of one side; a null result and one against the prediction are called so."""
    predicted, other = (str(row[name]).replace("_pca", "s") for name in ("predicted", "other"))
    counted = f"in {row['in_favour']} of {row['layers']} layers (p = {row['p']:.2g})"
    if row["p"] >= 0.05:
        return f"**no difference can be told** for {side}s, which lie closer to {predicted} than to {other} {counted}"
    if row["overlap_predicted"] < row["overlap_other"]:
        return f"{side}s lie **closer to {other}** than to {predicted}, and as predicted only {counted}"
    return f"{side}s lie closer to {predicted} than to {other} {counted}"


def _direction(control: pd.DataFrame) -> str:
    """Whether the scalpel lost direction or only size, from losses by variant."""
    lost, full = control.loc["scalpel"], control.loc["full"]
    verdict = "direction was lost, not only size"
    if full["high"] >= 0:
        verdict = f"the raw vector itself **lowers no loss beyond chance** ({full['low']:+.2g} to {full['high']:+.2g}), so nothing can be said of what was lost"
    elif lost["high_against_rival"] < 0:
        verdict = "no direction was lost, the scalpel does better"
    elif lost["low_against_rival"] <= 0:
        verdict = "**no loss of direction can be told** from the loss of size"
    interval = f"{lost['low_against_rival']:+.2g} to {lost['high_against_rival']:+.2g}"
    return (
        f"At equal energy the scalpel's loss on solutions is {lost['loss_change_against_rival']:+.2g} nats a token beside the raw vector's "
        f"(paired interval {interval}): {verdict}."
    )
