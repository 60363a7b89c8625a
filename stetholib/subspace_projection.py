"""Step 03. What survives when SAE directions filter the task vector (the scalpel), and why so little?

A subspace of the residual stream filters a reader from the right (tau Q Q') and a writer from the left (Q Q' tau).
The energy it keeps, rho, is set beside what a random subspace of the same rank keeps (rank / d) and what the best
one keeps (`own_svd`). What is lost splits into what any subspace of that rank must lose and what this one loses by
pointing elsewhere: 1 - rho = (1 - ceiling) + (ceiling - rho).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from stetholib.errors import UserError
from stetholib.models import READERS, SIDE, WRITERS, Key
from stetholib.task_vectors import TaskVector

BASES = ("sae_decoder", "sae_encoder", "activation_pca", "gradient_pca", "own_svd", "own_svd_matrix", "random")
COVECTORS = ("sae_encoder", "gradient_pca")
Basis = Float[Tensor, "d_model rank"]


def orthonormal(directions: Float[Tensor, "n d_model"]) -> Basis:
    """Orthonormal columns whose first r span the first r directions, for every r. In float64.

    Raises ValueError where the directions are linearly dependent, since then no such basis exists.
    """
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
    """The directions as a matrix sees them behind its norm's gain D, orthonormalised anew.

    A direction v of the residual stream arrives at a reader as D v and leaves a writer as D^-1 v; a covector
    transforms the other way. Never an oblique projector.
    """
    scale = gain.double() if (side == "reader") != covector else 1 / gain.double()
    return orthonormal((basis * scale.to(basis.device).unsqueeze(1)).T)


def second_moment(vector: TaskVector, layer: int, side: str) -> Float[Tensor, "d_model d_model"]:
    """Sum of tau' tau over a block's readers, or of tau tau' over its writers: what `own_svd` diagonalises."""
    parts = []
    for matrix in READERS if side == "reader" else WRITERS:
        delta = vector.deltas[layer, matrix].double()
        parts.append(delta.T @ delta if side == "reader" else delta @ delta.T)
    return torch.stack(parts).sum(0).cpu()


def singular_energies(delta: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " rank"]:
    """Squared singular values, largest first, from the smaller Gram matrix: a decomposition of the whole takes hours."""
    wide = delta.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cpu()


def own_svd(vector: TaskVector, layer: int) -> dict[str, Basis]:
    """The best single subspace for a block's readers, and for its writers: the ceiling, by side."""
    return {side: principal(second_moment(vector, layer, side)) for side in ("reader", "writer")}


@dataclass(frozen=True)
class Ranks:
    """The default rank and the grid around it, from shares of the width; at least 1 and at most the width."""

    default: int
    grid: tuple[int, ...]

    @classmethod
    def of(cls, width: int, share: float, shares: Sequence[float]) -> "Ranks":
        """Round shares of the width to ranks."""
        one = lambda s: min(width, max(1, round(s * width)))  # noqa: E731
        return cls(one(share), tuple(sorted({one(s) for s in (*shares, share)})))


@dataclass(frozen=True)
class Directions:
    """Where the bases of one site come from: by name, an orthonormal basis of the residual stream after that block."""

    by_name: Mapping[str, Basis]


def measure(
    vector: TaskVector,
    sites: Mapping[int, Directions],
    gains: Mapping[Key, Float[Tensor, " d_model"]],
    ranks: Ranks,
    random_draws: int,
    seed: int,
    watch: Callable[[Sequence[int]], Sequence[int]] = list,
) -> pd.DataFrame:
    """The table of step 03: energy retained by layer, matrix, basis and rank, with both sensitivities at the default rank.

    sites: the directions at each block's output. Random subspaces are drawn anew for every layer and matrix.
    """
    rows = []
    width = next(iter(gains.values())).shape[0]
    generator = torch.Generator().manual_seed(seed)
    for layer in watch(vector.layers):
        best = own_svd(vector, layer)
        for (where, matrix), delta in vector.restrict([layer]).deltas.items():
            side = SIDE[matrix]
            cell = dict(layer=where, matrix=matrix, side=side)
            kept = {name: energy_by_rank(delta, basis, side) for name, basis in sites[layer].by_name.items()}
            kept["own_svd"] = energy_by_rank(delta, best[side], side)
            kept["own_svd_matrix"] = singular_energies(delta).cumsum(0) / delta.double().square().sum().cpu()
            draws = torch.stack(
                [energy_by_rank(delta, random_basis(width, max(ranks.grid), generator), side) for _ in range(random_draws)]
            )
            kept["random"] = draws.mean(0)
            for rank in ranks.grid:
                for name, energies in kept.items():
                    spread = float(draws[:, rank - 1].std()) if name == "random" else 0.0
                    at = min(rank, len(energies)) - 1
                    rows.append(_row(cell, name, rank, layer, "plain", float(energies[at]), spread, width))
            rows += _sensitivities(cell, delta, sites, gains[where, matrix], ranks.default, width)
    return pd.DataFrame(rows)


