"""Tables as they are shown: words for the names of the code, and no digit more than a reader wants."""

from collections.abc import Collection

import pandas as pd

from stetholib.plots.style import words

P_VALUES = ("p", "p_value", "p_max", "mcnemar_p", "mcnemar_p_holm")


def readable(
    table: pd.DataFrame, digits: int = 3, shares: bool | Collection[str] = (), points: Collection[str] = ()
) -> pd.DataFrame:
    """A table for the eye: names in words, numbers rounded to `digits` places (p-values to two figures), `shares` (columns, or True
    for all) as percentages, `points` (columns of differences of shares) in points; without an index of its own, the first column takes its place."""
    shown = table.set_index(table.columns[0]) if isinstance(table.index, pd.RangeIndex) else table.copy()
    for at, name in enumerate(shown.columns):
        last, column = name[-1] if isinstance(name, tuple) else name, shown.iloc[:, at]
        if pd.api.types.is_float_dtype(column):
            share = shares is True or (shares is not False and last in shares)
            form = "{:+.1f}" if last in points else "{:.1%}" if share else "{:.2g}" if last in P_VALUES else f"{{:.{digits}f}}"
            scale = 100 if last in points else 1
            said = ["" if value != value else form.format(scale * value) for value in column]
        else:
            said = [words(value) for value in column]
        shown.isetitem(at, said)
    shown = shown.rename(columns={name: f"{words(name)} (points)" for name in points}).rename(index=words, columns=words)
    return shown.rename_axis(index=words, columns=words)
