"""Figures of step 04."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from stetholib.layer_sets import named_sets
from stetholib.plots import style
from stetholib.plots.style import BLACK, CONTRASTS, GREY, LOSSES, PALE, SELECTORS, SLATE


def layer_scores(table: pd.DataFrame, null: np.ndarray, contrast: str, ax: Axes) -> Axes:
    """Layer scores with the permutation band (2.5 to 97.5 %), the random dictionary's scores, and the selected layers."""
    rows = table[table["contrast"] == contrast]
    low, high = np.quantile(null, [0.025, 0.975], axis=1)
    ax.fill_between(rows["layer"], low, high, color=PALE, label="shuffled labels, 95 %")
    ax.plot(rows["layer"], rows["score_random"], color=GREY, ls=":", marker="x", label="random dictionary")
    style.lines(rows, "layer", "score", "contrast", CONTRASTS, ax)
    chosen = rows[rows["selected"] == 1]
    ring: dict[str, Any] = dict(s=130, facecolors="none", edgecolors=BLACK, linewidths=1.5, zorder=3)
    ax.scatter(chosen["layer"], chosen["score"], label="selected", **ring)
    style.whole_numbers(ax).set(xlabel="layer", ylabel="layer score", ylim=(min(0, low.min()), None))
    return style.with_legend(ax, below=(0.5, -0.16), ncols=4, columnspacing=1)


def effects(table: pd.DataFrame, part: str, ax: Axes) -> Axes:
    """What each layer is worth on the validation loss of a part, `solution` or `closing`: injected alone, and left out."""
    rows, of = table[table["contrast"] == "corpus"], {"solution": "effect", "closing": "closing"}[part]
    ax.plot(rows["layer"], rows[f"{of}_left_out"], color=SLATE, ls="--", marker="^", mfc="white", label="left out of the whole")
    ax.plot(rows["layer"], rows[f"{of}_alone"], color=SLATE, marker="D", label="injected alone")
    ax.axhline(0, color=BLACK, lw=0.8)
    style.whole_numbers(ax).set(xlabel="layer", ylabel="fall of the loss (nats a token)")
    return style.with_legend(ax)


def score_against_effect(table: pd.DataFrame, ax: Axes) -> Axes:
    """Layer score against the effect of injecting that layer alone, numbered by layer, one colour a contrast."""
    style.lines(table, "score", "effect_alone", "contrast", CONTRASTS, ax, ls="none")
    beside: dict[str, Any] = dict(xytext=(4, 3), textcoords="offset points", fontsize=7.5)
    for layer, contrast, *at in table[["layer", "contrast", "score", "effect_alone"]].dropna().to_numpy():
        ax.annotate(str(layer), tuple(at), color=style.ink(CONTRASTS[contrast].colour), **beside)
    ax.set(xlabel="layer score", ylabel="fall of the loss, injected alone (nats a token)")
    return style.with_legend(ax)


def layer_sets(table: pd.DataFrame, ax: Axes) -> Axes:
    """Solution loss of random sets of m layers, a stroke each in the first row, and below, best first, of the set of every rule that
    has a look (mean of two halves); the band holds 95 % of the random sets."""
    random, change = table.loc[table["selector"] == "random", "loss_change"], named_sets(table)["loss_change"]
    shown = change[change.index.isin([*SELECTORS])].sort_values()
    ax.axvspan(*random.quantile([0.025, 0.975]), color=PALE, lw=0, label="95 % of the random sets", zorder=0)
    ax.axvline(random.median(), color=GREY, ls=":", label="their median")
    ax.plot(random, np.zeros(len(random)), "|", color=GREY, ms=12, alpha=0.5)
    for at, (name, value) in enumerate(shown.items(), 1):
        ax.plot(value, at, SELECTORS[str(name)].marker, color=SELECTORS[str(name)].colour, ms=8)
    style.rows([f"{len(random)} random sets", *map(str, shown.index)], ax)
    ax.set_xlabel("change of the solution's validation loss (nats a token); left is better")
    return style.with_legend(ax, below=(0.4, -0.13), ncols=2)


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
    style.rows(map(str, named.index), ax).set(xlabel="random sets of as many layers that do worse", xlim=(-0.02, 1.02))
    style.percent(ax.xaxis)
    return style.with_legend(ax, below=(0.45, -0.1), ncols=2)


def scales(table: pd.DataFrame, sets: pd.DataFrame, ax: Axes) -> Axes:
    """Loss changes of the whole vector against its energy over scales, and those of the stethoscope's set at its own energy."""
    ours, (shrunk, chosen) = named_sets(sets).loc["stethoscope"], (SELECTORS[name] for name in ("full_shrunk", "stethoscope"))
    for part, look in LOSSES.items():
        label = f"all layers: {look.name}"
        ax.plot(table["energy"], table[part], color=shrunk.colour, marker=look.marker, ls=look.dash, label=label)
    for part, look in LOSSES.items():
        value, label = ours[{"solution": "loss_change"}.get(part, f"{part}_change")], f"stethoscope's: {look.name}"
        ax.plot(ours["energy"], value, look.marker, ms=10, mfc="none", mew=2, color=chosen.colour, label=label)
    ax.axhline(0, color=BLACK, lw=0.8)
    ax.set(xlabel="energy, as a share of the whole vector's", ylabel="change of the loss (nats a token)")
    return style.with_legend(ax, below=(0.5, -0.17), ncols=2)


def uniform_check(p_values: Sequence[float] | np.ndarray, ax: Axes) -> Axes:
    """Sorted p-values of worlds without any signal against the diagonal they should follow."""
    p = np.sort(np.asarray(p_values))
    ax.plot((np.arange(len(p)) + 0.5) / len(p), p, color=SLATE, label=f"{len(p)} worlds without signal")
    ax.plot([0, 1], [0, 1], color=BLACK, lw=0.8, label="uniform")
    ax.set(xlabel="expected p", ylabel="observed p", xlim=(0, 1), ylim=(0, 1))
    return style.with_legend(ax)


def power(table: pd.DataFrame, ax: Axes) -> Axes:
    """Share of worlds in which the planted layer is found, against the planted effect; columns effect, power, chance."""
    ax.plot(table["effect"], table["power"], color=SLATE, marker="o", label="planted layer significant (p < .05)")
    ax.plot(table["effect"], table["top"], color=SLATE, ls="--", marker="s", mfc="white", label="planted layer scores highest")
    ax.axhline(0.05, color=BLACK, lw=0.8, label="chance of significance, .05")
    ax.axhline(table["chance"].iloc[0], color=GREY, ls=":", label="chance of scoring highest")
    ax.set(xlabel="planted effect (standard deviations)", ylabel="share of worlds", ylim=(0, 1.03))
    return style.with_legend(ax)
