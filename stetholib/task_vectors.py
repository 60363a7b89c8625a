"""Step 01. What did the fine-tune change, and where?

A task vector tau = theta_1 - theta_0 over the seven matrices of every block, in float32 (Ilharco et al., 2023), with
the algebra that makes it useful: sums, differences, scales, restrictions and maps. Matrices are produced when asked
for, so a vector of two checkpoints on disk never has to fit in memory. Energy is the squared Frobenius norm.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.sparse.linalg import svds
from torch import Tensor

from stetholib.models import MATRICES, SIDE, Checkpoint, Key, ModelError, weight_names

TIED = {"lm_head.weight"}  # where it is a copy of the embeddings, some checkpoints hold it and some do not
Weights = Mapping[Key, Float[Tensor, "d_out d_in"]]


class Lazy(Mapping[Key, Tensor]):
    """A mapping whose values are computed each time they are asked for."""

    def __init__(self, keys: Iterable[Key], value: Callable[[Key], Tensor]) -> None:
        """keys: all of them, in order; value: the matrix of one key."""
        self._keys, self._value = dict.fromkeys(keys), value

    def __getitem__(self, where: Key) -> Tensor:
        if where not in self._keys:
            raise KeyError(where)
        return self._value(where)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def weights(checkpoint: Mapping[str, Tensor]) -> Weights:
    """The seven matrices of each block of a checkpoint, by canonical name, each read when it is asked for."""
    names = weight_names(checkpoint)
    return Lazy(names, lambda where: checkpoint[names[where]])


def _shape(checkpoint: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """A weight's shape, without reading it where it is on disk."""
    return checkpoint.shape(name) if isinstance(checkpoint, Checkpoint) else tuple(checkpoint[name].shape)


def _described(checkpoint: Mapping[str, Tensor], name: str) -> str:
    """Shape and dtype of a weight, without reading it where it is on disk."""
    on_disk = isinstance(checkpoint, Checkpoint)
    dtype = checkpoint.dtype(name) if on_disk else str(checkpoint[name].dtype).removeprefix("torch.")
    return f"{list(_shape(checkpoint, name))} {dtype}"


