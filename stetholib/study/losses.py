"""Validation losses of edits: each is measured once, and on disk as soon as it is known.

What is on disk are Python's own digits of each number (`repr`), which read back to the same bits, so that a run that finds its
losses decides as the one that measured them.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from stetholib.data import corpora
from stetholib.data.prompts import closing
from stetholib.editing import Edit, losses_by_document
from stetholib.models.streams import Batch, DocumentLosses, Texts, pool_of, scored_tokens
from stetholib.probes import losses_skipping
from stetholib.store.artefacts import Ledger
from stetholib.store.values import Input
from stetholib.study.task_vectors import TaskVectors
from stetholib.study.world import World


class Losses:
    """Losses under edits with the raw task vector: of gold solutions of validation problems, and of general texts."""

    def __init__(self, world: World, task_vectors: TaskVectors) -> None:
        """world: theta_0 and the validation split; task_vectors: what edits inject."""
        self._world, self._vectors = world, task_vectors

    @cached_property
    def _problems(self) -> list[corpora.Row]:
        return self._world.per_subject("validation", self._world.profile.selection.loss_problems)

    @property
    def subjects(self) -> list[str]:
        """The subject of each problem of the pool."""
        return [row["subject"] for row in self._problems]

    @cached_property
    def pool(self) -> Input[list[Batch]]:
        """Validation problems with gold solutions, asked as the test asks, in batches, as an input of stages."""
        return self.pool_where(np.ones(len(self._problems), bool))

    def pool_where(self, mask: np.ndarray) -> Input[list[Batch]]:
        """The problems of the pool where a mask is True, in batches of their own."""
        texts = self._world.solved_as_tested(self._problems)
        few = [text for text, wanted in zip(texts, mask, strict=True) if wanted]
        return self._batches(few, [closing(text) for _, text in few])

    @cached_property
    def _general(self) -> Input[list[Batch]]:
        return self._batches([("", text) for text in self._world.general("validation", "evaluation.general_documents")])

    def _batches(self, texts: Texts, closings: Sequence[str] = ()) -> Input[list[Batch]]:
        p, world = self._world.profile, self._world
        return world.store.derived(pool_of, world.model, texts, p.data.max_tokens, p.selection.batch_tokens, closings)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return self._world.store.made(scored_tokens, self.pool).value

    @cached_property
    def _ledgers(self) -> dict[str, tuple[Ledger, dict[str, Mapping[str, Any]]]]:
        """By kind, the losses on disk and what is known of them by set."""
        store, given = self._world.store, (losses_by_document, self._world.model, self._vectors.tau)
        found = {
            "losses": store.ledger("losses", *given, self.pool),
            "general": store.ledger("general_losses", *given, self._general),
        }
        return {kind: (ledger, {row["set"]: row for row in ledger.rows}) for kind, ledger in found.items()}

    def _known(self, kind: str, pool: Input[list[Batch]], layers: Sequence[int], alpha: float) -> Mapping[str, Any]:
        name, (ledger, known) = json.dumps([list(layers), alpha]), self._ledgers[kind]
        if name not in known:
            edit = Edit(self._vectors.vector, tuple(layers), alpha=alpha)
            with pool.opened() as batches:
                found = losses_by_document(self._world.base.model, edit, batches)
            per_document = dict(solution=found.solution.tolist(), closing=found.closing.tolist())
            known[name] = {"set": name} | (per_document if kind == "losses" else dict(loss=found.mean("total")))
            ledger.append([known[name]])
        return known[name]

    def of(self, layers: Sequence[int], alpha: float = 1.0) -> DocumentLosses:
        """Losses of the pool's solutions with `alpha` times the raw vector in these layers."""
        row = self._known("losses", self.pool, layers, alpha)
        return DocumentLosses(np.array(row["solution"]), np.array(row["closing"]), self._tokens)

    def general(self, layers: Sequence[int], alpha: float = 1.0) -> float:
        """Mean loss of general validation texts, nats a token, with `alpha` times the raw vector in these layers."""
        return self._known("general", self._general, layers, alpha)["loss"]

    def skipped(self) -> list[DocumentLosses]:
        """Losses of the pool's solutions under the unedited model without one layer, for each layer."""
        store, world = self._world.store, self._world
        return [store.made(losses_skipping, world.model, layer, self.pool).value for layer in range(world.layers)]

    def scales(self, shrunk: float) -> pd.DataFrame:
        """Changes of the losses by the whole vector over alpha, `shrunk` among them: columns alpha, energy (a share of that at
        alpha 1), solution, closing (nats a token of the whole solution) and general."""
        every, before, rows = range(self._world.layers), self.of(()), []
        for alpha in sorted({0.1, 0.25, 0.4, shrunk, 0.75, 1.0, 1.25}):
            after, general = self.of(every, alpha), self.general(every, alpha) - self.general(())
            change = {part: after.mean(part) - before.mean(part) for part in ("solution", "closing")}
            rows.append(dict(alpha=alpha, energy=alpha**2) | change | dict(general=general))
        return pd.DataFrame(rows)
