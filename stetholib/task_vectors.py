"""Step 01. What did the fine-tune change, and where?

The task vector and its algebra are in `editing`; here is what is measured of it, and of what changed beside it.
"""

from collections.abc import Iterator, Mapping
from math import nan, prod

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.sparse.linalg import svds
from torch import Tensor

from stetholib.editing import TaskVector, rounded, shape_of, survival, survival_shares
from stetholib.models.loading import check_stored
from stetholib.models.weights import READERS, SIDE, WRITERS, Checkpoint, ModelError, Weights, weight_names

TIED = {"lm_head.weight"}  # where it is a copy of the embeddings, some checkpoints hold it and some do not


def stable_rank(matrix: Float[Tensor, "d_out d_in"]) -> float:
    """Energy over the squared spectral norm: how many directions the energy is spread over; 0 for a zero matrix. The norm is
    found by Lanczos iterations, since a whole decomposition of a real model's matrices takes hours."""
    wide = matrix.double().cpu()
    energy = float(wide.square().sum())
    if not energy:
        return 0.0
    small = min(wide.shape)
    if small < 16:
        return energy / float(torch.linalg.matrix_norm(wide, 2)) ** 2
    return energy / float(svds(wide.numpy(), k=1, v0=np.ones(small), return_singular_vectors=False)[0]) ** 2


def measure(base: Weights, vector: TaskVector) -> pd.DataFrame:
    """The table of step 01: one row a layer and matrix. base_norm, delta_norm: Frobenius norms; relative: their ratio;
    energy_share: of the whole vector's energy."""
    total = vector.energy()
    rows = []
    for (layer, matrix), delta in vector.deltas.items():
        before, change = base[layer, matrix].double().norm().item(), delta.double().norm().item()
        row = dict(layer=layer, matrix=matrix, side=SIDE[matrix], base_norm=before, delta_norm=change)
        row |= dict(relative=change / before if before else nan, energy_share=change**2 / total if total else 0.0)
        rows.append(row | dict(stable_rank=stable_rank(delta)))
    return pd.DataFrame(rows)


def check_same_tensors(base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> None:
    """Raise ModelError where the two do not have the same tensors in the same shapes, tied copies aside."""
    if odd := sorted((set(base) ^ set(finetuned)) - TIED):
        raise ModelError(f"task vector: {odd[0]} is in only one of the two checkpoints")
    for name in sorted(set(base) & set(finetuned)):
        if (before := shape_of(base, name)) != (after := shape_of(finetuned, name)):
            raise ModelError(
                f"task vector: {name} is {before} in the base and {after} in the fine-tune; both must be of one model"
            )


def energy_elsewhere(base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> dict[str, float]:
    """Energy of the change outside the seven matrices (embeddings, norms, vision tower), by kind. Raises ModelError where the two
    do not have the same tensors, tied copies aside."""
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
    shape = shape_of(checkpoint, name)
    if not shape:
        yield checkpoint[name]
        return
    step = max(1, 2**22 // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        stop = start + step
        yield checkpoint.rows(name, start, stop) if isinstance(checkpoint, Checkpoint) else checkpoint[name][start:stop]


def rounding(base: Weights, vector: TaskVector, stored: pd.DataFrame | None, dtype: str) -> pd.DataFrame:
    """What precision can carry of a change: columns change, stored_in, unmoved, energy_kept, cosine. stored: `survival` of the
    exact fine-tune after it was stored in `dtype`, where it was made here."""
    rows = [] if stored is None else [dict(change="fine-tune, as trained", stored_in=dtype) | survival_shares(stored)]
    left = survival(vector, rounded(base, vector, torch.bfloat16))
    return pd.DataFrame([*rows, dict(change="task vector", stored_in="bfloat16") | survival_shares(left)])


def difference(base: Checkpoint, finetuned: Checkpoint, same_dtype: bool) -> TaskVector:
    """tau = theta_1 - theta_0 of two checkpoints of one model; held in memory where it fits in a gibibyte. Raises ModelError
    where the two are not of one model, or are the same."""
    for one in (base, finetuned):
        check_stored(one)
    check_same_tensors(base, finetuned)
    vector = TaskVector.between(base, finetuned, same_dtype)
    if not any(delta.any() for delta in vector.deltas.values()):
        raise ModelError("task vector: the two models are the same; mend finetune.finetuned, or train for longer")
    size = 4 * sum(prod(base.shape(name)) for name in weight_names(base).values())
    return vector.in_memory() if size < 2**30 else vector


def algebra(vector: TaskVector) -> dict[str, float]:
    """What energies must do if the algebra holds: four times as much at twice the scale, none of a difference with
    itself, and the whole again from the readers' and writers' parts."""
    energy, halves = vector.energy(), (vector.restrict(vector.layers, part) for part in (READERS, WRITERS))
    return {
        "energy of tau": energy,
        "energy of 2 tau / energy of tau": (2 * vector).energy() / energy if energy else nan,
        "energy of tau - tau": (vector - vector).energy(),
        "energy of the readers' and writers' parts": sum(half.energy() for half in halves),
    }


def summary(table: pd.DataFrame, rounding: pd.DataFrame, restored: Mapping[str, bool]) -> str:
    """What step 01 saw, as Markdown. table: of `measure`; rounding: one row a precision, the last for the task vector in
    bfloat16; restored: what must hold of an edit that is applied and undone, each sentence with whether it does."""
    broken = [sentence for sentence, holds in restored.items() if not holds]
    undone = "The base plus the vector is the fine-tuned model, scale 0 is the base, and undoing restores every byte: **True**."
    if broken:
        undone = f"An edit is not what it must be. **It does not hold** that {', nor that '.join(broken)}."
    moved = table["delta_norm"] > 0
    if not moved.any():
        return f"- The fine-tune moves **no matrix**: there is no task vector.\n- {undone}"
    largest, by_layer = table.iloc[int(table["relative"].argmax())], table.groupby("layer")["energy_share"].sum()
    readers, ranks = table[table["side"] == "reader"]["energy_share"].sum(), table.loc[moved, "stable_rank"]
    every = "every matrix" if moved.all() else f"only {moved.sum()} of {len(table)} matrices"
    spread = "few directions in some matrices and over many in others"
    if ranks.max() < 2 * ranks.min():
        spread = "about as many directions in every matrix"
    kept = rounding.iloc[-1]
    lost = "" if kept["cosine"] ** 2 >= 0.5 else " **Most of what is left is not the change that was made.**"
    return f"""
- The fine-tune moves {every}, by {table["relative"].median():.1%} of its norm in the median; most in the {largest["matrix"]} matrix of layer {largest["layer"]} ({largest["relative"]:.1%}).
- Readers carry {readers:.0%} of the energy, writers {1 - readers:.0%}. An even spread over layers would be {1 / len(by_layer):.1%} each; the layers range from {by_layer.min():.1%} to {by_layer.max():.1%}.
- Stable ranks lie between {ranks.min():.1f} and {ranks.max():.1f}: the change is spread over {spread}.
- Stored in bfloat16, the task vector would leave {kept["unmoved"]:.0%} of the weights unmoved and keep {kept["energy_kept"]:.1%} of its energy (cosine {kept["cosine"]:.3f}).{lost}
- {undone}
""".strip()
