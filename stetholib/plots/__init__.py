"""Plots: each takes tidy data and an axis, draws, and returns the axis. Those of the six steps stand in their order, then
those over many worlds; `style` holds what all share.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from stetholib.plots import style
from stetholib.plots.style import bars_with_zero, labelled, panels, save


def loss_curve(curve: pd.DataFrame, ax: Axes) -> Axes:
    """Training loss by step; columns step, loss."""
    ax.plot(curve["step"], curve["loss"], color=style.BLUE)
    ax.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    return ax


def matrix_heatmap(table: pd.DataFrame, value: str, label: str, ax: Axes) -> Axes:
    """A value by layer and matrix, readers above writers."""
    grid = table.pivot(index="matrix", columns="layer", values=value).loc[["q", "k", "v", "gate", "up", "o", "down"]]
    sns.heatmap(grid, cmap="cividis", vmin=0, cbar_kws={"label": label}, ax=ax)
    ax.axhline(5, color="white", lw=2)
    ax.tick_params(rotation=0)
    return ax


def layer_bars(values: Sequence[float], label: str, ax: Axes, even: float | None = None) -> Axes:
    """One bar a layer; `even` draws what an even spread would be."""
    ax.bar(range(len(values)), values, color=style.BLUE)
    if even is not None:
        ax.axhline(even, color=style.GREY, ls=":", label="even spread")
        ax.legend()
    style.whole_numbers(ax).set(xlabel="layer", ylabel=label)
    return ax


def self_test(table: pd.DataFrame, ax: Axes) -> Axes:
    """Fraction of variance unexplained by layer, SAE against a random dictionary, with the anchors 0 and 1."""
    ax.axhline(1, color=style.BLACK, lw=0.8)
    ax.text(0, 1.02, "1: always answering the mean", fontsize=8)
    ax.plot(table["layer"], table["fvu_random"], color=style.GREY, ls=":", marker="x", label="random dictionary, same L0")
    ax.plot(table["layer"], table["fvu"], color=style.BASES["sae_decoder"].colour, marker="o", label="SAE")
    style.whole_numbers(ax).set(xlabel="layer", ylabel="variance unexplained", ylim=(0, 1.12))
    ax.legend(loc="center left", bbox_to_anchor=(0, 0.36))
    return ax


def by_layer(table: pd.DataFrame, value: str, label: str, ax: Axes) -> Axes:
    """A value by layer under each contrast."""
    style.lines(table, "layer", value, "contrast", style.CONTRASTS, style.whole_numbers(ax)).set(xlabel="layer", ylabel=label)
    ax.legend()
    return ax


def energy_by_rank(pooled: pd.DataFrame, width: int, ax: Axes) -> Axes:
    """Energy retained against the rank's share of the width, one line a basis, with the chance line rank / d."""
    style.lines(pooled.assign(share=pooled["rank"] / width), "share", "energy_retained", "basis", style.BASES, ax, ms=5)
    grid = [rank / width for rank in sorted(pooled["rank"].unique())]
    ax.plot(grid, grid, color=style.BLACK, lw=0.8, label="chance, rank / d")
    ax.set(xscale="log", yscale="log", xlabel="rank as a share of the width", ylabel="energy retained")
    for axis, ticks in ((ax.xaxis, grid), (ax.yaxis, [0.01, 0.03, 0.1, 0.3, 1.0])):
        axis.set_major_locator(mpl.ticker.FixedLocator(ticks))
        axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda share, _: f"{100 * share:.2g}%"))
        axis.set_minor_formatter(mpl.ticker.NullFormatter())
    return ax


def loss_split(splits: Mapping[str, Any], ax: Axes) -> Axes:
    """Stacked bars of what is kept, lost to misalignment and lost to the rank budget; values are LossSplit."""
    shares = pd.DataFrame({name: (s.retained, s.misalignment, s.rank_budget, s.chance) for name, s in splits.items()})
    at, left = np.arange(len(splits)), np.zeros(len(splits))
    looks = ((style.GREEN, "kept"), (style.RED, "lost: misalignment"), (style.PALE, "lost: rank budget"))
    for part, (colour, label) in enumerate(looks):
        ax.barh(at, shares.loc[part], left=left, color=colour, label=label)
        left = left + shares.loc[part].to_numpy()
    ax.vlines(shares.loc[3], at - 0.4, at + 0.4, color=style.BLACK, lw=1.5, label="kept by chance")
    style.rows(splits, ax).set(xlabel="share of the energy", xlim=(0, 1))
    style.percent(ax.xaxis)
    ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), columnspacing=1)
    return ax


