"""Step 06 wired to a world: tests of what the records say, and the ledger."""

from collections.abc import Sequence

import pandas as pd

from stetholib import claims, significance
from stetholib.models.subspaces import split_loss
from stetholib.significance import Margins
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

    def table(self) -> pd.DataFrame:
        """Step 06's table."""
        return self._store.made(significance.measure, self._answers.records(), self.margins).value

    def published(self) -> pd.DataFrame:
        """The published figure by three tests."""
        return significance.published()

    def pairs(self, wanted: Sequence[tuple[str, str]]) -> pd.DataFrame:
        """Pairs of variants on the same test problems, first minus second, over all subjects; one row a pair."""
        return self._store.made(significance.pairs_table, self._answers.records(), list(wanted), self.margins).value

    def claims(self) -> pd.DataFrame:
        """The ledger of the paper's nine claims."""
        evidence = claims.Evidence(
            projection=self._scalpel.table(),
            energies=self._vectors.energies(),
            rank=self._scalpel.ranks.default,
            sets=self._stethoscope.sets(),
            significance=self.table(),
            checks=self._answers.checks(),
            published_rung=self._profile.published_rung,
            level=self._profile.significance.level,
        )
        return claims.ledger(evidence)

    def headline(self) -> dict[str, float]:
        """The run in one row: what the fine-tune brought, what was discarded, and what the selected sets are worth."""
        split = split_loss(self._scalpel.table(), self._vectors.energies(), self._scalpel.ranks.default)
        table = self.table()
        overall = table.query("subject == 'all'").set_index("variant")["difference"]
        verify = self._answers.table().query("subject == 'all'").set_index("variant")["math_verify"]
        sets, rho = self._stethoscope.sets().set_index("selector"), self._stethoscope.relations()
        row = dict(base_accuracy=float(table["base_accuracy"].iloc[0]))
        row |= {f"gain_{name}": overall[name] for name in ("full", "scalpel", "stethoscope", "stethoscope_matched")}
        row["gain_full_math_verify"] = verify["full"] - verify["base"]
        row |= dict(discarded=1 - split.retained, discarded_by_chance=1 - split.chance, misalignment_index=split.index)
        for contrast, name in claims.CONTRAST_VARIANT.items():
            row[f"percentile_{contrast}"] = float(sets["percentile"][name])
        alone = rho[rho["effect"] == "effect_alone"].set_index("predictor")["rho"]
        return row | {f"rho_{name}": value for name, value in alone.items()}
