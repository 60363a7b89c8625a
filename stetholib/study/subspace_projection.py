"""Step 03 wired to a world: directions at every layer, and the scalpel."""

from functools import cached_property

import pandas as pd

from stetholib import dictionary_or_choice, subspace_projection
from stetholib.editing import TaskVector
from stetholib.models.loading import gains_of
from stetholib.models.streams import gradient_moments
from stetholib.store.artefacts import Artefact
from stetholib.store.values import Input
from stetholib.study.losses import Losses
from stetholib.study.sae_features import SaeFeatures
from stetholib.study.task_vectors import TaskVectors
from stetholib.study.world import Step, World
from stetholib.subspace_projection import Directions, Ranks


class SubspaceProjection(Step):
    """Subspaces and projected vectors."""

    def __init__(self, world: World, task_vectors: TaskVectors, sae_features: SaeFeatures, losses: Losses) -> None:
        """task_vectors: what is filtered; sae_features: by whose directions; losses: the texts it is judged on."""
        super().__init__(world)
        self._vectors, self._features, self._losses = task_vectors, sae_features, losses

    @property
    def width(self) -> int:
        """d_model."""
        return self._world.width

    @property
    def layers(self) -> list[int]:
        """The layers that are filtered: those whose SAE is believed."""
        return self._features.believed

    @cached_property
    def _tau(self) -> Input[TaskVector]:
        """The raw vector in those layers."""
        if len(self.layers) == self._world.layers:
            return self._vectors.tau
        return self._store.derived(TaskVector.restrict, self._vectors.tau, self.layers)

    @cached_property
    def ranks(self) -> Ranks:
        """The default rank and the grid."""
        p = self._profile.projection
        return Ranks.of(self.width, p.rank_share, p.rank_shares)

    @cached_property
    def _gradients(self) -> Artefact:
        p, world = self._profile, self._world
        texts = world.solved(world.per_subject("train", p.projection.gradient_problems))
        longest = min(p.data.max_tokens, p.projection.gradient_tokens)
        return self._store.made(gradient_moments, world.model, texts, longest, p.projection.gradient_tokens)

    @cached_property
    def _directions(self) -> Input[dict[int, Directions]]:
        """Of the most specific features (contrast `corpus`), activations and gradients, by layer."""
        features, rule = self._features, self._features.rule()
        inputs = (features.heard, features.dictionaries, self._gradients, features.listening.corpus_of)
        sizes = (rule.kind, rule.minimum_firing, self.ranks, self.layers)
        return self._store.derived(subspace_projection.directions, *inputs, *sizes)

    @property
    def sites(self) -> dict[int, Directions]:
        """The directions at each layer's output, by basis."""
        with self._directions.opened() as found:
            return dict(found)

    def table(self) -> pd.DataFrame:
        """Step 03's table."""
        draws, seed = self._profile.projection.random_draws, self._world.seed("random subspaces")
        gains = self._store.derived(gains_of, self._world.model)
        inputs = (self._tau, self._directions, gains, self.ranks, draws, seed)
        return self._store.made(subspace_projection.measure, *inputs).value

    def mechanism(self) -> pd.DataFrame:
        """Overlap of each side's best subspace with the directions at the places it touches, at the default rank."""
        return self._store.made(subspace_projection.mechanism, self._tau, self._directions, self.ranks.default).value

    def lora_start(self) -> pd.DataFrame | None:
        """How much of a LoRA's readers lies where its A began, and what each basis keeps beside that; None where none was made here."""
        start, draws, seed = self._vectors.lora_start, self._profile.projection.random_draws, self._world.seed("random subspaces")
        if start is None:
            return None
        inputs = (self._tau, start, self._directions, self.ranks.default, draws, seed)
        return self._store.made(subspace_projection.lora_start, *inputs).value

    def vector_of(self, name: str) -> Input[TaskVector]:
        """raw; projected (the scalpel); projected_rescaled (to the full energy); raw_shrunk (to the scalpel's): for stages."""
        if name == "raw":
            return self._vectors.tau
        return self._store.derived(subspace_projection.vector_of, name, self._tau, self._directions, self.ranks.default)

    def rounding_of_edits(self) -> pd.DataFrame:
        """What a model in bfloat16 can carry of each edit: columns vector, unmoved, energy_kept, cosine."""
        inputs = (self._world.weights, self._tau, self._directions, self.ranks.default)
        return self._store.made(subspace_projection.rounding_of_edits, *inputs).value

    def energy_or_direction(self) -> pd.DataFrame:
        """Validation loss of the scalpel and its controls: did it lose energy, or direction?"""
        inputs = (self._world.model, self._losses.pool, self._tau, self._directions, self.ranks.default)
        return self._store.made(subspace_projection.energy_or_direction, *inputs, self._world.seed("energy or direction")).value


def choices(step: SubspaceProjection) -> pd.DataFrame:
    """What other choices of directions keep at the default rank: columns choice, energy_retained."""
    features, rule, draws = step._features, step._features.rule(), step._profile.projection.random_draws
    inputs = (step._tau, features.heard, features.dictionaries, features.listening.corpus_of, rule.kind, rule.minimum_firing)
    seed = step._world.seed("choices")
    return step._store.made(dictionary_or_choice.measure, *inputs, step.ranks.default, draws, seed).value