def overlap_by_basis(table: pd.DataFrame, ax: Axes) -> Axes:
    """Mean overlap of each side's best subspace with every kind of direction, readers and writers side by side."""
    order = [name for name in style.BASES if name in set(table["basis"])]
    style.twin_bars(
        table, (style.SKY, style.ORANGE), ax, x="basis", y="overlap", order=order, hue="side", hue_order=["reader", "writer"]
    )
    chance = ax.axhline(table["chance"].iloc[0], color=style.BLACK, lw=0.8)
    ax.set(xlabel="kind of direction", ylabel="overlap with the best subspace")
    ax.set_xticks(range(len(order)), [style.BASES[name].name.replace(" (the scalpel)", "").replace(" ", "\n") for name in order])
    ax.legend([*ax.containers, chance], ["readers", "writers", "chance"])
    return ax


def layer_scores(table: pd.DataFrame, null: np.ndarray, contrast: str, ax: Axes) -> Axes:
    """Layer scores with the permutation band (2.5 to 97.5 %), the random dictionary's scores, and the selected layers."""
    rows = table[table["contrast"] == contrast]
    low, high = np.quantile(null, [0.025, 0.975], axis=1)
    ax.fill_between(rows["layer"], low, high, color=style.PALE, label="shuffled labels, 95 %")
    ax.plot(rows["layer"], rows["score_random"], color=style.GREY, ls=":", marker="x", label="random dictionary")
    style.lines(rows, "layer", "score", "contrast", style.CONTRASTS, ax)
    chosen = rows[rows["selected"] == 1]
    ring: dict[str, Any] = dict(s=130, facecolors="none", edgecolors=style.BLACK, linewidths=1.5, zorder=3)
    ax.scatter(chosen["layer"], chosen["score"], label="selected", **ring)
    style.whole_numbers(ax).set(xlabel="layer", ylabel="layer score", ylim=(min(0, low.min()), None))
    ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), columnspacing=1)
    return ax


def effects(table: pd.DataFrame, ax: Axes) -> Axes:
    """What each layer is worth on the validation loss: injected alone, and left out of the whole."""
    rows = table[table["contrast"] == "corpus"]
    ax.plot(rows["layer"], rows["effect_left_out"], color=style.GREEN, marker="^", label="left out of the whole")
    ax.plot(rows["layer"], rows["effect_alone"], color=style.ORANGE, marker="D", label="injected alone")
    ax.axhline(0, color=style.BLACK, lw=0.8)
    style.whole_numbers(ax).set(xlabel="layer", ylabel="effect (nats a token)")
    ax.legend()
    return ax


def score_against_effect(table: pd.DataFrame, ax: Axes) -> Axes:
    """Layer score against the effect of injecting that layer alone, numbered by layer, one colour a contrast."""
    style.lines(table, "score", "effect_alone", "contrast", style.CONTRASTS, ax, ls="none")
    beside: dict[str, Any] = dict(xytext=(4, 3), textcoords="offset points", fontsize=7.5)
    for layer, contrast, *at in table[["layer", "contrast", "score", "effect_alone"]].to_numpy():
        ax.annotate(str(layer), tuple(at), color=style.CONTRASTS[contrast].colour, **beside)
    ax.set(xlabel="layer score", ylabel="effect alone (nats a token)")
    ax.legend()
    return ax


