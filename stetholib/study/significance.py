"""Step 06 wired to a world: tests of what the records say, and the ledger."""

from collections.abc import Sequence
from functools import cache
from math import nan
from typing import Any

import pandas as pd

from stetholib import claims, layer_sets, significance
from stetholib.models.subspaces import LossSplit, split_loss
from stetholib.significance import ALL, METRICS, Margins
from stetholib.study.layer_selection import LayerSelection
from stetholib.study.minerva_math import MinervaMath
from stetholib.study.subspace_projection import SubspaceProjection
from stetholib.study.task_vectors import TaskVectors
from stetholib.study.world import Step, World


class Significance(Step):
    """What of it is real."""

    def __init__(
        self, world: World, vectors: TaskVectors, scalpel: SubspaceProjection, stethoscope: LayerSelection, answers: MinervaMath
    ) -> None:
        """The steps whose tables the ledger reads."""
        super().__init__(world)
        self._vectors, self._scalpel, self._stethoscope, self._answers = vectors, scalpel, stethoscope, answers

    @property
    def margins(self) -> Margins:
        """Level and margins, from the profile."""
        p = self._profile.significance
        return Margins(p.level, p.margin, p.margin_subject, p.bootstrap, self._world.seed("bootstrap"))

    def _against(self, variant: str, base: str = "base") -> pd.DataFrame:
        """One variant against another, by metric and subject; only these two answer the test."""
        inputs = (self._answers.records([base, variant]), self.margins, self._answers.families(), base)
        return self._store.made(significance.measure, *inputs).value

    def table(self) -> pd.DataFrame:
        """Step 06's table: every variant against the base."""
        variants = sorted(set(self._answers.variants()) - {"base"})
        return pd.concat([self._against(variant) for variant in variants], ignore_index=True)

    def published(self) -> pd.DataFrame:
        """The published figure by three tests."""
        return significance.published()

    def pairs(self, wanted: Sequence[tuple[str, str]]) -> pd.DataFrame:
        """Pairs of variants on the same test problems, first minus second, over all subjects; one row a pair and metric."""
        return self._store.made(significance.pairs_table, self._answers.records(), list(wanted), self.margins).value

    def _split(self, **where: str) -> LossSplit:
        return split_loss(self._scalpel.table(), self._vectors.energies(), self._scalpel.ranks.default, **where)

    def _carried(self) -> float:
        """Cosine of the scalpel's change, as the model's weights hold it, with the one that is meant."""
        if self._profile.model.dtype == "float32":
            return 1.0
        return float(self._scalpel.rounding_of_edits().set_index("vector")["cosine"]["projected"])

    def claims(self, *names: str) -> pd.DataFrame:
        """The ledger of the paper's nine claims, or of some by name (`C4`): only what these need is measured."""
        evidence = claims.Evidence(
            split=cache(self._split),
            control=self._scalpel.energy_or_direction,
            sets=cache(self._stethoscope.sets),
            tells_apart=cache(lambda: layer_sets.tells_apart(self._stethoscope.reliability())),
            chosen=lambda: {name: layers for name, (_, layers) in self._stethoscope.chosen().items()},
            against=cache(self._against),
            checks=self._answers.checks,
            carried=cache(self._carried),
            rank=self._scalpel.ranks.default,
            lora=self._profile.finetune.lora,
            published_rung=self._profile.published_rung,
            level=self._profile.significance.level,
        )
        return claims.ledger(evidence, names or claims.NAMES)

    def headline(self) -> dict[str, float]:
        """The run in one row: what the fine-tune brought by both metrics, what was discarded, and what the selected sets are
        worth. `gain_full` is over all subjects by exact_match, `gain_full_number_theory` of the headline's subject, and either
        with `_math_verify` by that metric."""
        table, split, subject = self.table(), self._split(), self._answers.headline_subject
        found: Any = table.set_index(["variant", "subject", "metric"])
        base = table[table["metric"] == METRICS[0]].drop_duplicates("subject").set_index("subject")["base_accuracy"]
        row = dict(base_accuracy=base[ALL], base_accuracy_min=base.drop(ALL).min(), base_accuracy_max=base.drop(ALL).max())
        for name in ("full", "full_shrunk", "scalpel", *claims.CONTRAST_VARIANT.values()):
            for where, of in (("", ALL), (f"_{subject}", subject)):
                ends = [(f"gain_{name}{where}{end}", metric) for metric, end in zip(METRICS, ("", "_math_verify"), strict=True)]
                row |= {end: found["difference"].get((name, of, metric), nan) for end, metric in ends}
        row[f"p_full_{subject}"] = found["mcnemar_p"]["full", subject, METRICS[0]]
        gains = [row[f"gain_{name}_math_verify"] for name in ("stethoscope", "full_shrunk")]
        row["stethoscope_minus_full_shrunk_math_verify"] = gains[0] - gains[1]
        row |= dict(discarded=1 - split.retained, discarded_by_chance=1 - split.chance, misalignment_index=split.index)
        return row | self._worth_of_sets()

    def _worth_of_sets(self) -> dict[str, float]:
        sets, told = layer_sets.named_sets(self._stethoscope.sets()), self._stethoscope.reliability()
        row = {f"percentile_{contrast}": float(sets["percentile"][name]) for contrast, name in claims.CONTRAST_VARIANT.items()}
        about, apart = layer_sets.reliability_of_sets(told), float(layer_sets.tells_apart(told))
        row |= dict(reliability=about["reliability"], r_held_out=about["r_held_out"], tells_apart=apart)
        rho = self._stethoscope.relations().query("effect == 'effect_alone'").set_index("predictor")["rho"]
        return row | {f"rho_{name}": value for name, value in rho.items()}
