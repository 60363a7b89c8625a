"""Figures of step 03."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from stetholib.plots.style import BASES, BLACK, GREY, MIST, ORANGE, PALE, SLATE, ink, lines, percent, rows, twin_bars, with_legend


def projection_in_a_plane(ax: Axes, degrees: float = 55.0) -> Axes:
    """What one direction keeps of a vector, drawn in two dimensions: the squared cosine of their angle."""
    angle = np.radians(degrees)
    vector, along = (np.cos(angle), np.sin(angle)), np.cos(angle)
    ax.axhline(0, color=GREY, lw=0.8)
    for (x, y), colour, name, place in ((vector, BLACK, "the change", (-6, 6)), ((along, 0), ORANGE, "what is kept", (-20, -14))):
        ax.annotate("", (x, y), (0, 0), arrowprops=dict(arrowstyle="-|>", color=colour, lw=2, shrinkA=0, shrinkB=0))
        ax.annotate(name, (x, y), xytext=place, textcoords="offset points", color=ink(colour), ha="right" if y else "center")
    ax.plot([along, along], [0, vector[1]], color=GREY, ls=":")
    ax.set(xlim=(-0.25, 1.05), ylim=(-0.25, 1.0), aspect="equal", xticks=[], yticks=[])
    ax.set(xlabel="along a direction", ylabel="across it")
    ax.spines[:].set_visible(False)
    ax.set_title(f"At {degrees:.0f}°, one direction keeps {along**2:.0%}")
    return ax


def chance_by_width(ax: Axes, widths: tuple[int, int] = (2, 2560)) -> Axes:
    """The squared cosine of a vector with a direction drawn at random: its mean 1 / d, and where nine of ten draws lie, which is
    Beta(1/2, (d - 1)/2)."""
    d = np.geomspace(*widths, 60)
    kept = stats.beta(0.5, (d - 1) / 2)
    ax.fill_between(d, kept.ppf(0.05), kept.ppf(0.95), color=PALE, label="90 % of draws")
    ax.plot(d, 1 / d, color=BLACK, lw=1.5, label="mean, 1 / d")
    ax.set(xscale="log", yscale="log", ylim=(1e-5, 1.2), xlabel="width d", ylabel="energy kept by one direction")
    ax.set_title(f"In {widths[1]} dimensions,\na random direction keeps {1 / widths[1]:.2%}")
    return with_legend(ax, loc="lower left")


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
    looks = ((ORANGE, "kept"), (SLATE, "lost: misalignment"), (PALE, "lost: rank budget"))
    for part, (colour, label) in enumerate(looks):
        ax.barh(at, shares.loc[part], left=left, color=colour, label=label)
        left = left + shares.loc[part].to_numpy()
    ax.vlines(shares.loc[3], at - 0.4, at + 0.4, color=BLACK, lw=1.5, label="kept by chance")
    rows(["all matrices" if name == "all" else name for name in splits], ax).set(xlabel="share of the energy", xlim=(0, 1))
    percent(ax.xaxis)
    return with_legend(ax, below=(0.5, -0.25), ncols=4, columnspacing=1)


def overlap_by_basis(table: pd.DataFrame, ax: Axes) -> Axes:
    """Mean overlap of each side's best subspace with every kind of direction, readers and writers side by side."""
    order = [name for name in BASES if name in set(table["basis"])]
    twin_bars(table, (SLATE, MIST), ax, x="basis", y="overlap", order=order, hue="side", hue_order=["reader", "writer"])
    chance = ax.axhline(table["chance"].iloc[0], color=BLACK, lw=0.8)
    ax.set(xlabel="kind of direction", ylabel="overlap with the best subspace")
    ax.set_xticks(range(len(order)), [BASES[name].name.replace(" (the scalpel)", "").replace(" ", "\n") for name in order])
    return with_legend(ax, [*ax.containers, chance], ["readers", "writers", "chance"])