def layer_sets(table: pd.DataFrame, ax: Axes) -> Axes:
    """Loss change of random sets of m layers as a histogram, every selector's set marked on it."""
    change = table.set_index("selector")["loss_change"]
    random = change["random"]
    sns.histplot(random, bins=30, color=style.PALE, alpha=1, edgecolor="white", label=f"{len(random)} random sets", ax=ax)
    ax.axvline(random.median(), color=style.GREY, ls=":", label="their median")
    top = ax.get_ylim()[1]
    for row, name in enumerate(name for name in style.SELECTORS if name in change):
        look = style.SELECTORS[name]
        ax.axvline(change[name], color=look.colour, lw=1, alpha=0.6)
        ax.plot(change[name], top * (0.97 - 0.085 * row), look.marker, color=look.colour, ms=8, label=look.name)
    ax.set(xlabel="change of validation loss (nats a token); left is better", ylabel="sets")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def uniform_check(p_values: Sequence[float] | np.ndarray, ax: Axes) -> Axes:
    """Sorted p-values of worlds without any signal against the diagonal they should follow."""
    p = np.sort(np.asarray(p_values))
    ax.plot((np.arange(len(p)) + 0.5) / len(p), p, color=style.BLUE, label=f"{len(p)} worlds without signal")
    ax.plot([0, 1], [0, 1], color=style.BLACK, lw=0.8, label="uniform")
    ax.set(xlabel="expected p", ylabel="observed p", xlim=(0, 1), ylim=(0, 1))
    ax.legend()
    return ax


def power(table: pd.DataFrame, ax: Axes) -> Axes:
    """Share of worlds in which the planted layer is found, against the planted effect; columns effect, power, chance."""
    ax.plot(table["effect"], table["power"], color=style.RED, marker="o", label="planted layer heard (p < .05)")
    ax.plot(table["effect"], table["top"], color=style.BLUE, marker="s", label="planted layer scores highest")
    ax.axhline(0.05, color=style.BLACK, lw=0.8, label="chance of being heard, .05")
    ax.axhline(table["chance"].iloc[0], color=style.GREY, ls=":", label="chance of scoring highest")
    ax.set(xlabel="planted effect (standard deviations)", ylabel="share of worlds", ylim=(0, 1.03))
    ax.legend()
    return ax


def accuracies(table: pd.DataFrame, subject: str, order: Sequence[str], ax: Axes) -> Axes:
    """Accuracy of every variant on a subject (or `all`) with 95 % intervals of the harness's standard error."""
    of = table[table["subject"] == subject].set_index("variant").loc[list(order)]
    ax.errorbar(
        of["accuracy"], np.arange(len(of)), xerr=1.96 * of["stderr"], fmt="o", color=style.BLUE, ecolor=style.SKY, capsize=2
    )
    ax.axvline(of["accuracy"]["base"], color=style.GREY, ls=":", label="base")
    style.rows(order, ax).set(xlabel="accuracy (exact match)", xlim=(0, None))
    style.percent(ax.xaxis)
    ax.legend(loc="lower left")
    return ax


def gain_split(table: pd.DataFrame, variants: Sequence[str], ax: Axes) -> Axes:
    """The gain over the base, split into problems readable under both models and problems whose readability changed."""
    names = {"gain_both_extractable": "answer readable under both", "gain_format_bound": "readability changed (bounds format)"}
    parts = table[table["subject"] == "all"].melt("variant", list(names))
    style.twin_bars(
        parts, (style.BLUE, style.ORANGE), ax, x="value", y="variant", order=list(variants), hue="variable", hue_order=list(names)
    )
    ax.axvline(0, color=style.BLACK, lw=0.8)
    style.rows(variants, ax).set(xlabel="part of the gain in accuracy", ylabel=None)
    style.percent(ax.xaxis)
    ax.legend(ax.containers, names.values(), loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2)
    return ax


def token_limits(table: pd.DataFrame, names: Mapping[str, str], ax: Axes) -> Axes:
    """Accuracy against the token limit, one line a variant; columns variant, limit, accuracy."""
    looks = {key: style.VARIANTS.get(key, style.VARIANTS["base"])._replace(name=name) for key, name in names.items()}
    style.lines(table, "limit", "accuracy", "variant", looks, ax, ms=4)
    ax.axvline(table["limit"].max(), color=style.BLACK, lw=0.8, ls=":", label="the limit that was used")
    ax.set(xlabel="limit on new tokens", ylabel="accuracy (exact match)", ylim=(0, None))
    style.percent(ax.yaxis)
    ax.legend(loc="lower right")
    return ax


