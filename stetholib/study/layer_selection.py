"""Wiring of step 04: layer scores, and losses of sets of layers on the validation split."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from stetholib import (
    editing,
    layer_selection,
    minerva_math,
    models,
    planted,
    sae_features,
    significance,
    task_vectors,
)
from stetholib.editing import Edit, edited
from stetholib.layer_selection import ScoreRule
from stetholib.sae_features import CONTRASTS
from stetholib.study.stages import library_versions
from stetholib.study.subspace_projection import ProjectionSteps
from stetholib.workspace import Artefact, append_json, digest_of, progress, read_json_lines, source_hash


class SelectionSteps(ProjectionSteps):
    """Adds scores, selectors and their losses."""

    def calibration(self) -> tuple[np.ndarray, pd.DataFrame]:
        """The instrument on planted truth: p-values without signal, and power against the planted effect."""
        found = self._stage("calibration", [], [], [planted, layer_selection, sae_features])
        return found.tables["null"]["p"].to_numpy(), found.tables["power"]

    def _make_calibration(self, folder: Path) -> Artefact:
        null = pd.DataFrame({"p": planted.null_p_values(200)})
        return Artefact(tables={"null": null, "power": planted.power_curve((0.0, 0.1, 0.2, 0.3, 0.4, 0.6), worlds=60)})

    def agreement(self) -> pd.DataFrame:
        """Layers that each definition of specificity selects under each contrast, and its rank correlation with the default's scores."""
        rows = []
        for contrast in CONTRASTS:
            default = self.plain_scores(contrast)
            for kind in ("cohen_d", "firing_log_ratio", "auroc"):
                score = self.plain_scores(contrast, kind)
                chosen = layer_selection.select(score, self.selected_count)
                rho = layer_selection.spearman(score, default)[0]
                rows.append(dict(contrast=contrast, definition=kind, layers=" ".join(map(str, chosen)), rho_with_default=rho))
        return pd.DataFrame(rows)

    def plain_scores(self, contrast: str, kind: str | None = None) -> list[float]:
        """Layer scores alone, without permutations and resamples, under any definition of specificity."""
        rule = self._rule(kind)
        labels = sae_features.one_hot(self.corpus_of, len(self.corpora))
        return [float(rule.score(sums, labels, contrast == "matched")[0]) for sums in self.document_sums(contrast)]

    def sae_stability(self, draws: int) -> pd.DataFrame:
        """Layer scores with SAEs of other seeds, in the same world: do they point at the same layers?

        Columns sae_seed, contrast, rho (Spearman with the default's scores), layers, common (of the default's m layers
        chosen again) and chance (what m random layers would share). No rows where SAEs are fetched: they have one seed.
        """
        rows, m = [], self.selected_count
        if self.profile.sae.release != "train":
            return pd.DataFrame(columns=["contrast", "sae_seed", "rho", "layers", "common", "chance"])
        for seed in range(self.profile.sae.seed + 1, self.profile.sae.seed + 1 + draws):
            other = type(self)(replace(self.profile, sae=replace(self.profile.sae, seed=seed)), self.device, self.workspace.root)
            for contrast in CONTRASTS:
                ours, theirs = self.plain_scores(contrast), other.plain_scores(contrast)
                chosen = layer_selection.select(theirs, m)
                rows.append(
                    dict(
                        contrast=contrast,
                        sae_seed=seed,
                        rho=layer_selection.spearman(ours, theirs)[0],
                        layers=" ".join(map(str, chosen)),
                        common=len(set(chosen) & set(layer_selection.select(ours, m))),
                        chance=m * m / self.layers,
                    )
                )
        return pd.DataFrame(rows)

    def relations(self) -> pd.DataFrame:
        """How layer scores go with effects over layers: Spearman with an interval, and given depth and |tau_l|."""
        table = self.layer_selection()
        depth, energy = np.arange(self.layers), self._layer_energy
        rows = []
        for effect in ("effect_alone", "effect_left_out"):
            one = table[table["contrast"] == "corpus"].sort_values("layer")
            scores = {c: table[table["contrast"] == c].sort_values("layer")["score"].to_numpy() for c in CONTRASTS}
            for name, x in {**scores, "|tau|": energy, "depth": depth}.items():
                rho, low, high = layer_selection.spearman(x, one[effect], seed=self._seed("spearman"))
                given = [v for other, v in (("|tau|", energy), ("depth", depth)) if other != name]
                rows.append(
                    dict(
                        predictor=name,
                        effect=effect,
                        rho=rho,
                        low=low,
                        high=high,
                        partial=layer_selection.partial_spearman(x, one[effect], given),
                    )
                )
        return pd.DataFrame(rows)

    def greedy_share(self) -> pd.DataFrame:
        """Each selector's loss change as a share of what `greedy` reaches, with a bootstrap interval over problems."""
        sets = self.layer_sets()
        chosen = sets[~sets["selector"].isin(["full", "only", "without", "random", "random_energy"])].set_index("selector")[
            "layers"
        ]
        if "greedy" not in chosen:
            return pd.DataFrame(columns=["selector", "share", "low", "high"])
        every = {name: Edit(self.task_vector, tuple(map(int, layers.split()))) for name, layers in chosen.items()}
        base, _ = self._document_losses(Edit(self.task_vector, ()))
        gains = {name: base - self._document_losses(edit)[0] for name, edit in every.items()}
        rows = []
        for name, gain in gains.items():
            share, low, high = significance.bootstrap_ratio(gain, gains["greedy"], self._seed("greedy share"))
            rows.append(dict(selector=name, share=share, low=low, high=high))
        return pd.DataFrame(rows).sort_values("share", ascending=False, ignore_index=True)

    @property
    def selected_count(self) -> int:
        """m, the number of layers to select."""
        return layer_selection.layer_count(self.layers, self.profile.selection.layer_share)

    def scores(self, contrast: str, kind: str | None = None) -> layer_selection.Scores:
        """Layer scores under one contrast, with permutations and resamples."""
        p = self.profile.selection
        rule = self._rule(kind)
        upstream = [*self._feature_keys, contrast]
        params = [asdict(rule), p.permutations, p.resamples, self.selected_count, self.profile.seed]
        make = partial(self._make_scores, contrast, rule)
        found = self._stage("scores", params, upstream, [layer_selection, sae_features], make)
        return layer_selection.Scores(**{name: tensor.numpy() for name, tensor in found.tensors.items()})

    def _make_scores(self, contrast: str, rule: ScoreRule, folder: Path) -> Artefact:
        p = self.profile.selection
        result = layer_selection.score_layers(
            self.document_sums(contrast),
            self.corpus_of,
            rule,
            contrast == "matched",
            self.selected_count,
            p.permutations,
            p.resamples,
            self._seed("permutations"),
        )
        return Artefact(tensors={name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in vars(result).items()})

    @cached_property
    def _loss_ledger(self) -> tuple[Path, dict[str, float]]:
        """Losses already measured, by layers and scale; each is on disk as soon as it is known."""
        p = self.profile
        params = [p.selection.loss_problems, p.selection.batch_tokens, self.data_key, p.finetune.target, p.seed]
        code = source_hash([models, editing, task_vectors, minerva_math, *self._text_code])
        key = digest_of(params, code, library_versions(), self.base_key, self.finetuned().key, self.device, p.threads)
        path = self.workspace.store / f"losses-{key}.jsonl"
        return path, {row["set"]: row["loss"] for row in read_json_lines(path)}

    def solution_loss(self, layers: Sequence[int], alpha: float = 1.0) -> float:
        """Loss of gold solutions (validation, nats a token) with the raw vector in these layers."""
        path, known = self._loss_ledger
        name = json.dumps([list(layers), alpha])
        if name not in known:
            with edited(self.base.model, Edit(self.task_vector, tuple(layers), alpha=alpha)) as model:
                known[name] = models.mean_loss(model, self._loss_pool)
            append_json(path, [{"set": name, "loss": known[name]}])
        return known[name]

    def layer_sets(self) -> pd.DataFrame:
        """Step 04's table of sets of layers, each scored by validation loss after injection."""
        sets = self._planned_sets()
        base = self.solution_loss(())
        layer_energy = self._layer_energy
        rows = []
        for selector, draw, contrast, layers, alpha in progress(sets, "04 sets of layers"):
            share = alpha**2 * layer_energy[list(layers)].sum() / layer_energy.sum()
            change = self.solution_loss(layers, alpha) - base
            rows.append(
                dict(
                    selector=selector,
                    draw=draw,
                    contrast=contrast,
                    layers=" ".join(map(str, layers)),
                    alpha=alpha,
                    energy=share,
                    loss_change=change,
                )
            )
        if self.profile.selection.greedy:
            rows.append(self._greedy_row(base))
        table = pd.DataFrame(rows)
        chance = table.loc[table["selector"] == "random", "loss_change"]
        same = table["layers"].str.split().str.len() == self.selected_count
        table["percentile"] = [
            layer_selection.percentile(v, chance) if s else float("nan") for v, s in zip(table["loss_change"], same, strict=True)
        ]
        self.workspace.table("04_layer_sets", table)
        return table

    @cached_property
    def _layer_energy(self) -> np.ndarray:
        return np.array([sum(e for (layer, _), e in self.energies.items() if layer == at) for at in range(self.layers)])

    def chosen_layers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """selector -> (contrast, layers) for every rule that picks m layers without trying sets."""
        p = self.profile.selection
        steps = [self.solution_loss((layer,), p.small_step) for layer in progress(range(self.layers), "04 small steps")]
        scores = {contrast: self.scores(contrast).score for contrast in CONTRASTS}
        return layer_selection.fixed_selectors(scores, self._layer_energy, steps, self.selected_count)

    def _planned_sets(self) -> list[tuple[str, int, str, tuple[int, ...], float]]:
        """(selector, draw, contrast, layers, alpha) of every set that is scored."""
        p, every = self.profile.selection, tuple(range(self.layers))
        plan = [("full", 0, "-", every, 1.0)]
        plan += [("only", layer, "-", (layer,), 1.0) for layer in every]
        plan += [("without", layer, "-", tuple(x for x in every if x != layer), 1.0) for layer in every]
        plan += [(name, 0, contrast, layers, 1.0) for name, (contrast, layers) in self.chosen_layers().items()]
        drawn = layer_selection.sampled_sets(self.layers, self.selected_count, p.random_sets, self._seed("random sets"))
        plan += [("random", draw, "-", layers, 1.0) for draw, layers in enumerate(drawn)]
        energy = self._layer_energy
        wanted = energy[list(self.chosen_layers()["stethoscope"][1])].sum()
        plan += [
            ("random_energy", draw, "-", layers, float(np.sqrt(wanted / energy[list(layers)].sum())))
            for draw, layers in enumerate(drawn[: p.random_energy_sets])
        ]
        return plan

    def _greedy_row(self, base: float) -> dict[str, Any]:
        best = layer_selection.greedy(self.solution_loss, self.layers, self.selected_count)
        energy = self._layer_energy
        share = energy[list(best)].sum() / energy.sum()
        return dict(
            selector="greedy",
            draw=0,
            contrast="-",
            layers=" ".join(map(str, best)),
            alpha=1.0,
            energy=share,
            loss_change=self.solution_loss(best) - base,
        )

    def layer_selection(self) -> pd.DataFrame:
        """Step 04's table of layers, written and returned."""
        scores = {contrast: self.scores(contrast) for contrast in CONTRASTS}
        tests = self.self_tests()
        randoms = {contrast: tests[f"score_random_{contrast}"].tolist() for contrast in CONTRASTS}
        table = layer_selection.measure(scores, randoms, self.selected_count, self.layer_sets())
        self.workspace.table("04_layer_selection", table)
        return table
