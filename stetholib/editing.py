"""Edits: an edit is a value, applied by a context manager that always undoes itself, byte for byte.

    with edited(model, Edit(task_vector, layers=(3, 5))):
        ...                                   # theta_0 + tau in blocks 3 and 5
    ...                                       # theta_0 again, the same bytes

Scalpel and stethoscope differ only in the value: a projected vector in every block, or the raw one in a few. The
unedited baseline is the empty edit through the same path.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from stetholib.models import MATRICES, Key, ModelError, edit_weights
from stetholib.task_vectors import TaskVector


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
                weight.copy_(weight.float() + edit.alpha * delta.to(weight.device))
        yield model
    finally:
        with torch.no_grad():
            for where, original in kept.items():
                weights[where].copy_(original)


def matched_scales(wanted: Mapping[Key, float], energies: Mapping[Key, float]) -> dict[Key, float]:
    """Factors that bring each matrix from its energy to the wanted one; 0 where it has none."""
    return {where: (wanted[where] / energies[where]) ** 0.5 if energies[where] else 0.0 for where in energies}
