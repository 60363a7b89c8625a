"""The tables that a run leaves, by contract, and the folders of a profile: the only place that knows a path."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from stetholib.errors import UserError
from stetholib.store.files import atomic, repository

# file stem | key columns | further columns; more columns may follow
TABLES = """
01_task_vectors | layer matrix | side base_norm delta_norm relative energy_share stable_rank;
02_sae_features | layer contrast | d_sae l0 fvu fvu_random alive top_feature top_specificity refused;
03_subspace_projection | layer matrix basis rank sae_layer gains | side energy_retained energy_sd chance;
04_layer_selection | layer contrast | score score_random p_value p_max selection_share selected
    effect_alone effect_left_out closing_alone closing_left_out;
04_layer_sets | selector draw | contrast layers alpha energy loss_change closing_change general_change
    percentile percentile_low percentile_high closing_percentile;
04_reliability | what loss | n reliability r_held_out r_in_sample;
05_minerva_math | variant subject | n correct accuracy stderr math_verify extractable truncated
    accuracy_given_extractable mean_tokens general_loss;
06_significance | variant subject metric | n base_accuracy accuracy difference ci_low ci_high z p z_pooled gained lost
    mcnemar_p mcnemar_p_holm gain_both_extractable gain_format_bound mde mde_unpaired ci_low_family ci_high_family margin verdict;
06_published | test | base_correct edited_correct n z p;
06_claims | claim contrast | statement published measured testable verdict verdict_strict rule notebook command minutes
"""
CONTRACTS: dict[str, tuple[list[str], list[str]]] = {
    stem.strip(): (keys.split(), columns.split()) for stem, keys, columns in (row.split("|") for row in TABLES.split(";"))
}
# left only where it is known which layers mathematics went into
KNOWN_LAYERS = "contrast layers auroc overlap exact share percentile percentile_low percentile_high"
FURTHER = {"04_known_layers": (["selector"], KNOWN_LAYERS.split())}


class WorkspaceError(UserError):
    """Something on disk is not as it must be; the message is one line."""


class Workspace:
    """The folders of one profile."""

    def __init__(self, name: str, root: Path | None = None) -> None:
        """name: the profile's; root: where `runs/` and `figures/` lie, the repository by default."""
        self.root = Path(root) if root else repository()
        self.runs = self.root / "runs" / name
        self.figures = self.root / "figures" / name
        self.store, self.records, self.executed = (self.runs / part for part in ("store", "records", "notebooks"))
        self.usual: Workspace | None = None  # the profile's own, of one that is overridden

    @classmethod
    def of(cls, name: str, digest: str, overrides: Mapping[str, Any], root: Path | None = None) -> "Workspace":
        """The folders of a profile with single keys overridden: named for what is overridden, beside the profile's own, with the
        same store. digest: of the profile so overridden."""
        usual = cls(name, root)
        if not overrides:
            return usual
        said = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in sorted(overrides.items()))
        apart = cls(f"{name}--{re.sub(r'[^A-Za-z0-9._]+', '-', said).strip('-.')[:48]}-{digest[:6]}", root)
        apart.store, apart.usual = usual.store, usual
        return apart

    def over_worlds(self) -> tuple[Path, Path]:
        """Where `make seeds` of this profile and `make organisms` leave how every rule does, beside `figures/<profile>/`."""
        figures, name = self.figures.parent, self.figures.name
        worlds = figures / ("seeds" if name == "mini" else f"seeds-{name}") / "selectors.csv"
        return worlds, figures / "seeds-organism" / "known_layers.csv"

    def table(self, stem: str, table: pd.DataFrame) -> Path:
        """Write a contract's table as `figures/<profile>/<stem>.csv`, checked, sorted by key, floats as %.6g."""
        keys, columns = (CONTRACTS | FURTHER)[stem]
        if missing := [name for name in keys + columns if name not in table]:
            raise WorkspaceError(f"{stem}.csv: column {missing[0]!r} is missing")
        if len(again := table.loc[table.duplicated(keys), keys]):
            raise WorkspaceError(f"{stem}.csv: two rows share the key {again.iloc[0].to_dict()}")
        ordered = keys + columns + [name for name in table if name not in keys + columns]
        text = table[ordered].sort_values(keys).to_csv(index=False, float_format="%.6g", lineterminator="\n")
        return self.text(f"{stem}.csv", text)

    def read_table(self, stem: str) -> pd.DataFrame:
        """A contract's table as written; says which notebook makes it where it is not there."""
        path = self.figures / f"{stem}.csv"
        if not path.is_file():
            raise WorkspaceError(f"{path.relative_to(self.root)} is not there yet; run notebook {stem[:2]} first")
        return pd.read_csv(path)

    def text(self, name: str, text: str) -> Path:
        """Write a file into `figures/<profile>/`, whole or not at all."""
        return self.file(name, lambda path: path.write_text(text, encoding="utf-8"))

    def file(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Have `write(path)` make a file of `figures/<profile>/`, whole or not at all."""
        return atomic(self.figures / name, write)
