"""The one room where everything is wired together: a profile, a workspace, and the six steps as cached stages.

    study = Study.open("mini")
    study.layer_selection()        # makes, or finds, all that it stands on

Each step's wiring extends that of the step before, so that data can only flow one way.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from stetholib import claims, significance
from stetholib.study.minerva_math import AnswerSteps, Variant
from stetholib.study.stages import library_versions
from stetholib.subspace_projection import split_loss
from stetholib.workspace import Artefact

__all__ = ["Study", "Variant"]


class Study(AnswerSteps):
    """One profile on one device, with everything that its six steps make; adds step 06 to the five before."""

    @property
    def margins(self) -> significance.Margins:
        """Level and margins, from the profile."""
        p = self.profile.significance
        return significance.Margins(p.level, p.margin, p.margin_subject, p.bootstrap, self._seed("bootstrap"))

    @property
    def headline_subject(self) -> str:
        """The subject of the paper's headline, or the first one where a data set of one's own lacks it."""
        return claims.NUMBER_THEORY if claims.NUMBER_THEORY in self.profile.data.subjects else self.profile.data.subjects[0]

    def paired(self, one: str, other: str) -> dict[str, Any]:
        """Two variants on the same test problems, `other` minus `one`, over all subjects."""
        return significance.paired_against(self.all_records(), one, other, self.margins)

    def significance(self) -> pd.DataFrame:
        """Step 06's table, written and returned."""
        params = [asdict(self.profile.significance), self.profile.seed]
        upstream = [self.records(variant).key for variant in self.variants().values()]
        table = self._stage("significance", params, upstream, [significance]).tables["table"]
        self.workspace.table("06_significance", table)
        return table

    def _make_significance(self, folder: Path) -> Artefact:
        return Artefact(tables={"table": significance.measure(self.all_records(), self.margins)})

    def published(self) -> pd.DataFrame:
        """The published figure by three tests, written and returned."""
        table = significance.published()
        self.workspace.table("06_published", table)
        return table

    def claims(self) -> pd.DataFrame:
        """The ledger of the paper's nine claims, written and returned."""
        evidence = claims.Evidence(
            projection=self.subspace_projection(),
            energies=self.energies,
            rank=self.ranks.default,
            sets=self.layer_sets(),
            scores=self.layer_selection(),
            accuracy=self.minerva_math(),
            significance=self.significance(),
            checks=self.checks(),
            published_rung=self.profile.published_rung,
            level=self.profile.significance.level,
        )
        table = claims.ledger(evidence)
        self.workspace.table("06_claims", table)
        return table

    def headline(self) -> dict[str, float]:
        """The run in one row: what the fine-tune brought, what was discarded, and what the selected sets are worth."""
        split = split_loss(self.subspace_projection(), self.energies, self.ranks.default)
        overall = self.significance().query("subject == 'all'").set_index("variant")["difference"]
        verify = self.minerva_math().query("subject == 'all'").set_index("variant")["math_verify"]
        sets, rho = self.layer_sets().set_index("selector"), self.relations().set_index(["effect", "predictor"])["rho"]
        row = dict(base_accuracy=float(self.significance()["base_accuracy"].iloc[0]))
        row |= {f"gain_{name}": overall[name] for name in ("full", "scalpel", "stethoscope", "stethoscope_matched")}
        row |= dict(gain_full_math_verify=verify["full"] - verify["base"])
        row |= dict(discarded=1 - split.retained, discarded_by_chance=1 - split.chance, misalignment_index=split.index)
        for contrast, name in claims.CONTRAST_VARIANT.items():
            row[f"percentile_{contrast}"] = sets.loc[name, "percentile"]
        return row | {f"rho_{name}": value for name, value in rho["effect_alone"].items()}

    def manifest(self) -> dict[str, Any]:
        """What is stable about this run, written as `manifest.json` and returned."""
        p = self.profile
        stable = dict(
            profile=p.name,
            profile_hash=p.digest,
            seed=p.seed,
            threads=p.threads,
            device=self.device,
            libraries=library_versions(),
            model=dict(base=p.model.base, revision=p.model.revision, dtype=p.model.dtype, key=self.base_key),
            finetune=dict(
                finetuned=p.finetune.finetuned,
                finetuned_revision=p.finetune.finetuned_revision,
                method=None if p.finetune.finetuned else p.finetune.method,
                lora_rank=p.finetune.lora_rank if p.finetune.method == "lora" and not p.finetune.finetuned else None,
            ),
            sae=dict(release=p.sae.release, id=p.sae.sae_id, revision=p.sae.revision, d_sae=self.dictionary(0).d_sae),
            data=dict(
                maths=p.data.maths,
                maths_revision=p.data.maths_revision,
                general=p.data.general,
                general_revision=p.data.general_revision,
            ),
        )
        self.workspace.text("manifest.json", json.dumps(stable, indent=1, sort_keys=True) + "\n")
        return stable
