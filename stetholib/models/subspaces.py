"""Subspaces of the residual stream: bases, projections, and the energy that a subspace keeps of a matrix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from stetholib.errors import UserError
from stetholib.models.weights import MATRICES, Key

Basis = Float[Tensor, "d_model rank"]


def orthonormal(directions: Float[Tensor, "n d_model"]) -> Basis:
    """Orthonormal columns whose first r span the first r directions, for every r. In float64. Raises ValueError where the
    directions are linearly dependent, since then no such basis exists."""
    if directions.shape[0] > directions.shape[1]:
        raise UserError(
            f"projection: rank {directions.shape[0]} is above the width {directions.shape[1]}; lower projection.rank_shares"
        )
    q, r = torch.linalg.qr(directions.double().T)
    spread = r.diagonal().abs()
    if len(spread) and spread.min() <= 1e-10 * spread.max():
        raise UserError("projection: the directions are linearly dependent; take fewer of them")
    return q


def principal(second_moment: Float[Tensor, "d_model d_model"]) -> Basis:
    """Eigenvectors of a symmetric matrix, largest eigenvalue first."""
    return torch.linalg.eigh(second_moment.double()).eigenvectors.flip(1)


def random_basis(width: int, rank: int, generator: torch.Generator) -> Basis:
    """A subspace drawn uniformly: the orthonormalised columns of a Gaussian matrix."""
    return torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))[0]


def project(delta: Float[Tensor, "d_out d_in"], basis: Basis, side: str) -> Float[Tensor, "d_out d_in"]:
    """Q Q' tau for a writer, tau Q Q' for a reader; in float64, returned in the matrix's dtype."""
    q, wide = basis.to(delta.device, torch.float64), delta.double()
    kept = q @ (q.T @ wide) if side == "writer" else (wide @ q) @ q.T
    return kept.to(delta.dtype)


def energy_by_rank(delta: Float[Tensor, "d_out d_in"], basis: Basis, side: str) -> Float[Tensor, " rank"]:
    """Share of the energy kept by the first 1, 2, ..., r columns of a basis; between 0 and 1."""
    wide, q = delta.double(), basis.to(delta.device, torch.float64)
    coordinates = q.T @ wide if side == "writer" else (wide @ q).T
    total = wide.square().sum()
    return (coordinates.square().sum(1).cumsum(0) / total if total else torch.zeros(q.shape[1], dtype=torch.float64)).cpu()


def through_gain(basis: Basis, gain: Float[Tensor, " d_model"], side: str, covector: bool) -> Basis:
    """The directions as a matrix sees them behind its norm's gain D, orthonormalised anew. A direction v of the residual stream
    arrives at a reader as D v and leaves a writer as D^-1 v; a covector transforms the other way. Never an oblique projector."""
    scale = gain.double() if (side == "reader") != covector else 1 / gain.double()
    return orthonormal((basis * scale.to(basis.device).unsqueeze(1)).T)


def singular_energies(delta: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " rank"]:
    """Squared singular values, largest first, from the smaller Gram matrix: a decomposition of the whole takes hours."""
    wide = delta.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cpu()


def outside_principal(delta: Float[Tensor, "d_out d_in"], weight: Float[Tensor, "d_out d_in"], share: float = 0.5) -> float:
    """Energy of a change outside U_k ... V_k', the weight's principal subspaces: the fewest singular directions, on both sides, that
    hold this share of its energy. From the smaller Gram matrix, in float64; nothing is inside where the weight is zero."""
    wide, change = (one.double() if one.shape[0] <= one.shape[1] else one.double().T for one in (weight, delta))
    values, u = torch.linalg.eigh(wide @ wide.T)
    energies = values.flip(0).clamp(min=0)
    k = 1 + int((energies.cumsum(0) < share * energies.sum()).sum())
    if not energies[0]:
        return float(change.square().sum())
    u = u.flip(1)[:, :k]
    v = wide.T @ u / energies[:k].sqrt()
    return float(change.square().sum() - (u.T @ change @ v).square().sum())


