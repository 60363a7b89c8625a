"""Figures of step 04."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from stetholib.layer_sets import named_sets
from stetholib.plots.style import (
    BLACK,
    BLUE,
    CONTRASTS,
    GREEN,
    GREY,
    LOSSES,
    ORANGE,
    PALE,
    RED,
    SELECTORS,
    ink,
    lines,
    percent,
    rows,
    whole_numbers,
)


def layer_scores(table: pd.DataFrame, null: np.ndarray, contrast: str, ax: Axes) -> Axes:
    """Layer scores with the permutation band (2.5 to 97.5 %), the random dictionary's scores, and the selected layers."""
    rows = table[table["contrast"] == contrast]
    low, high = np.quantile(null, [0.025, 0.975], axis=1)
    ax.fill_between(rows["layer"], low, high, color=PALE, label="shuffled labels, 95 %")
    ax.plot(rows["layer"], rows["score_random"], color=GREY, ls=":", marker="x", label="random dictionary")
    lines(rows, "layer", "score", "contrast", CONTRASTS, ax)
    chosen = rows[rows["selected"] == 1]
    ring: dict[str, Any] = dict(s=130, facecolors="none", edgecolors=BLACK, linewidths=1.5, zorder=3)
    ax.scatter(chosen["layer"], chosen["score"], label="selected", **ring)
    whole_numbers(ax).set(xlabel="layer", ylabel="layer score", ylim=(min(0, low.min()), None))
    ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), columnspacing=1)
    return ax


def effects(table: pd.DataFrame, part: str, ax: Axes) -> Axes:
    """What each layer is worth on the validation loss of a part, `solution` or `closing`: injected alone, and left out."""
    rows, of = table[table["contrast"] == "corpus"], {"solution": "effect", "closing": "closing"}[part]
    ax.plot(rows["layer"], rows[f"{of}_left_out"], color=GREEN, marker="^", label="left out of the whole")
    ax.plot(rows["layer"], rows[f"{of}_alone"], color=ORANGE, marker="D", label="injected alone")
    ax.axhline(0, color=BLACK, lw=0.8)
    whole_numbers(ax).set(xlabel="layer", ylabel="fall of the loss (nats a token)")
    ax.legend()
    return ax


def score_against_effect(table: pd.DataFrame, ax: Axes) -> Axes:
    """Layer score against the effect of injecting that layer alone, numbered by layer, one colour a contrast."""
    lines(table, "score", "effect_alone", "contrast", CONTRASTS, ax, ls="none")
    beside: dict[str, Any] = dict(xytext=(4, 3), textcoords="offset points", fontsize=7.5)
    for layer, contrast, *at in table[["layer", "contrast", "score", "effect_alone"]].dropna().to_numpy():
        ax.annotate(str(layer), tuple(at), color=ink(CONTRASTS[contrast].colour), **beside)
    ax.set(xlabel="layer score", ylabel="fall of the loss, injected alone (nats a token)")
    ax.legend()
    return ax


def layer_sets(table: pd.DataFrame, ax: Axes) -> Axes:
    """Solution loss of random sets of m layers as a histogram, every selector's set marked on it (mean of two halves)."""
    random, change = table.loc[table["selector"] == "random", "loss_change"], named_sets(table)["loss_change"]
    sns.histplot(random, bins=30, color=PALE, alpha=1, edgecolor="white", label=f"{len(random)} random sets", ax=ax)
    ax.axvline(random.median(), color=GREY, ls=":", label="their median")
    top = ax.get_ylim()[1]
    for row, name in enumerate(name for name in SELECTORS if name in change):
        look = SELECTORS[name]
        ax.axvline(change[name], color=look.colour, lw=1, alpha=0.6)
        ax.plot(change[name], top * (0.97 - 0.085 * row), look.marker, color=look.colour, ms=8, label=look.name)
    ax.set(xlabel="change of the solution's validation loss (nats a token); left is better", ylabel="sets")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def rules(table: pd.DataFrame, ax: Axes) -> Axes:
    """How many random sets of as many layers each rule's set beats, with 95 % intervals over problems; best on top."""
    named = named_sets(table).dropna(subset=["percentile"]).sort_values("percentile", ascending=False)
    for at, (name, row) in enumerate(named.iterrows()):
        look = SELECTORS.get(str(name))
        colour, ends = look.colour if look else GREY, row[["percentile", "percentile_low", "percentile_high"]].astype(float)
        ax.plot(ends.iloc[1:], [at, at], color=colour, lw=1.5)
        ax.plot(ends.iloc[0], at, look.marker if look else "o", color=colour, ms=7)
    ax.axvline(0.5, color=GREY, ls=":", label="chance")
    ax.axvline(0.95, color=BLACK, lw=0.8, label="better than 95 %")
    rows(map(str, named.index), ax).set(xlabel="random sets of as many layers that do worse", xlim=(-0.02, 1.02))
    percent(ax.xaxis)
    ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.1))
    return ax


def scales(table: pd.DataFrame, sets: pd.DataFrame, ax: Axes) -> Axes:
    """Loss changes of the whole vector against its energy over scales, the stethoscope's set marked at its own energy."""
    ours = named_sets(sets).loc["stethoscope"]
    for part, look in LOSSES.items():
        ax.plot(table["energy"], table[part], color=look.colour, marker=look.marker, ls=look.dash, label=look.name)
        column = {"solution": "loss_change"}.get(part, f"{part}_change")
        ax.plot(ours["energy"], ours[column], look.marker, ms=11, mfc="none", mew=2, color=look.colour)
    ax.plot([], [], "o", ms=11, mfc="none", mew=2, color=BLACK, label="the stethoscope's set")
    ax.axhline(0, color=BLACK, lw=0.8)
    ax.set(xlabel="energy, as a share of the whole vector's", ylabel="change of the loss (nats a token)")
    ax.legend()
    return ax


def uniform_check(p_values: Sequence[float] | np.ndarray, ax: Axes) -> Axes:
    """Sorted p-values of worlds without any signal against the diagonal they should follow."""
    p = np.sort(np.asarray(p_values))
    ax.plot((np.arange(len(p)) + 0.5) / len(p), p, color=BLUE, label=f"{len(p)} worlds without signal")
    ax.plot([0, 1], [0, 1], color=BLACK, lw=0.8, label="uniform")
    ax.set(xlabel="expected p", ylabel="observed p", xlim=(0, 1), ylim=(0, 1))
    ax.legend()
    return ax


def power(table: pd.DataFrame, ax: Axes) -> Axes:
    """Share of worlds in which the planted layer is found, against the planted effect; columns effect, power, chance."""
    ax.plot(table["effect"], table["power"], color=RED, marker="o", label="planted layer heard (p < .05)")
    ax.plot(table["effect"], table["top"], color=BLUE, marker="s", label="planted layer scores highest")
    ax.axhline(0.05, color=BLACK, lw=0.8, label="chance of being heard, .05")
    ax.axhline(table["chance"].iloc[0], color=GREY, ls=":", label="chance of scoring highest")
    ax.set(xlabel="planted effect (standard deviations)", ylabel="share of worlds", ylim=(0, 1.03))
    ax.legend()
    return ax
