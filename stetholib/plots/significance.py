"""Figures of step 06."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from stetholib.plots.style import BLACK, GREY, SLATE, VARIANTS, percent, rows, with_legend


def forest(table: pd.DataFrame, variants: Mapping[str, str], ax: Axes) -> Axes:
    """Paired differences by subject with their intervals, one colour a variant, with zero and the margins; table: one metric's."""
    subjects = ["all", *sorted(set(table["subject"]) - {"all"})]
    at = np.arange(len(subjects))
    by_variant = table.set_index(["variant", "subject"])
    for shift, (variant, name) in zip(np.linspace(-0.28, 0.28, len(variants)), variants.items(), strict=True):
        of, look = by_variant.loc[variant].loc[subjects], VARIANTS.get(variant, VARIANTS["base"])
        error = of["difference"] - of["ci_low"], of["ci_high"] - of["difference"]
        style: dict[str, Any] = dict(ms=5, color=look.colour, capsize=2, label=name)
        ax.errorbar(of["difference"], at + shift, xerr=error, fmt=look.marker, **style)
    ax.vlines(-of["margin"], at - 0.45, at + 0.45, color=GREY, ls=":", label="margin of no worse")
    ax.axvline(0, color=BLACK, lw=0.8)
    rows(subjects, ax).set(xlabel="accuracy beside the base's (points), 95 % interval")
    percent(ax.xaxis, symbol="")
    return with_legend(ax, loc="upper left", bbox_to_anchor=(1.01, 1))


def discordance(curve: pd.DataFrame, ax: Axes) -> Axes:
    """The published gain of 53 problems: McNemar's z against how many problems change their verdict."""
    ax.plot(curve["changed"], curve["z"], color=SLATE, label="McNemar's z for the same gain")
    ax.axhline(curve["unpaired"].iloc[0], color=BLACK, ls="--", label="published z (unpaired)")
    ax.axvline(curve["crossing"].iloc[0], color=GREY, ls=":", label=f"equal at {curve['crossing'].iloc[0]:.0f} of 540")
    ax.set(xlabel="problems whose verdict changes, of 540", ylabel="z", ylim=(0, None))
    return with_legend(ax)