def principal_cosines(one: Basis, other: Basis) -> Float[Tensor, " rank"]:
    """Cosines of the principal angles between two subspaces, largest first. Their mean square is the overlap: 1 for the same
    subspace, rank / d for a random pair."""
    return torch.linalg.svdvals(one.double().T @ other.double()).clamp(0, 1)


def pooled(table: pd.DataFrame, energies: Mapping[Key, float], by: Sequence[str] = ()) -> pd.DataFrame:
    """Energy retained over many matrices, each weighing by its energy; grouped by basis, rank and `by`.

    energy_sd is of the pooled energy over draws of random subspaces: at most so much, since a layer's matrices are taken to
    move together, as they would in one subspace a layer, which is what the scalpel has; layers are independent."""
    part = table.assign(energy=[energies[layer, matrix] for layer, matrix in zip(table["layer"], table["matrix"], strict=True)])
    part["kept"], part["spread"] = part["energy"] * part["energy_retained"], part["energy"] * part["energy_sd"]
    keys = ["basis", "rank", *by]
    grouped, a_layer = part.groupby(keys), part.groupby([*keys, "layer"])["spread"].sum()
    energy, spread = grouped["energy"].sum(), (a_layer**2).groupby(level=keys).sum() ** 0.5
    found = dict(energy_retained=grouped["kept"].sum() / energy, energy_sd=spread / energy, chance=grouped["chance"].first())
    return pd.DataFrame(found).reset_index()


def default_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the default definition: the block's own site, plain projections."""
    return table[(table["sae_layer"] == table["layer"]) & (table["gains"] == "plain")]


@dataclass(frozen=True)
class LossSplit:
    """What a projection loses, split: `rank_budget` (no subspace of that rank could keep it) and `misalignment`. chance,
    chance_sd: what random subspaces keep, pooled, and its standard deviation over draws."""

    retained: float
    ceiling: float
    chance: float
    chance_sd: float

    @property
    def rank_budget(self) -> float:
        """1 - ceiling."""
        return 1 - self.ceiling

    @property
    def misalignment(self) -> float:
        """ceiling - retained."""
        return self.ceiling - self.retained

    @property
    def index(self) -> float:
        """0 for the best subspace of this rank, 1 for a random one; NaN where the two keep the same."""
        room = self.ceiling - self.chance
        return self.misalignment / room if room > 1e-12 else float("nan")

    @property
    def z(self) -> float:
        """Standard deviations by which more is kept than by random subspaces; NaN where these all keep the same."""
        return (self.retained - self.chance) / self.chance_sd if self.chance_sd > 1e-12 else float("nan")


def split_loss(table: pd.DataFrame, energies: Mapping[Key, float], rank: int, side: str | None = None) -> LossSplit:
    """The scalpel's split at one rank, pooled over matrices, of one side or of both. The ceiling is in the scalpel's own class:
    one subspace a layer for all its matrices, and one for those of a side."""
    rows = default_rows(table)
    rows = rows[(rows["rank"] == rank) & ((rows["side"] == side) | (side is None))]
    kept = pooled(rows, energies).set_index("basis")
    retained, ceiling = kept["energy_retained"], "own_svd" if side else "own_svd_layer"
    ends = retained["sae_decoder"], retained[ceiling], kept["chance"]["sae_decoder"], kept["energy_sd"]["random"]
    return LossSplit(*(float(end) for end in ends))


BASES = ("sae_decoder", "sae_encoder", "activation_pca", "gradient_pca", "own_svd_layer", "own_svd", "own_svd_matrix", "random")


@dataclass(frozen=True)
class Ranks:
    """The default rank and the grid around it, from shares of the width; at least 1 and at most the width."""

    default: int
    grid: tuple[int, ...]

    @classmethod
    def of(cls, width: int, share: float, shares: Sequence[float]) -> "Ranks":
        """Round shares of the width to ranks."""
        ranks = {s: min(width, max(1, round(s * width))) for s in (*shares, share)}
        return cls(ranks[share], tuple(sorted(set(ranks.values()))))