def _sensitivities(
    cell: Mapping[str, object],
    delta: Tensor,
    sites: Mapping[int, Directions],
    gain: Tensor,
    rank: int,
    width: int,
) -> list[dict[str, object]]:
    """The default rank again through the norm's gain, and for readers with the site one block earlier."""
    layer, side = cell["layer"], cell["side"]
    places = {layer, max(layer - 1, 0)} if side == "reader" else {layer}
    rows = []
    for place in sorted(places):
        for name, basis in sites[place].by_name.items():
            for gains in ("plain", "norm"):
                if place == layer and gains == "plain":
                    continue
                q = basis[:, :rank]
                if gains == "norm":
                    q = through_gain(q, gain, side, name in COVECTORS)
                kept = float(energy_by_rank(delta, q, side)[-1])
                rows.append(_row(cell, name, rank, place, gains, kept, 0.0, width))
    return rows


def _row(
    cell: Mapping[str, object], basis: str, rank: int, site: int, gains: str, kept: float, spread: float, width: int
) -> dict[str, object]:
    return dict(
        cell, basis=basis, rank=rank, sae_layer=site, gains=gains, energy_retained=kept, energy_sd=spread, chance=rank / width
    )


def scalpel(vector: TaskVector, bases: Mapping[int, Basis]) -> TaskVector:
    """The projected task vector: every matrix filtered through its own block's subspace."""
    return vector.map(lambda where, delta: project(delta, bases[where[0]], SIDE[where[1]]))


def pooled(table: pd.DataFrame, energies: Mapping[Key, float], by: Sequence[str] = ()) -> pd.DataFrame:
    """Energy retained over many matrices, each weighing by its energy; grouped by basis, rank and `by`."""
    part = table.assign(energy=[energies[layer, matrix] for layer, matrix in zip(table["layer"], table["matrix"], strict=True)])
    part["kept"] = part["energy"] * part["energy_retained"]
    grouped = part.groupby(["basis", "rank", *by], sort=True)
    pooled_table = grouped[["kept", "energy"]].sum()
    pooled_table["energy_retained"] = pooled_table["kept"] / pooled_table["energy"]
    pooled_table["chance"] = grouped["chance"].first()
    return pooled_table.drop(columns=["kept", "energy"]).reset_index()


def default_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the default definition: the block's own site, plain projections."""
    return table[(table["sae_layer"] == table["layer"]) & (table["gains"] == "plain")]


@dataclass(frozen=True)
class LossSplit:
    """What a projection loses, split: `rank_budget` (no subspace of that rank could keep it) and `misalignment`."""

    retained: float
    ceiling: float
    chance: float

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


def split_loss(
    table: pd.DataFrame, energies: Mapping[Key, float], rank: int, basis: str = "sae_decoder", **where: str
) -> LossSplit:
    """The split of one basis at one rank, pooled over matrices; `side="reader"` or `matrix="q"` narrows it."""
    rows = default_rows(table)
    rows = rows[(rows["rank"] == rank) & (rows["basis"].isin([basis, "own_svd"]))]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    kept = pooled(rows, energies).set_index("basis")
    return LossSplit(kept.loc[basis, "energy_retained"], kept.loc["own_svd", "energy_retained"], kept.loc[basis, "chance"])


def principal_cosines(one: Basis, other: Basis) -> Float[Tensor, " rank"]:
    """Cosines of the principal angles between two subspaces, largest first.

    Their mean square is the overlap: 1 for the same subspace, rank / d for a random pair.
    """
    return torch.linalg.svdvals(one.double().T @ other.double()).clamp(0, 1)


def mechanism(vector: TaskVector, sites: Mapping[int, Directions], rank: int) -> pd.DataFrame:
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
                cosines = principal_cosines(best[side][:, :rank], basis[:, :rank])
                angle = float(cosines[0].acos().rad2deg())
                rows.append(dict(layer=layer, side=side, basis=name, overlap=float(cosines.square().mean()), angle=angle))
    table = pd.DataFrame(rows)
    table["chance"] = rank / next(iter(sites.values())).by_name["sae_decoder"].shape[0]
    return table


PREDICTED = {"reader": ("activation_pca", "gradient_pca"), "writer": ("gradient_pca", "activation_pca")}


def mechanism_test(table: pd.DataFrame) -> pd.DataFrame:
    """Does each side lie closer to where outer products put it? One row a side: Wilcoxon's signed ranks over layers.

    Columns predicted and other (the two bases), their mean overlaps, in how many of the layers the predicted one is
    larger, and the two-sided p.
    """
    rows = []
    for side, pair in PREDICTED.items():
        wide = table[table["side"] == side].pivot(index="layer", columns="basis", values="overlap")
        one, other = (wide[name].to_numpy() for name in pair)
        p = float(stats.wilcoxon(one, other).pvalue) if (one != other).any() else 1.0
        rows.append(
            dict(
                side=side,
                predicted=pair[0],
                other=pair[1],
                overlap_predicted=one.mean(),
                overlap_other=other.mean(),
                in_favour=int((one > other).sum()),
                layers=len(one),
                p=p,
            )
        )
    return pd.DataFrame(rows)
