"""Step 04 wired to a world: layer scores, and losses of sets of layers on the validation split."""

from functools import cached_property
from itertools import product

import numpy as np
import pandas as pd
import torch

from stetholib import calibration, layer_selection, layer_sets
from stetholib import known_layers as known
from stetholib.data import corpora
from stetholib.errors import UserError
from stetholib.minerva_math import Variant
from stetholib.models.sums import CONTRASTS
from stetholib.statistics import Values
from stetholib.store.progress import progress
from stetholib.study.instruments import reseeded, scores_of
from stetholib.study.losses import Losses
from stetholib.study.rivals import rivals
from stetholib.study.sae_features import SaeFeatures, beside
from stetholib.study.task_vectors import TaskVectors
from stetholib.study.world import Step, World

DEFINITIONS = ("cohen_d", "firing_log_ratio", "auroc")


def planted(world: World) -> tuple[np.ndarray, pd.DataFrame]:
    """The instrument on planted truth: p-values without signal, and power against the planted effect."""
    null = world.store.made(calibration.null_p_values, 200).value
    return null, world.store.made(calibration.power_curve, (0.0, 0.1, 0.2, 0.3, 0.4, 0.6), 60).value


class LayerSelection(Step):
    """Scores, selectors and their losses."""

    def __init__(self, world: World, task_vectors: TaskVectors, sae_features: SaeFeatures, losses: Losses) -> None:
        """task_vectors: what is injected; sae_features: what is heard; losses: what an injection is worth."""
        super().__init__(world)
        self._vectors, self._features, self._losses = task_vectors, sae_features, losses

    @property
    def selected_count(self) -> int:
        """m, the number of layers to select."""
        return layer_sets.layer_count(self._world.layers, self._profile.selection.layer_share)

    def scores(self, contrast: str) -> layer_selection.Scores:
        """Layer scores under one contrast, with permutations and resamples."""
        p, features = self._profile.selection, self._features
        inputs = (features.sums(contrast), torch.tensor(features.listening.corpus_of), features.rule(), contrast == "matched")
        sizes = (self.selected_count, p.permutations, p.resamples, self._world.seed("permutations"))
        return self._store.made(layer_selection.score_layers, *inputs, *sizes, self._article_of).value

    @cached_property
    def _article_of(self) -> torch.Tensor:
        """What each text that is heard is a part of, by index: an article of general text, or nothing but itself."""
        wholes = corpora.articles(self._profile.data, self._features.listening.texts)
        first = {whole: at for at, whole in reversed([*enumerate(wholes)])}
        return torch.tensor([first[whole] for whole in wholes])

    def plain_scores(self, contrast: str, kind: str | None = None, features: SaeFeatures | None = None) -> list[float]:
        """Layer scores alone, under any definition of specificity, or with other SAEs."""
        return scores_of(features or self._features, contrast, kind)

    def agreement(self) -> pd.DataFrame:
        """Layers that each definition of specificity selects under each contrast, and rho with the default's scores."""
        default = self._profile.features.specificity
        kinds = dict.fromkeys((*DEFINITIONS, default))  # one of one's own stands beside those that ship
        scores = {(contrast, kind): self.plain_scores(contrast, kind) for contrast in CONTRASTS for kind in kinds}
        return layer_selection.agreement(scores, self.selected_count, default)

    def sae_stability(self, draws: int) -> pd.DataFrame:
        """Layer scores with SAEs of other seeds, in the same world: do they point at the same layers? Columns contrast, sae_seed,
        rho (Spearman with the default's scores), layers, common (of the default's m layers chosen again) and chance (what m
        random layers would share). No rows where SAEs are fetched: they have one seed."""
        rows = []
        for other, contrast in product(reseeded(self._features, draws), CONTRASTS):
            ours, theirs = self.plain_scores(contrast), self.plain_scores(contrast, features=other)
            found = layer_selection.stability(ours, theirs, self.selected_count)
            rows.append(dict(contrast=contrast, sae_seed=other._spec.seed) | found)
        return pd.DataFrame(rows, columns=["contrast", "sae_seed", "rho", "layers", "common", "chance"])

    @cached_property
    def _layer_energy(self) -> np.ndarray:
        return layer_sets.layer_energies(self._vectors.energies())

    def _rules(self) -> dict[str, tuple[str, Values]]:
        """A score for each layer by every rule of the ledger."""
        scores = {contrast: self.scores(contrast).score for contrast in CONTRASTS}
        return layer_sets.fixed_rules(scores, self._layer_energy)

    def chosen(self) -> dict[str, tuple[str, layer_sets.LayerSet]]:
        """selector -> (contrast, layers) for every rule of the ledger that picks m layers without sight of a loss."""
        return layer_sets.chosen_sets(self._rules(), self.selected_count)

    @cached_property
    def _rivals(self) -> dict[str, tuple[str, Values]]:
        """A score for each layer by every rule beside the ledger's."""
        return rivals(self._world, self._vectors, self._features, self._losses, {c: self.scores(c).score for c in CONTRASTS})

    @property
    def shrunk(self) -> float:
        """The alpha at which the whole vector has the energy of the stethoscope's layers (all tokens)."""
        return layer_sets.shrunk_to(self._layer_energy, self.chosen()["stethoscope"][1])

    @property
    def _known(self) -> tuple[int, ...]:
        """The layers that mathematics was put into, where that is known."""
        return self._profile.finetune.blocks or ()

    def _plan(self) -> list[layer_sets.PlannedSet]:
        random_sets, seed = self._profile.selection.random_sets, self._world.seed("random sets")
        return layer_sets.planned_sets(self.chosen(), self._layer_energy, self._features.believed, random_sets, seed)

    def sets(self) -> pd.DataFrame:
        """Step 04's table of sets of layers, each scored by validation loss after injection."""
        p, losses, plan = self._profile.selection, self._losses, self._plan()
        half = layer_sets.halving(losses.subjects, self._world.seed("halves"))
        plan += known.planned(self._known, self._world.layers) if self._known else []
        # these rules came after the ledger's: no part of `_plan`, which says whether a world tells sets apart
        picked = layer_sets.chosen_sets(self._rivals, self.selected_count)
        plan += [layer_sets.PlannedSet(name, 0, contrast, layers) for name, (contrast, layers) in picked.items()]
        if (own := own_edit(self)) and own.vector == "raw":
            plan.append(layer_sets.PlannedSet("own", 0, "-", own.layers, own.alpha))
        smooth = {one.selector: one.layers for one in plan if one.selector in ("stethoscope", "stethoscope_rise")}
        plan += layer_sets.smooth_sets(smooth, self._world.layers)
        sizes = (self._world.layers, self.selected_count, p.small_step, p.greedy)
        for draw, seen in enumerate((half, ~half)):
            plan += layer_sets.seeing_sets(losses.of, seen, draw, *sizes)
        seed = self._world.seed("percentiles")
        return layer_sets.measure_sets(plan, losses.of, losses.general, half, self._layer_energy, seed, progress)

    def reliability(self) -> pd.DataFrame:
        """Step 04's table of whether losses on two halves of the problems rank layers, and sets of layers, alike."""
        subjects, seed = self._losses.subjects, self._world.seed("reliability")
        return layer_sets.reliability(self._plan(), self._losses.of, subjects, seed)

    def table(self) -> pd.DataFrame:
        """Step 04's table of layers."""
        scores, tests = {contrast: self.scores(contrast) for contrast in CONTRASTS}, self._features.self_tests()
        randoms = {contrast: tests[f"score_random_{contrast}"].tolist() for contrast in CONTRASTS}
        return layer_selection.measure(scores, randoms, self.selected_count, self.sets())

    def relations(self) -> pd.DataFrame:
        """How layer scores go with effects over layers: Spearman with an interval, and given depth and |tau_l|."""
        return layer_selection.relations(self.table(), self._layer_energy, self._world.seed("spearman"))