def forest(table: pd.DataFrame, variants: Mapping[str, str], ax: Axes) -> Axes:
    """Paired differences by subject with bootstrap intervals, one colour a variant, with zero and the margins."""
    subjects = ["all", *sorted(set(table["subject"]) - {"all"})]
    at = np.arange(len(subjects))
    by_variant = table.set_index(["variant", "subject"])
    for shift, (variant, name) in zip(np.linspace(-0.28, 0.28, len(variants)), variants.items(), strict=True):
        of, look = by_variant.loc[variant].loc[subjects], style.VARIANTS.get(variant, style.VARIANTS["base"])
        error = of["difference"] - of["ci_low"], of["ci_high"] - of["difference"]
        ax.errorbar(of["difference"], at + shift, xerr=error, fmt=look.marker, ms=5, color=look.colour, capsize=2, label=name)
    ax.vlines(-of["margin"], at - 0.45, at + 0.45, color=style.GREY, ls=":", label="margin")
    ax.axvline(0, color=style.BLACK, lw=0.8)
    style.rows(subjects, ax).set(xlabel="difference in accuracy to the base (points), 95 % paired interval")
    style.percent(ax.xaxis, symbol="")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def discordance(curve: pd.DataFrame, ax: Axes) -> Axes:
    """The published gain of 53 problems: McNemar's z against how many problems change their verdict."""
    ax.plot(curve["changed"], curve["z"], color=style.BLUE, label="McNemar's z for the same gain")
    ax.axhline(curve["unpaired"].iloc[0], color=style.RED, ls="--", label="published z (unpaired)")
    ax.axvline(curve["crossing"].iloc[0], color=style.GREY, ls=":", label=f"equal at {curve['crossing'].iloc[0]:.0f} of 540")
    ax.set(xlabel="problems whose verdict changes, of 540", ylabel="z", ylim=(0, None))
    ax.legend()
    return ax


def claims_by_world(table: pd.DataFrame, column: str, ax: Axes) -> Axes:
    """One square a claim and world: holds, contradicted, or not testable; the count of worlds stands at the right."""
    words = {"-": ""} | {contrast: f" {look.name}" for contrast, look in style.CONTRASTS.items()}
    named = table.assign(row=table["claim"] + table["contrast"].map(words))
    grid = named.pivot(index="row", columns="world", values=column).loc[named["row"].unique()]
    signs = grid.map(lambda verdict: {"contradicted": "no", "not testable": "?"}.get(verdict, "yes"))
    squares = dict(cmap=[style.BLUE, style.ORANGE, style.PALE], vmin=0, vmax=2, cbar=False, linewidths=3)
    sns.heatmap(signs.map(["yes", "no", "?"].index), annot=signs, fmt="", annot_kws={"size": 8}, ax=ax, **squares)
    for row, holds in enumerate((signs == "yes").sum(axis=1)):
        ax.text(grid.shape[1] + 0.1, row + 0.5, f"{holds} of {grid.shape[1]}", va="center", fontsize=9)
    ax.tick_params(length=0, rotation=0)
    ax.set(xlabel="world (seed)", ylabel=None)
    return ax


def percentiles_by_world(table: pd.DataFrame, ax: Axes) -> Axes:
    """Percentile of each contrast's selected set among random sets, one dot a world; chance is a half."""
    for shift, (contrast, look) in zip((-0.09, 0.09), style.CONTRASTS.items(), strict=True):
        ax.plot(table["world"] + shift, table[f"percentile_{contrast}"], look.marker, color=look.colour, ms=8, label=look.name)
    ax.axhline(0.5, color=style.GREY, ls=":", label="chance")
    ax.axhline(0.95, color=style.BLACK, lw=0.8, label="better than 95 %")
    style.whole_numbers(ax).set(
        xlabel="world (seed)", ylabel="random sets that do worse", ylim=(-0.03, 1.03), xticks=table["world"]
    )
    style.percent(ax.yaxis)
    ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return ax
