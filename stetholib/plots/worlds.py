"""Figures over many worlds: which claims hold in all of them, and how far their figures spread."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from stetholib.claims import BUILT, HOLDS, SAME
from stetholib.plots import style
from stetholib.plots.style import BLACK, CONTRASTS, GREY, MIST, PALE, SLATE, VARIANTS, WINE

SIGNS = {  # sign -> (what it says, its colour)
    "yes": ("holds", SLATE),
    "no": ("contradicted", WINE),
    "?": ("not testable", PALE),
    "-": (BUILT, GREY),
    "=": (SAME, MIST),
}


def claims_by_world(table: pd.DataFrame, column: str, ax: Axes) -> Axes:
    """One square a claim and world with the sign of its verdict; in how many worlds the claim holds stands at the right."""
    words = {"-": ""} | {contrast: f" {look.name}" for contrast, look in CONTRASTS.items()}
    named = table.assign(row=table["claim"] + table["contrast"].map(words))
    grid = named.pivot(index="row", columns="world", values=column).loc[named["row"].unique()]
    sign_of = {said: sign for sign, (said, _) in SIGNS.items()} | dict.fromkeys(HOLDS, "yes")
    signs = grid.map(sign_of.__getitem__)
    legend = [Patch(color=colour, label=f"{sign}  {said}") for sign, (said, colour) in SIGNS.items()]
    squares = dict(cmap=[colour for _, colour in SIGNS.values()], vmin=0, vmax=len(SIGNS) - 1, cbar=False, linewidths=3)
    sns.heatmap(signs.map([*SIGNS].index), annot=signs, fmt="", annot_kws={"size": 8}, ax=ax, **squares)
    for text in ax.texts:
        text.set_color(max(BLACK, "white", key=partial(style.contrast_of, SIGNS[text.get_text()][1])))
    for row, holds in enumerate((signs == "yes").sum(axis=1)):
        ax.text(grid.shape[1] + 0.1, row + 0.5, f"{holds} of {grid.shape[1]}", va="center", fontsize=9)
    ax.tick_params(length=0, rotation=0)
    ax.set(xlabel="world (seed)", ylabel=None)
    return style.with_legend(ax, below=(0.5, -0.12), handles=legend, ncols=3)


def gains_by_world(worlds: pd.DataFrame, spread: pd.DataFrame, ax: Axes) -> Axes:
    """Gain over the base by math_verify: a hollow mark a world, and by `seeds.spread` their mean with Student's 95 % interval."""
    of: Any = spread.set_index("quantity")
    names = ("full", "full_shrunk", "stethoscope", "stethoscope_matched")
    for at, name in enumerate(names):
        column, look = f"gain_{name}_math_verify", VARIANTS[name]
        mean, low, high = of.loc[column, ["mean", "low", "high"]]
        ax.plot(worlds[column], np.full(len(worlds), at + 0.16), look.marker, color=look.colour, mfc="none")
        ax.errorbar(mean, at - 0.12, xerr=[[mean - low], [high - mean]], fmt=look.marker, color=look.colour, ms=8, capsize=3)
    ax.axvline(0, color=BLACK, lw=0.8)
    style.rows([VARIANTS[name].name for name in names], ax)
    ax.set_xlabel("gain by Math-Verify, in points (hollow: worlds; filled: mean, 95 %)")
    style.percent(ax.xaxis, symbol="")
    return ax


def percentiles_by_world(table: pd.DataFrame, ax: Axes) -> Axes:
    """Percentile of each contrast's selected set among random sets, one dot a world; chance is a half."""
    for shift, (contrast, look) in zip((-0.09, 0.09), CONTRASTS.items(), strict=True):
        ax.plot(table["world"] + shift, table[f"percentile_{contrast}"], look.marker, color=look.colour, ms=8, label=look.name)
    ax.axhline(0.5, color=GREY, ls=":", label="chance")
    ax.axhline(0.95, color=BLACK, lw=0.8, label="better than 95 %")
    style.whole_numbers(ax).set(xlabel="world (seed)", ylim=(-0.03, 1.03), xticks=table["world"])
    ax.set_ylabel("random sets that do worse")
    style.percent(ax.yaxis)
    return style.with_legend(ax, below=(0.5, -0.12), ncols=2)