def own_edit(step: LayerSelection) -> Variant | None:
    """The edit of the profile's keys `edit`, if one was asked for. Raises UserError for layers that the model, or the scalpel, does
    not have."""
    p = step._profile.edit
    if not p.wanted:
        return None
    layers = tuple(sorted(p.layers or step.chosen()["stethoscope"][1]))
    layer_sets.check_layers(layers, step._world.layers)
    if p.vector != "raw" and (left := sorted({*layers} - {*step._features.believed})):
        raise UserError(
            f"edit.layers: the scalpel has no directions for layer {left[0]}, whose SAE is not believed; leave it out"
        )
    return Variant("own", p.vector, layers, p.alpha)


def formal_text(step: LayerSelection) -> pd.DataFrame:
    """Layer scores against code and formulas instead of the profile's general text: does the score hear mathematics, or the look
    of it? Columns contrast, rho, layers, common and chance, as of `sae_stability`. No rows where general text is generated: the
    model that is made for it knows no other words."""
    rows: list[dict[str, object]] = []
    other = beside(step._features, general=corpora.FORMAL)
    for contrast in CONTRASTS if step._profile.data.general not in ("generated", corpora.FORMAL) else ():
        try:  # a control of what was measured stops nothing
            theirs = step.plain_scores(contrast, features=other)
        except UserError as error:
            rows.append(dict(contrast=contrast, layers=str(error)))
            continue
        rows.append(dict(contrast=contrast) | layer_selection.stability(step.plain_scores(contrast), theirs, step.selected_count))
    return pd.DataFrame(rows, columns=["contrast", "rho", "layers", "common", "chance"])


def additivity(step: LayerSelection) -> pd.DataFrame:
    """Whether what layers do adds up: columns model, n, r2, of `layer_sets.additivity`."""
    return layer_sets.additivity(step.sets(), step._world.layers, step._world.seed("additivity"))


def known_layers(step: LayerSelection) -> pd.DataFrame | None:
    """How every rule does where the layers of mathematics are known, of `known_layers.measure`; None where they are not."""
    return known.measure(step._rules() | step._rivals, step.sets(), step._known) if step._known else None


def over_worlds(step: LayerSelection) -> pd.DataFrame | None:
    """How every rule stands over the worlds that `make seeds` and `make organisms` left in figures/, of `known_layers.over_worlds`;
    None where they have not run."""
    worlds, organisms = step._world.workspace.over_worlds()
    if not worlds.is_file():
        return None
    return known.over_worlds(pd.read_csv(worlds), pd.read_csv(organisms) if organisms.is_file() else None)
