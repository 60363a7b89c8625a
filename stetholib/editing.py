"""Task vectors and edits: an edit is a value, applied by a context manager that always undoes itself, byte for byte.

    with edited(model, Edit(task_vector, layers=(3, 5))):
        ...                                   # theta_0 + tau in layers 3 and 5
    ...                                       # theta_0 again, the same bytes

A task vector tau = theta_1 - theta_0 holds the seven matrices of every block, in float32 (Ilharco et al., 2023), with
the algebra that makes it useful. Matrices are produced when asked for, so a vector of two checkpoints on disk never has
to fit in memory. Energy is the squared Frobenius norm. Scalpel and stethoscope differ only in the value: a projected
vector in every layer, or the raw one in a few. The unedited baseline is the empty edit through the same path.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from stetholib.models.streams import Batch, DocumentLosses, document_losses
from stetholib.models.weights import MATRICES, Checkpoint, Key, ModelError, Weights, edit_weights, weight_names
from stetholib.store.values import Lazy


def weights(checkpoint: Mapping[str, Tensor]) -> Weights:
    """The seven matrices of each block of a checkpoint, by canonical name, each read when it is asked for."""
    names = weight_names(checkpoint)
    return Lazy(names, lambda where: checkpoint[names[where]])


def shape_of(checkpoint: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """A weight's shape, without reading it where it is on disk."""
    return checkpoint.shape(name) if isinstance(checkpoint, Checkpoint) else tuple(checkpoint[name].shape)


def _described(checkpoint: Mapping[str, Tensor], name: str) -> str:
    """Shape and dtype of a weight, without reading it where it is on disk."""
    dtype = checkpoint.dtype(name) if isinstance(checkpoint, Checkpoint) else str(checkpoint[name].dtype).removeprefix("torch.")
    return f"{list(shape_of(checkpoint, name))} {dtype}"


@dataclass(frozen=True)
class TaskVector:
    """tau = theta_1 - theta_0 (Ilharco et al., 2023), one matrix [d_out, d_in] in float32 for each `(layer, matrix)`."""

    deltas: Weights

    @classmethod
    def between(cls, base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], same_dtype: bool = True) -> "TaskVector":
        """theta_1 - theta_0 of two checkpoints or state dicts, read one matrix at a time.

        Raises ModelError where names, shapes or dtypes differ: a vector between unlike models means nothing, and one
        between unlike precisions holds the rounding of one of them.
        """
        names, others = weight_names(base), weight_names(finetuned)
        if odd := sorted(set(names) ^ set(others)):
            raise ModelError(f"task vector: {odd[0][1]} of layer {odd[0][0]} is in only one of the two checkpoints")
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

    def __add__(self, other: "TaskVector") -> "TaskVector":
        if set(self.deltas) != set(other.deltas):
            raise ModelError("task vector: two vectors of different matrices cannot be added")

        def added(where: Key) -> Tensor:
            mine, theirs = self.deltas[where], other.deltas[where]
            if mine.shape != theirs.shape:
                raise ModelError(
                    f"task vector: {where} is {tuple(mine.shape)} in one vector and {tuple(theirs.shape)} in the other"
                )
            return mine + theirs

        return TaskVector(Lazy(self.deltas, added))

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self + -other

    def __mul__(self, scale: float | Mapping[Key, float]) -> "TaskVector":
        """Scaled by one number, or by one for each matrix."""
        if isinstance(scale, Mapping):
            return self.map(lambda where, delta: delta * scale[where])
        return self.map(lambda where, delta: delta * scale)

    __rmul__ = __mul__

    def __neg__(self) -> "TaskVector":
        return self * -1.0


@dataclass(frozen=True)
class Edit:
    """Add `alpha` times `vector` to some matrices of some blocks. No layers, or alpha 0, is the empty edit."""

    vector: TaskVector
    layers: tuple[int, ...]
    matrices: tuple[str, ...] = MATRICES
    alpha: float = 1.0

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return self.alpha == 0 or not self.layers or not self.matrices

    def scaled(self, delta: Tensor) -> Tensor:
        """alpha times a matrix of the vector; alpha 1, which most edits have, costs nothing."""
        return delta if self.alpha == 1 else self.alpha * delta


@contextmanager
def edited(model: nn.Module, edit: Edit) -> Iterator[nn.Module]:
    """The model with an edit applied, undone on leaving, also when leaving by an error.

    Arithmetic is in float32, whatever the model's dtype; the original bytes are kept aside and put back. Raises
    ModelError, before anything is touched, where the edit does not fit the model.
    """
    weights = edit_weights(model)
    deltas = {} if edit.is_empty else edit.vector.restrict(edit.layers, edit.matrices).deltas
    for where in deltas:
        if where not in weights:
            raise ModelError(f"edit: the model has no {where[1]} in layer {where[0]}")
    kept: dict[Key, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for where, delta in deltas.items():
                weight = weights[where]
                if delta.shape != weight.shape:
                    raise ModelError(f"edit: {where} is {tuple(weight.shape)} in the model and {tuple(delta.shape)} in the edit")
                kept[where] = weight.detach().to("cpu", copy=True)  # a GPU has no room for two of it
                weight.copy_(weight.float().add_(edit.scaled(delta.to(weight.device))))
        yield model
    finally:
        with torch.no_grad():
            for where, original in kept.items():
                weights[where].copy_(original)


def matched_scales(wanted: Mapping[Key, float], energies: Mapping[Key, float]) -> dict[Key, float]:
    """Factors that bring each matrix from its energy to the wanted one; 0 where it has none."""
    return {where: (wanted[where] / energies[where]) ** 0.5 if energies[where] else 0.0 for where in energies}


def rounded(base: Weights, vector: TaskVector, dtype: torch.dtype) -> TaskVector:
    """What is left of a vector once base + vector is stored in `dtype`: what a model of that precision can carry."""

    def kept(where: Key, delta: Tensor) -> Tensor:
        before = base[where].float()
        return (before + delta).to(dtype).float() - before.to(dtype).float()

    return vector.map(kept)


SUMMED = ["weights", "unmoved", "energy", "energy_left", "product"]


def survival(exact: TaskVector, kept: TaskVector) -> pd.DataFrame:
    """How much of a vector is left in another, e.g. after rounding: sums, one row a layer and matrix.

    weights: how many there are; unmoved: how many the kept vector leaves as they were; energy and energy_left: of the
    exact and of the kept vector; product: their inner product.
    """
    rows = []
    for (layer, matrix), before in exact.deltas.items():
        after = kept.deltas[layer, matrix]
        one, other = before.double(), after.double()
        energies = (one.square().sum(), other.square().sum(), (one * other).sum())
        rows.append((layer, matrix, before.numel(), int((after == 0).sum()), *map(float, energies)))
    return pd.DataFrame(rows, columns=["layer", "matrix", *SUMMED])


def survival_shares(sums: pd.DataFrame) -> dict[str, float]:
    """Of `survival` over all its rows: the share of weights unmoved, energy_kept (above 1 where rounding adds more
    than it takes), and the cosine of the two vectors."""
    total = sums[SUMMED].sum()
    size = (total["energy"] * total["energy_left"]) ** 0.5
    return dict(
        unmoved=total["unmoved"] / total["weights"],
        energy_kept=total["energy_left"] / total["energy"] if total["energy"] else float("nan"),
        cosine=total["product"] / size if size else float("nan"),
    )


def losses_by_document(model: nn.Module, edit: Edit, pool: Sequence[Batch]) -> DocumentLosses:
    """The losses of each document under an edit."""
    with edited(model, edit) as changed:
        return document_losses(changed, pool)
