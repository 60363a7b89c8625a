"""Figures over many worlds: which claims hold in all of them."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from stetholib.plots.style import BLACK, BLUE, CONTRASTS, GREY, ORANGE, PALE, percent, whole_numbers


def claims_by_world(table: pd.DataFrame, column: str, ax: Axes) -> Axes:
    """One square a claim and world: holds, contradicted, or not testable; the count of worlds stands at the right."""
    words = {"-": ""} | {contrast: f" {look.name}" for contrast, look in CONTRASTS.items()}
    named = table.assign(row=table["claim"] + table["contrast"].map(words))
    grid = named.pivot(index="row", columns="world", values=column).loc[named["row"].unique()]
    signs = grid.map(lambda verdict: {"contradicted": "no", "not testable": "?"}.get(verdict, "yes"))
    squares = dict(cmap=[BLUE, ORANGE, PALE], vmin=0, vmax=2, cbar=False, linewidths=3)
    sns.heatmap(signs.map(["yes", "no", "?"].index), annot=signs, fmt="", annot_kws={"size": 8}, ax=ax, **squares)
    for row, holds in enumerate((signs == "yes").sum(axis=1)):
        ax.text(grid.shape[1] + 0.1, row + 0.5, f"{holds} of {grid.shape[1]}", va="center", fontsize=9)
    ax.tick_params(length=0, rotation=0)
    ax.set(xlabel="world (seed)", ylabel=None)
    return ax


def percentiles_by_world(table: pd.DataFrame, ax: Axes) -> Axes:
    """Percentile of each contrast's selected set among random sets, one dot a world; chance is a half."""
    for shift, (contrast, look) in zip((-0.09, 0.09), CONTRASTS.items(), strict=True):
        ax.plot(table["world"] + shift, table[f"percentile_{contrast}"], look.marker, color=look.colour, ms=8, label=look.name)
    ax.axhline(0.5, color=GREY, ls=":", label="chance")
    ax.axhline(0.95, color=BLACK, lw=0.8, label="better than 95 %")
    whole_numbers(ax).set(xlabel="world (seed)", ylabel="random sets that do worse", ylim=(-0.03, 1.03), xticks=table["world"])
    percent(ax.yaxis)
    ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return ax
