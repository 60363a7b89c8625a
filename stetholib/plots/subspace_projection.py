"""Figures of step 03."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from stetholib.plots.style import BASES, BLACK, GREEN, ORANGE, PALE, RED, SKY, lines, percent, rows, twin_bars


def energy_by_rank(pooled: pd.DataFrame, width: int, ax: Axes) -> Axes:
    """Energy retained against the rank's share of the width, one line a basis, with the chance line rank / d."""
    lines(pooled.assign(share=pooled["rank"] / width), "share", "energy_retained", "basis", BASES, ax, ms=5)
    grid = [rank / width for rank in sorted(pooled["rank"].unique())]
    ax.plot(grid, grid, color=BLACK, lw=0.8, label="chance, rank / d")
    ax.set(xscale="log", yscale="log", xlabel="rank as a share of the width", ylabel="energy retained")
    for axis, ticks in ((ax.xaxis, grid), (ax.yaxis, [0.01, 0.03, 0.1, 0.3, 1.0])):
        axis.set_major_locator(mpl.ticker.FixedLocator(ticks))
        axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda share, _: f"{float(f'{100 * share:.2g}'):g}%"))
        axis.set_minor_formatter(mpl.ticker.NullFormatter())
    return ax


def loss_split(splits: Mapping[str, Any], ax: Axes) -> Axes:
    """Stacked bars of what is kept, lost to misalignment and lost to the rank budget; values are LossSplit."""
    shares = pd.DataFrame({name: (s.retained, s.misalignment, s.rank_budget, s.chance) for name, s in splits.items()})
    at, left = np.arange(len(splits)), np.zeros(len(splits))
    looks = ((GREEN, "kept"), (RED, "lost: misalignment"), (PALE, "lost: rank budget"))
    for part, (colour, label) in enumerate(looks):
        ax.barh(at, shares.loc[part], left=left, color=colour, label=label)
        left = left + shares.loc[part].to_numpy()
    ax.vlines(shares.loc[3], at - 0.4, at + 0.4, color=BLACK, lw=1.5, label="kept by chance")
    rows(splits, ax).set(xlabel="share of the energy", xlim=(0, 1))
    percent(ax.xaxis)
    ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), columnspacing=1)
    return ax


def overlap_by_basis(table: pd.DataFrame, ax: Axes) -> Axes:
    """Mean overlap of each side's best subspace with every kind of direction, readers and writers side by side."""
    order = [name for name in BASES if name in set(table["basis"])]
    twin_bars(table, (SKY, ORANGE), ax, x="basis", y="overlap", order=order, hue="side", hue_order=["reader", "writer"])
    chance = ax.axhline(table["chance"].iloc[0], color=BLACK, lw=0.8)
    ax.set(xlabel="kind of direction", ylabel="overlap with the best subspace")
    ax.set_xticks(range(len(order)), [BASES[name].name.replace(" (the scalpel)", "").replace(" ", "\n") for name in order])
    ax.legend([*ax.containers, chance], ["readers", "writers", "chance"])
    return ax
