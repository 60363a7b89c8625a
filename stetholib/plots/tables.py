"""Tables as they are shown: words for the names of the code, and no digit more than a reader wants."""

import re
from collections.abc import Collection
from typing import Any

import pandas as pd

from stetholib.plots.style import BASES, CONTRASTS, VARIANTS

CODE = re.compile(r"[A-Za-z0-9|]+(?:_[A-Za-z0-9]+)+")
NAMES = {key: look.name for key, look in (BASES | CONTRASTS | VARIANTS).items()} | {
    "full": "whole vector",
    "raw": "the raw vector",
    "projected": "projected (the scalpel)",
    "own_svd_matrix": "best for each matrix",
    "l0": "L0",
    "fvu": "FVU",
    "fvu_random": "FVU, random dictionary",
    "fvu_neighbour": "FVU, next layer's stream",
    "l0_random": "L0, random dictionary",
    "score_random": "score, random dictionary",
    "p_value": "p",
    "p_max": "p, largest of all layers",
    "ci_low": "low",
    "ci_high": "high",
    "mcnemar_p": "p (McNemar)",
    "mcnemar_p_holm": "p (McNemar, Holm)",
    "mde": "smallest detectable",
    "r2": "R²",
    "r_held_out": "best beyond median, held out",
    "r_in_sample": "best beyond median, in sample",
    "math_verify": "Math-Verify",
    "cohen_d": "Cohen's d",
    "auroc": "AUROC",
    "taylor": "Taylor",
    "fisher": "Fisher",
    "all": "all subjects",
    "|tau|": "norm of the change",
}
P_VALUES = ("p", "p_value", "p_max", "mcnemar_p", "mcnemar_p_holm")


def words(name: Any) -> Any:
    """A name of the code in words, names within a text too; whatever is no text stays as it is."""
    if not isinstance(name, str):
        return name
    return NAMES.get(name) or CODE.sub(lambda found: NAMES.get(found[0], found[0].replace("_", " ")), name)


def readable(table: pd.DataFrame, digits: int = 3, shares: bool | Collection[str] = ()) -> pd.DataFrame:
    """A table for the eye: names in words, numbers rounded to `digits` places (p-values to two figures), `shares` (columns, or True
    for all) as percentages; without an index of its own, the first column takes its place."""
    shown = table.set_index(table.columns[0]) if isinstance(table.index, pd.RangeIndex) else table.copy()
    for at, name in enumerate(shown.columns):
        last, column = name[-1] if isinstance(name, tuple) else name, shown.iloc[:, at]
        if pd.api.types.is_float_dtype(column):
            share = shares is True or (shares is not False and last in shares)
            form = "{:.1%}" if share else "{:.2g}" if last in P_VALUES else f"{{:.{digits}f}}"
            shown.isetitem(at, ["" if value != value else form.format(value) for value in column])
        else:
            shown.isetitem(at, [words(value) for value in column])
    shown = shown.rename(index=words, columns=words)
    return shown.rename_axis(index=words, columns=words)