def invariants(delta: Float[Tensor, "d_out d_in"], basis: Basis, side: str) -> dict[str, float]:
    """What must hold of any projection: the whole space keeps everything, and a subspace nothing of what it dropped."""
    whole = torch.eye(basis.shape[0], dtype=torch.float64)
    dropped = delta - project(delta, basis, side)
    return {
        "the whole space keeps": float(energy_by_rank(delta, whole, side)[-1]),
        "the subspace keeps of what it dropped": float(energy_by_rank(dropped, basis, side)[-1]),
    }


def kept_by_side(table: pd.DataFrame, energies: Mapping[Key, float]) -> dict[str, pd.DataFrame]:
    """The default rows pooled over the readers, and over the writers: side -> table by basis and rank."""
    return {str(side): pooled(rows, energies) for side, rows in default_rows(table).groupby("side")}


def kept_by_matrix(table: pd.DataFrame, energies: Mapping[Key, float], rank: int) -> pd.DataFrame:
    """Energy retained at one rank: bases down, the seven matrices across, chance last."""
    rows = default_rows(table)
    rows = pooled(rows[rows["rank"] == rank], energies, by=["matrix"])
    wide = rows.pivot(index="basis", columns="matrix", values="energy_retained")
    return wide.loc[list(BASES), list(MATRICES)].assign(chance=rows["chance"].iloc[0])


def kept_by_definition(table: pd.DataFrame, rank: int) -> pd.DataFrame:
    """Mean energy retained under each definition of the scalpel: sides and sites down, gains across."""
    rows = table[(table["rank"] == rank) & (table["basis"] == "sae_decoder")]
    site = (rows["sae_layer"] == rows["layer"]).map({True: "own block", False: "block before"})
    return rows.assign(site=site).groupby(["side", "site", "gains"])["energy_retained"].mean().unstack()


def splits_by_side(table: pd.DataFrame, energies: Mapping[Key, float], rank: int) -> dict[str, LossSplit]:
    """The scalpel's split of the loss at one rank: over `all` matrices, over `readers` and over `writers`."""
    named = {"all": None, "readers": "reader", "writers": "writer"}
    return {name: split_loss(table, energies, rank, side) for name, side in named.items()}


def lora_share(table: pd.DataFrame) -> float:
    """Of `lora_start`: the share of all readers' energy that lies where their A began."""
    return float((table["energy"] * table["overlap"]).sum() / table["energy"].sum())


def lora_means(table: pd.DataFrame) -> pd.DataFrame:
    """Of `lora_start` over all readers, each weighing by its energy, one row a basis: the share it keeps of the whole and, once
    where A began is taken out, of the rest (NaN where that is nothing), beside chance for both."""
    weights, rest = table["energy"] / table["energy"].sum(), 1 - lora_share(table)
    names = [name.removesuffix("_kept") for name in map(str, table) if name.endswith("_kept")]
    rows = {name: [(weights * table[f"{name}_{part}"]).sum() for part in ("kept", "left")] for name in names}
    found = pd.DataFrame.from_dict(rows, orient="index", columns=["kept", "kept_of_rest"]).rename_axis("basis")
    found["kept_of_rest"] = found["kept_of_rest"] / rest if rest > 1e-9 else float("nan")
    return found.assign(chance=table["basis_chance"].iloc[0])


PREDICTED = {"reader": ("activation_pca", "gradient_pca"), "writer": ("gradient_pca", "activation_pca")}


def mechanism_test(table: pd.DataFrame) -> pd.DataFrame:
    """Does each side lie closer to where outer products put it? One row a side: Wilcoxon's signed ranks over layers.

    Columns predicted and other (the two bases), their mean overlaps, in how many of the layers the predicted one is
    larger, and the two-sided p."""
    rows = []
    for side, pair in PREDICTED.items():
        wide = table[table["side"] == side].pivot(index="layer", columns="basis", values="overlap")
        one, other = (wide[name].to_numpy() for name in pair)
        p = float(stats.wilcoxon(one, other).pvalue) if (one != other).any() else 1.0
        row = dict(side=side, predicted=pair[0], other=pair[1], overlap_predicted=one.mean(), overlap_other=other.mean())
        rows.append(row | dict(in_favour=int((one > other).sum()), layers=len(one), p=p))
    return pd.DataFrame(rows)
