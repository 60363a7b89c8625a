"""Wiring of step 01: the fine-tune and its task vector."""

from dataclasses import asdict
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from stetholib import (
    hub,
    minerva_math,
    models,
    task_vectors,
    texts,
)
from stetholib.models import Checkpoint
from stetholib.study.stages import Stages, files_key
from stetholib.task_vectors import TaskVector
from stetholib.workspace import Artefact, digest_of, progress


class TaskVectorSteps(Stages):
    """Adds theta_1 and tau."""

    def finetuned(self) -> Artefact:
        """theta_1: the second checkpoint, or the fine-tune made here; `folder` holds it, table `loss` its curve."""
        p = self.profile
        if p.finetune.finetuned:
            folder = self._folder(p.finetune.finetuned, p.finetune.finetuned_revision)
            return Artefact(folder=folder, key=digest_of(asdict(p.finetune), self._finetuned_files))
        from stetholib import finetuning

        params = [asdict(p.finetune), self.data_key, p.seed]
        modules = [finetuning, models, minerva_math, task_vectors, *self._text_code]
        return self._stage("finetuned", params, [self.base_key], modules)

    @cached_property
    def _finetuned_files(self) -> list[str]:
        p = self.profile.finetune
        return files_key(self._folder(str(p.finetuned), p.finetuned_revision), *hub.MODEL_FILES)

    def _make_finetuned(self, folder: Path) -> Artefact:
        """theta_1, and how much of the exact change is left once it is stored in the model's dtype."""
        from stetholib.finetuning import finetune

        p, full = self.profile, self.profile.finetune.method == "full"  # full updates would be lost in bfloat16
        with self.instead_of_base(self.base_folder, "float32" if full else None) as base:
            tuned = finetune(
                base,
                self.problems("train"),
                p.finetune,
                self.workspace.unfinished(folder),
                self._seed("finetune"),
                p.data.max_tokens,
                [trainer_progress("01 fine-tune")],
            )
            stored = self._survival(tuned.exact, p.model.dtype)
            base.model.to(getattr(torch, p.model.dtype)).save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
        return Artefact(tables={"loss": tuned.curve, "stored": stored})

    def _survival(self, vector: TaskVector, dtype: str) -> pd.DataFrame:
        before = task_vectors.weights(Checkpoint(self.base_folder))
        return task_vectors.survival(vector, task_vectors.rounded(before, vector, getattr(torch, dtype)))

    def rounding(self) -> pd.DataFrame:
        """What precision can carry of the change: columns change, stored_in, unmoved, energy_kept, cosine.

        Of the fine-tune made here before and after it is stored in the model's dtype, and of the task vector in
        bfloat16, the dtype that the released models have.
        """
        upstream = [self.base_key, self.finetuned().key]
        return self._stage("rounding", self.profile.model.dtype, upstream, [task_vectors]).tables["table"]

    def _make_rounding(self, folder: Path) -> Artefact:
        found = {("task vector", "bfloat16"): self._survival(self.task_vector, "bfloat16")}
        if "stored" in (tables := self.finetuned().tables):
            found = {("fine-tune, as trained", self.profile.model.dtype): tables["stored"]} | found
        rows = [
            dict(change=change, stored_in=dtype) | task_vectors.survival_shares(sums) for (change, dtype), sums in found.items()
        ]
        return Artefact(tables={"table": pd.DataFrame(rows)})

    @property
    def _text_code(self) -> list[Any]:
        from stetholib.mini import problems, stories

        return [texts, problems, stories]

    @cached_property
    def task_vector(self) -> TaskVector:
        """tau = theta_1 - theta_0; held in memory where it fits in a gibibyte, else read when asked for."""
        base, tuned = Checkpoint(self.base_folder), Checkpoint(self.finetuned().folder)
        models.check_stored(base), models.check_stored(tuned)
        task_vectors.check_same_tensors(base, tuned)
        # one made here is stored in the model's dtype, whatever dtype the base was released in
        vector = TaskVector.between(base, tuned, same_dtype=self.profile.finetune.finetuned is not None)
        if not any(delta.any() for delta in vector.deltas.values()):
            raise models.ModelError("task vector: the two models are the same; mend finetune.finetuned, or train for longer")
        size = 4 * sum(prod(base.shape(name)) for name in models.weight_names(base).values())
        return vector.in_memory() if size < 2**30 else vector

    @cached_property
    def energies(self) -> dict[models.Key, float]:
        """Energy of each matrix of the task vector."""
        return self.task_vector.energies()

    def task_vectors(self) -> pd.DataFrame:
        """Step 01's table, written and returned."""
        table = task_vectors.measure(task_vectors.weights(Checkpoint(self.base_folder)), self.task_vector)
        self.workspace.table("01_task_vectors", table)
        return table

    def energy_elsewhere(self) -> dict[str, float]:
        """Energy of the change outside the seven matrices, by kind."""
        return task_vectors.energy_elsewhere(Checkpoint(self.base_folder), Checkpoint(self.finetuned().folder))


def trainer_progress(label: str) -> Any:
    """A transformers callback that reports steps through `progress`."""
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps = progress(range(state.max_steps), label)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(self.steps, None)

    return Report()
