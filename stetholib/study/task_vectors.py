"""Step 01 wired to a world: the fine-tune and its task vector."""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from stetholib import task_vectors
from stetholib.adapters import finetuning, two_tasks
from stetholib.data import hub
from stetholib.editing import Edit, TaskVector, edited, weights
from stetholib.models.weights import Checkpoint, Key, Weights, edit_weights, weight_hash
from stetholib.store.artefacts import Artefact
from stetholib.store.files import digest_of
from stetholib.store.values import Input
from stetholib.study.world import Step


class TaskVectors(Step):
    """theta_1 and tau."""

    @cached_property
    def _made_here(self) -> Artefact | None:
        """The fine-tune made here; None where the profile names a second checkpoint."""
        p, world = self._profile, self._world
        if p.finetune.finetuned:
            return None
        dtype = "float32" if p.finetune.method == "full" else None  # full updates would be lost in bfloat16
        model = world.other(world.base_key, lambda: world.base_folder, dtype)
        how = (p.finetune, p.model.dtype, world.seed("finetune"), p.data.max_tokens)
        texts = world.solved(world.problems("train"))
        if p.finetune.blocks:
            general = world.general("train", "finetune.aside_documents", "told twice")
            return self._store.made(two_tasks.two_tasks, model, world.weights, texts, general, *how)
        return self._store.made(finetuning.finetuned, model, world.weights, texts, *how)

    @cached_property
    def folder(self) -> Path:
        """Where theta_1's files are."""
        made, spec = self._made_here, self._profile.finetune
        return made.folder if made else self._world.folder_of(str(spec.finetuned), spec.finetuned_revision)

    @cached_property
    def identity(self) -> str:
        """Who theta_1 is: the bytes of its files."""
        if self._made_here:
            return self._made_here.identity
        return digest_of(asdict(self._profile.finetune), hub.files_key(self.folder, *hub.MODEL_FILES))

    @cached_property
    def tau(self) -> Input[TaskVector]:
        """The task vector as an input of stages."""
        tuned = Input.of(self.identity, lambda: Checkpoint(self.folder))
        # a fine-tune made here is stored in the model's dtype, whatever dtype the base was released in
        same_dtype = self._profile.finetune.finetuned is not None
        return self._store.derived(task_vectors.difference, self._world.checkpoint, tuned, same_dtype)

    @cached_property
    def lora_start(self) -> Input[Weights] | None:
        """A as the LoRA that was made here began with it, [lora_rank, d_in] by layer and matrix, for stages; None where none was."""
        made = self._made_here if self._profile.finetune.lora else None
        if made is None:
            return None
        start = Input.of(f"{made.identity}/{finetuning.START}", lambda: Checkpoint(made.folder / finetuning.START))
        return self._store.derived(weights, start)

    @property
    def vector(self) -> TaskVector:
        """tau = theta_1 - theta_0."""
        with self.tau.opened() as vector:
            return vector

    @cached_property
    def _energies(self) -> dict[Key, float]:
        return self.vector.energies()

    def energies(self) -> dict[Key, float]:
        """Energy of each matrix of the task vector."""
        return dict(self._energies)

    def finetune_curve(self) -> pd.DataFrame | None:
        """Loss of the fine-tune made here: columns step, loss (nats a token)."""
        return self._made_here.value.curve if self._made_here else None

    def table(self) -> pd.DataFrame:
        """Step 01's table."""
        return self._store.made(task_vectors.measure, self._world.weights, self.tau).value

    def rounding(self) -> pd.DataFrame:
        """What precision can carry of the change: columns change, stored_in, unmoved, energy_kept, cosine. Of the fine-tune made
        here before and after it is stored in the model's dtype, and of the task vector in bfloat16, as released models are."""
        stored = self._made_here.value.stored if self._made_here else None
        return self._store.made(task_vectors.rounding, self._world.weights, self.tau, stored, self._profile.model.dtype).value

    def energy_elsewhere(self) -> dict[str, float]:
        """Energy of the change outside the seven matrices, by kind."""
        return task_vectors.energy_elsewhere(Checkpoint(self._world.base_folder), Checkpoint(self.folder))

    def restored(self) -> dict[str, bool]:
        """The edit's invariants, tried on the base model: scale 0, scale 1, and undone."""
        model, tuned = self._world.base.model, weights(Checkpoint(self.folder))
        before = weight_hash(model)
        with edited(model, Edit(self.vector, self.vector.layers, alpha=0.0)):
            unchanged = weight_hash(model) == before
        with edited(model, Edit(self.vector, self.vector.layers)):
            changed = weight_hash(model) != before
            reached = all(_alike(weight, tuned[where]) for where, weight in edit_weights(model).items())
        return {
            "scale 0 leaves every byte": unchanged,
            "scale 1 changes some": changed,
            "scale 1 gives the fine-tuned weights": reached,
            "leaving restores every byte": weight_hash(model) == before,
        }


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices are the same but for rounding, number by number: a step of the coarser's dtype, or of float32 at the
    size of the largest, where a sum has lost the last bits of a small number."""
    step, wide = max(torch.finfo(weight.dtype).eps for weight in (one, other)), other.float().to(one.device)
    return torch.allclose(one.float(), wide, rtol=step, atol=torch.finfo(torch.float32).eps * float(wide.abs().max()))
