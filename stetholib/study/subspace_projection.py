"""Wiring of step 03: directions at every site, and the scalpel."""

from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from stetholib import (
    editing,
    minerva_math,
    models,
    sae_features,
    significance,
    subspace_projection,
    task_vectors,
)
from stetholib.editing import Edit, edited, matched_scales
from stetholib.study.sae_features import FeatureSteps
from stetholib.subspace_projection import Directions, Ranks
from stetholib.task_vectors import TaskVector
from stetholib.workspace import Artefact, progress


class ProjectionSteps(FeatureSteps):
    """Adds subspaces and projected vectors."""

    @cached_property
    def width(self) -> int:
        """d_model."""
        return models.norm_gains(self.base.model)[0, "q"].shape[0]

    @cached_property
    def ranks(self) -> Ranks:
        """The default rank and the grid."""
        p = self.profile.projection
        return Ranks.of(self.width, p.rank_share, p.rank_shares)

    def gradients(self) -> Artefact:
        """Second moments of the loss gradient at each block's output, on training problems."""
        p = self.profile
        params = [p.projection.gradient_problems, p.projection.gradient_tokens, self.data_key, p.finetune.target, p.seed]
        return self._stage("gradients", params, [self.base_key], [models, minerva_math, *self._text_code])

    def _make_gradients(self, folder: Path) -> Artefact:
        p = self.profile
        rows = self._per_subject(self.problems("train"), p.projection.gradient_problems)
        pairs = [(minerva_math.prompt(r["problem"]), minerva_math.target(r["solution"], p.finetune.target)) for r in rows]
        longest = min(p.data.max_tokens, p.projection.gradient_tokens)
        pool = models.batches(models.tokenize(self.base, pairs, longest), p.projection.gradient_tokens, self.device)
        moments: dict[int, torch.Tensor] = {}
        embedding = self.base.model.get_input_embeddings().weight
        embedding.requires_grad_(True)
        try:
            for batch in progress(pool, "03 gradients"):
                with models.residual_stream(self.base.model) as taken:
                    loss = models.token_losses(self.base.model, batch).sum()
                layers = sorted(taken)
                for layer, grad in zip(layers, torch.autograd.grad(loss, [taken[layer] for layer in layers]), strict=True):
                    g = grad[batch.attention_mask.bool()].double().cpu()
                    models.check_finite({f"the loss gradient at layer {layer}": g})
                    moments[layer] = moments.get(layer, 0) + g.T @ g
        finally:
            embedding.requires_grad_(False)
        return Artefact(tensors={f"gradient_moment.{layer}": moment for layer, moment in moments.items()})

    @cached_property
    def sites(self) -> dict[int, Directions]:
        """The directions at each block's output: of the most specific features (contrast `corpus`), activations, gradients."""
        count = max(self.ranks.grid)
        found = {}
        gradient = self.gradients().tensors
        first = lambda moment: subspace_projection.principal(moment)[:, :count].contiguous()  # noqa: E731 - and frees the rest
        for layer, (values, fires) in enumerate(self.specificities("corpus")):
            top = sae_features.most_specific(values, fires, count)
            dictionary, covariance = self.dictionary(layer), self.features(layer).tensors
            found[layer] = Directions(
                {
                    "sae_decoder": subspace_projection.orthonormal(dictionary.W_dec[top].cpu()),
                    "sae_encoder": subspace_projection.orthonormal(dictionary.W_enc[:, top].T.cpu()),
                    "activation_pca": first(covariance[f"activation_covariance.{layer}"]),
                    "gradient_pca": first(gradient[f"gradient_moment.{layer}"]),
                }
            )
        return found

    def subspace_projection(self) -> pd.DataFrame:
        """Step 03's table, written and returned."""
        p = self.profile
        params = [asdict(p.projection), p.seed]
        upstream = [self.finetuned().key, self._heard_key, self.gradients().key]
        table = self._stage("projection", params, upstream, [subspace_projection, sae_features, task_vectors]).tables["table"]
        self.workspace.table("03_subspace_projection", table)
        return table

    def _make_projection(self, folder: Path) -> Artefact:
        watch = partial(progress, label="03 projections")
        table = subspace_projection.measure(
            self.task_vector,
            self.sites,
            models.norm_gains(self.base.model),
            self.ranks,
            self.profile.projection.random_draws,
            self._seed("random subspaces"),
            watch,
        )
        return Artefact(tables={"table": table})

    def mechanism(self) -> pd.DataFrame:
        """Overlap of each side's best subspace with the directions at the places it touches, at the default rank."""
        return subspace_projection.mechanism(self.task_vector, self.sites, self.ranks.default)

    def vector(self, name: str) -> TaskVector:
        """raw; projected (the scalpel); projected_rescaled (to the full energy); raw_shrunk (to the scalpel's)."""
        if name == "raw":
            return self.task_vector
        bases = {layer: site.by_name["sae_decoder"][:, : self.ranks.default] for layer, site in self.sites.items()}
        projected = subspace_projection.scalpel(self.task_vector, bases)
        if name == "projected":
            return projected
        kept = projected.energies()
        if name == "projected_rescaled":
            return projected * matched_scales(self.energies, kept)
        return self.task_vector * matched_scales(kept, self.energies)

    def rounding_of_edits(self) -> pd.DataFrame:
        """What a model in bfloat16 can carry of each edit: columns vector, unmoved, energy_kept, cosine."""
        upstream = [self.finetuned().key, self._heard_key]
        modules = [task_vectors, subspace_projection, editing]
        return self._stage("rounding_of_edits", asdict(self.profile.projection), upstream, modules).tables["table"]

    def _make_rounding_of_edits(self, folder: Path) -> Artefact:
        rows = []
        for name in ("raw", "projected", "projected_rescaled", "raw_shrunk"):
            shares = task_vectors.survival_shares(self._survival(self.vector(name), "bfloat16"))
            rows.append(dict(vector=name) | shares)
        return Artefact(tables={"table": pd.DataFrame(rows)})

    @cached_property
    def _loss_pool(self) -> list[models.Batch]:
        """Validation problems with gold solutions, in batches."""
        p = self.profile
        rows = self._per_subject(self.problems("validation"), p.selection.loss_problems)
        pairs = [(minerva_math.prompt(r["problem"]), minerva_math.target(r["solution"], p.finetune.target)) for r in rows]
        return models.batches(models.tokenize(self.base, pairs, p.data.max_tokens), p.selection.batch_tokens, self.device)

    def _document_losses(self, edit: Edit) -> tuple[np.ndarray, np.ndarray]:
        """Summed loss and scored tokens of each validation problem under an edit."""
        with edited(self.base.model, edit) as model:
            losses, counts = models.document_losses(model, self._loss_pool)
        return losses.numpy(), counts.numpy()

    def energy_or_direction(self) -> pd.DataFrame:
        """Validation loss of the scalpel and its controls: did it lose energy, or direction?

        Columns variant, energy (share of the whole vector's), loss_change (nats a token; negative is better) with a
        paired interval (low, high), and the same against the variant's `rival`: for `scalpel` that is `raw_shrunk`,
        of the same energy, for `scalpel_rescaled` it is `full`.
        """
        p = self.profile
        params = [p.selection.loss_problems, p.selection.batch_tokens, asdict(p.projection), p.seed]
        upstream = [self.finetuned().key, self._heard_key]
        modules = [subspace_projection, editing, models, task_vectors, significance]
        return self._stage("energy_or_direction", params, upstream, modules).tables["table"]

    def _make_energy_or_direction(self, folder: Path) -> Artefact:
        every, whole = tuple(range(self.layers)), sum(self.energies.values())
        names = {"full": "raw", "scalpel": "projected", "scalpel_rescaled": "projected_rescaled", "raw_shrunk": "raw_shrunk"}
        rivals = {"scalpel": "raw_shrunk", "scalpel_rescaled": "full"}
        vectors = {name: self.vector(source) for name, source in names.items()}
        base, counts = self._document_losses(Edit(self.task_vector, ()))
        losses = {name: self._document_losses(Edit(vector, every))[0] for name, vector in vectors.items()}
        rows = []
        for name, vector in vectors.items():
            against = {"": base} | ({"_against_rival": losses[rivals[name]]} if name in rivals else {})
            row = dict(variant=name, energy=vector.energy() / whole, rival=rivals.get(name, ""))
            for end, start in against.items():
                found = significance.bootstrap_ratio(losses[name] - start, counts, self._seed("energy or direction"))
                row |= {key + end: value for key, value in zip(("loss_change", "low", "high"), found, strict=True)}
            rows.append(row)
        return Artefact(tables={"table": pd.DataFrame(rows)})
