"""What is measured on: the miniature and fabricated models of true shapes, each with a fine-tune that differs at random."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stetholib.commands import fabricate
from stetholib.data import mini
from stetholib.data.mini import problems
from stetholib.editing import Edit, TaskVector
from stetholib.models import export
from stetholib.models.weights import Checkpoint, Key, weight_names
from stetholib.store.files import digest_of
from stetholib.store.values import Lazy

NOISE = 0.05  # of a matrix's own spread: the miniature still answers, and not as before
LARGER, SMALLER = "google/gemma-3-1b-it", "google/gemma-3-270m-it"
MAX_NEW_TOKENS = 96  # the miniature's profile


@dataclass(frozen=True)
class Plan:
    """How much is measured: runs of each side; scale: 1 for what is asked, less to try the command; home: for what is made."""

    runs: int
    scale: float
    home: Path

    def count(self, full: int, least: int = 1) -> int:
        """So many of something at this scale."""
        return max(least, round(full * self.scale))

    def folder(self, name: str) -> Path:
        """A folder for what is made at this scale."""
        return self.home / f"scale-{self.scale:g}" / name


@dataclass(frozen=True)
class Two:
    """A base and its fine-tune, as folders."""

    base: Path
    finetuned: Path

    def vector(self) -> TaskVector:
        """The task vector, each matrix read when it is asked for."""
        return TaskVector.between(Checkpoint(self.base), Checkpoint(self.finetuned))

    def third(self) -> tuple[int, ...]:
        """A third of the layers, spread evenly: 9 of 26."""
        layers = len(self.vector().layers)
        wanted = -(-layers // 3)
        return tuple(sorted({round(at * (layers - 1) / max(1, wanted - 1)) for at in range(wanted)}))

    def recipe(self, layers: tuple[int, ...]) -> str:
        """The edit of these layers as a recipe of mergekit."""
        (dtype,) = export.dtypes(self.base)
        return export.recipe(str(self.base), str(self.finetuned), layers, 1.0, dtype)


def fabricated(plan: Plan, repo: str) -> Path:
    """An untrained model with a repository's shapes, in bfloat16."""
    folder = plan.folder(repo.split("/")[1])
    if not folder.exists():
        draft = folder.with_name(f".{folder.name}-{os.getpid()}")
        fabricate.model(repo, draft, plan.scale, fabricate.RELEASED, 0)
        draft.rename(folder)
    return folder


def with_noise(base: Path, into: Path) -> Two:
    """A base and a copy of it with noise in every matrix of every block."""
    if not into.exists():
        checkpoint = Checkpoint(base)
        names = weight_names(checkpoint)

        def drawn(where: Key) -> Tensor:
            weight = checkpoint[names[where]].float()
            seed = int(digest_of(*where), 16) % 2**31
            return NOISE * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))

        edit = Edit(TaskVector(Lazy(names, drawn)), tuple({layer for layer, _ in names}))
        with export.whole(into, export.bytes_wanted(base, edit, False)) as draft:
            export.write_model(base, edit, draft)
    return Two(base, into)


def true_shaped(plan: Plan) -> Two:
    """Gemma 3 1B's shapes, twice."""
    return with_noise(fabricated(plan, LARGER), plan.folder("gemma-3-1b-it-finetuned"))


def miniature(plan: Plan) -> Two:
    """The miniature's base, and a fine-tune."""
    return with_noise(mini.FOLDER, plan.folder("mini-finetuned"))


def rows(count: int) -> list[dict[str, Any]]:
    """So many of the miniature's test problems, of the seven subjects in turn."""
    each = -(-count // len(problems.SUBJECTS))
    made = problems.generate("test", dict.fromkeys(problems.SUBJECTS, each), 0)
    by_subject = [[row for row in made if row["subject"] == subject] for subject in problems.SUBJECTS]
    return [dict(row) for together in zip(*by_subject, strict=True) for row in together][:count]


def prepare(plan: Plan, works: Sequence[str]) -> None:
    """Make what these works need, in a process of its own: what it holds is not charged to them."""
    miniature(plan)
    if {"export", "edit"} & {*works}:
        true_shaped(plan)
    if "answer_fewshot" in works:
        fabricated(plan, SMALLER)
