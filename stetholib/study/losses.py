"""Validation losses of edits: each is measured once, and on disk as soon as it is known."""

import json
from collections.abc import Sequence
from functools import cached_property

from stetholib.layer_sets import solution_loss
from stetholib.models.streams import Batch, pool_of
from stetholib.store.artefacts import Ledger
from stetholib.store.values import Input
from stetholib.study.task_vectors import TaskVectors
from stetholib.study.world import World


class Losses:
    """Loss of gold solutions of validation problems, nats a token, under edits with the raw task vector."""

    def __init__(self, world: World, task_vectors: TaskVectors) -> None:
        """world: theta_0 and the validation split; task_vectors: what edits inject."""
        self._world, self._vectors = world, task_vectors

    @cached_property
    def pool(self) -> Input[list[Batch]]:
        """Validation problems with gold solutions, in batches, as an input of stages."""
        p, world = self._world.profile, self._world
        texts = world.solved(world.per_subject("validation", p.selection.loss_problems))
        return world.store.derived(pool_of, world.model, texts, p.data.max_tokens, p.selection.batch_tokens)

    @cached_property
    def _ledger(self) -> Ledger:
        world = self._world
        return world.store.ledger("losses", solution_loss, world.model, self._vectors.tau, self.pool)

    @cached_property
    def _known(self) -> dict[str, float]:
        return {row["set"]: row["loss"] for row in self._ledger.rows}

    def of(self, layers: Sequence[int], alpha: float = 1.0) -> float:
        """Loss with `alpha` times the raw vector in these layers."""
        name = json.dumps([list(layers), alpha])
        if name not in self._known:
            with self.pool.opened() as pool:
                self._known[name] = solution_loss(self._world.base, self._vectors.vector, pool, tuple(layers), alpha)
            self._ledger.append([{"set": name, "loss": self._known[name]}])
        return self._known[name]