@dataclass(frozen=True)
class TaskVector:
    """A change of weights, one matrix [d_out, d_in] in float32 for each `(layer, matrix)`."""

    deltas: Weights

    @classmethod
    def between(cls, base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], same_dtype: bool = True) -> "TaskVector":
        """theta_1 - theta_0 of two checkpoints or state dicts, read one matrix at a time.

        Raises ModelError where names, shapes or dtypes differ: a vector between unlike models means nothing, and one
        between unlike precisions holds the rounding of one of them.
        """
        names, others = weight_names(base), weight_names(finetuned)
        if set(names) != set(others):
            odd = sorted(set(names) ^ set(others))[0]
            raise ModelError(f"task vector: {odd[1]} of layer {odd[0]} is in only one of the two checkpoints")
        for where, name in names.items():
            before, after = _described(base, name), _described(finetuned, others[where])
            if before != after and (same_dtype or before.rsplit(" ", 1)[0] != after.rsplit(" ", 1)[0]):
                raise ModelError(
                    f"task vector: {name} is {before} in the base and {after} in the fine-tune; both must be of one model and precision"
                )

        def difference(where: Key) -> Tensor:
            delta = finetuned[others[where]].float() - base[names[where]].float()
            if not torch.isfinite(delta).all():
                raise ModelError(f"task vector: {names[where]} holds NaN or Inf in one of the two checkpoints")
            return delta

        return cls(Lazy(names, difference))

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks it touches, in order."""
        return tuple(sorted({layer for layer, _ in self.deltas}))

    def map(self, change: Callable[[Key, Tensor], Tensor]) -> "TaskVector":
        """A task vector whose every matrix is `change(key, matrix)`."""
        return TaskVector(Lazy(self.deltas, lambda where: change(where, self.deltas[where])))

    def restrict(self, layers: Iterable[int], matrices: Iterable[str] = MATRICES) -> "TaskVector":
        """Only these blocks and matrices; raises where a block is not there."""
        layers, matrices = tuple(layers), tuple(matrices)
        if absent := sorted(set(layers) - set(self.layers)):
            raise ModelError(f"task vector: it has no layer {absent[0]}, only {self.layers[0]} to {self.layers[-1]}")
        keys = [where for where in self.deltas if where[0] in layers and where[1] in matrices]
        return TaskVector(Lazy(keys, lambda where: self.deltas[where]))

    def in_memory(self) -> "TaskVector":
        """The same, with every matrix computed once and held."""
        return TaskVector(dict(self.deltas.items()))

    def energies(self) -> dict[Key, float]:
        """Squared Frobenius norm of each matrix, summed in float64."""
        return {where: float(delta.double().square().sum()) for where, delta in self.deltas.items()}

    def energy(self) -> float:
        """Squared Frobenius norm of the whole."""
        return sum(self.energies().values())

    def _with(self, other: "TaskVector", sign: float) -> "TaskVector":
        if set(self.deltas) != set(other.deltas):
            raise ModelError("task vector: two vectors of different matrices cannot be added")

        def combined(where: Key) -> Tensor:
            mine, theirs = self.deltas[where], other.deltas[where]
            if mine.shape != theirs.shape:
                raise ModelError(
                    f"task vector: {where} is {tuple(mine.shape)} in one vector and {tuple(theirs.shape)} in the other"
                )
            return mine + sign * theirs

        return TaskVector(Lazy(self.deltas, combined))

    def __add__(self, other: "TaskVector") -> "TaskVector":
        return self._with(other, 1.0)

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self._with(other, -1.0)

    def __mul__(self, scale: float | Mapping[Key, float]) -> "TaskVector":
        """Scaled by one number, or by one for each matrix."""
        if isinstance(scale, Mapping):
            return self.map(lambda where, delta: delta * scale[where])
        return self.map(lambda where, delta: delta * scale)

    __rmul__ = __mul__

    def __neg__(self) -> "TaskVector":
        return self * -1.0


def stable_rank(matrix: Float[Tensor, "d_out d_in"]) -> float:
    """Energy over the squared spectral norm: how many directions the energy is spread over; 0 for a zero matrix.

    The norm is found by Lanczos iterations, since a whole decomposition of a real model's matrices takes hours.
    """
    wide = matrix.double().cpu()
    energy = float(wide.square().sum())
    if not energy:
        return 0.0
    small = min(wide.shape)
    top = (
        float(torch.linalg.matrix_norm(wide, 2))
        if small < 16
        else float(svds(wide.numpy(), k=1, v0=np.ones(small), return_singular_vectors=False)[0])
    )
    return energy / top**2


def measure(base: Weights, vector: TaskVector) -> pd.DataFrame:
    """The table of step 01: one row a layer and matrix.

    base_norm, delta_norm: Frobenius norms; relative: their ratio; energy_share: of the whole vector's energy.
    """
    total = vector.energy()
    rows = []
    for (layer, matrix), delta in vector.deltas.items():
        before, change = base[layer, matrix].double().norm().item(), delta.double().norm().item()
        rows.append(
            dict(
                layer=layer,
                matrix=matrix,
                side=SIDE[matrix],
                base_norm=before,
                delta_norm=change,
                relative=change / before if before else float("nan"),
                energy_share=change**2 / total if total else 0.0,
                stable_rank=stable_rank(delta),
            )
        )
    return pd.DataFrame(rows)


def rounded(base: Weights, vector: TaskVector, dtype: torch.dtype) -> TaskVector:
    """What is left of a vector once base + vector is stored in `dtype`: what a model of that precision can carry."""

    def kept(where: Key, delta: Tensor) -> Tensor:
        before = base[where].float()
        return (before + delta).to(dtype).float() - before.to(dtype).float()

    return vector.map(kept)


def survival(exact: TaskVector, kept: TaskVector) -> pd.DataFrame:
    """How much of a vector is left in another, e.g. after rounding: sums, one row a layer and matrix.

    weights: how many there are; unmoved: how many the kept vector leaves as they were; energy and energy_left: of the
    exact and of the kept vector; product: their inner product.
    """
    rows = []
    for (layer, matrix), before in exact.deltas.items():
        after = kept.deltas[layer, matrix]
        one, other = before.double(), after.double()
        rows.append(
            dict(
                layer=layer,
                matrix=matrix,
                weights=before.numel(),
                unmoved=int((after == 0).sum()),
                energy=float(one.square().sum()),
                energy_left=float(other.square().sum()),
                product=float((one * other).sum()),
            )
        )
    return pd.DataFrame(rows)


def survival_shares(sums: pd.DataFrame) -> dict[str, float]:
    """Of `survival` over all its rows: the share of weights unmoved, energy_kept (above 1 where rounding adds more
    than it takes), and the cosine of the two vectors."""
    total = sums[["weights", "unmoved", "energy", "energy_left", "product"]].sum()
    size = (total["energy"] * total["energy_left"]) ** 0.5
    return dict(
        unmoved=total["unmoved"] / total["weights"],
        energy_kept=total["energy_left"] / total["energy"] if total["energy"] else float("nan"),
        cosine=total["product"] / size if size else float("nan"),
    )


def check_same_tensors(base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> None:
    """Raise ModelError where the two do not have the same tensors in the same shapes, tied copies aside."""
    if odd := sorted((set(base) ^ set(finetuned)) - TIED):
        raise ModelError(f"task vector: {odd[0]} is in only one of the two checkpoints")
    for name in sorted(set(base) & set(finetuned)):
        if (before := _shape(base, name)) != (after := _shape(finetuned, name)):
            raise ModelError(
                f"task vector: {name} is {before} in the base and {after} in the fine-tune; both must be of one model"
            )


def energy_elsewhere(base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> dict[str, float]:
    """Energy of the change outside the seven matrices (embeddings, norms, vision tower), by kind.

    Raises ModelError where the two do not have the same tensors, tied copies aside.
    """
    check_same_tensors(base, finetuned)
    edited, energies = set(weight_names(base).values()), {"embeddings": 0.0, "norms": 0.0, "other": 0.0}
    for name in sorted((set(base) & set(finetuned)) - edited - _copies(base)):
        kind = "embeddings" if "embed" in name or name in TIED else "norms" if "norm" in name else "other"
        for before, after in zip(_pieces(base, name), _pieces(finetuned, name), strict=True):
            energies[kind] += float((after.double() - before.double()).square().sum())
    return energies


def _copies(checkpoint: Mapping[str, Tensor]) -> set[str]:
    """Heads that are the embeddings again."""
    embeddings = [name for name in checkpoint if name.endswith("embed_tokens.weight")]
    heads = [name for name in TIED & set(checkpoint) if embeddings]
    return {name for name in heads if torch.equal(checkpoint[name], checkpoint[embeddings[0]])}


def _pieces(checkpoint: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """A tensor in parts small enough that float64 copies of them cost little memory, read one by one from a disk."""
    on_disk, shape = isinstance(checkpoint, Checkpoint), _shape(checkpoint, name)
    if not shape:
        yield checkpoint[name]
        return
    step = max(1, 2**22 // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield checkpoint.rows(name, start, start + step) if on_disk else checkpoint[name][start : start + step]
