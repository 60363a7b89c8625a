"""Plots: each takes tidy data and an axis, draws, and returns the axis; nothing is computed here.

Colours are Okabe and Ito's, which survive colour blindness, and every series has a marker or dash of its own.
Chance and ceiling are drawn wherever they exist.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = [
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
]
GREY = "#8C8C8C"
BASIS = {
    "own_svd_matrix": ("best for each matrix", GREEN, "--", "^"),
    "own_svd": ("best for each side (ceiling)", GREEN, "-", "o"),
    "gradient_pca": ("gradient components", PURPLE, "-", "D"),
    "activation_pca": ("activation components", BLUE, "-", "s"),
    "sae_decoder": ("SAE decoder (the scalpel)", RED, "-", "o"),
    "sae_encoder": ("SAE encoder", ORANGE, "--", "v"),
    "random": ("random subspaces", GREY, ":", "x"),
}
CONTRAST = {"corpus": ("all tokens", RED, "o"), "matched": ("matched words", BLUE, "s")}
SELECTOR = {
    "greedy": (GREEN, "*"),
    "stethoscope": (RED, "o"),
    "stethoscope_matched": (BLUE, "s"),
    "largest_norm": (ORANGE, "D"),
    "small_step": (PURPLE, "P"),
    "middle": (SKY, "^"),
    "last": (BLACK, ">"),
    "least_specific": (GREY, "v"),
}
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "stetholib",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


def panels(columns: int = 1, rows: int = 1, width: float = 6.4, height: float = 3.8, **options: Any) -> tuple[Figure, Any]:
    """A figure with a grid of axes in the project's style."""
    mpl.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), **options)


def labelled(figure: Figure, title: str) -> Figure:
    """Say in the figure itself whose numbers it shows."""
    figure.text(0.995, -0.005, f"Ours, {title}", ha="right", va="top", fontsize=8, color=GREY)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write PNG or SVG, by the path's ending, without dates, so that the same figure gives the same bytes."""
    buffer, kind = BytesIO(), path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight")
    path.write_bytes(buffer.getvalue())


def _whole_layers(ax: Axes) -> Axes:
    """Layers are counted in whole numbers."""
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    return ax


def _downwards(ax: Axes, rows: int) -> Axes:
    """First row on top, also where axes are shared."""
    ax.set_ylim(rows - 0.4, -0.6)
    return ax


def loss_curve(curve: pd.DataFrame, ax: Axes) -> Axes:
    """Training loss by step; columns step, loss."""
    ax.plot(curve["step"], curve["loss"], color=BLUE)
    ax.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
    return ax


def matrix_heatmap(table: pd.DataFrame, value: str, label: str, ax: Axes) -> Axes:
    """A value by layer and matrix, readers above writers."""
    order = ["q", "k", "v", "gate", "up", "o", "down"]
    grid = table.pivot(index="matrix", columns="layer", values=value).loc[order]
    image = ax.imshow(grid, aspect="auto", cmap="cividis", vmin=0)
    _whole_layers(ax).set(xlabel="layer", ylabel="matrix", yticks=range(len(order)), yticklabels=order)
    ax.axhline(4.5, color="white", lw=2)
    ax.grid(False)
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def layer_bars(values: Sequence[float], label: str, ax: Axes, even: float | None = None) -> Axes:
    """One bar a layer; `even` draws what an even spread would be."""
    ax.bar(range(len(values)), values, color=BLUE)
    if even is not None:
        ax.axhline(even, color=GREY, ls=":", label="even spread")
        ax.legend()
    _whole_layers(ax).set(xlabel="layer", ylabel=label)
    return ax


def self_test(table: pd.DataFrame, ax: Axes) -> Axes:
    """Fraction of variance unexplained by layer, SAE against a random dictionary, with the anchors 0 and 1."""
    ax.axhline(1, color=BLACK, lw=0.8)
    ax.text(0, 1.02, "1: always answering the mean", fontsize=8)
    ax.plot(table["layer"], table["fvu_random"], color=GREY, ls=":", marker="x", label="random dictionary, same L0")
    ax.plot(table["layer"], table["fvu"], color=RED, marker="o", label="SAE")
    _whole_layers(ax).set(xlabel="layer", ylabel="variance unexplained", ylim=(0, 1.12))
    ax.legend(loc="center left", bbox_to_anchor=(0, 0.36))
    return ax


def by_layer(table: pd.DataFrame, value: str, label: str, ax: Axes) -> Axes:
    """A value by layer under each contrast."""
    for contrast, (name, colour, marker) in CONTRAST.items():
        rows = table[table["contrast"] == contrast]
        ax.plot(rows["layer"], rows[value], color=colour, marker=marker, label=name)
    _whole_layers(ax).set(xlabel="layer", ylabel=label)
    ax.legend()
    return ax


def energy_by_rank(pooled: pd.DataFrame, width: int, ax: Axes) -> Axes:
    """Energy retained against the rank's share of the width, one line a basis, with the chance line rank / d."""
    for basis, (name, colour, dash, marker) in BASIS.items():
        rows = pooled[pooled["basis"] == basis]
        if len(rows):
            ax.plot(rows["rank"] / width, rows["energy_retained"], color=colour, ls=dash, marker=marker, ms=5, label=name)
    grid = np.array(sorted(pooled["rank"].unique())) / width
    ax.plot(grid, grid, color=BLACK, lw=0.8, label="chance, rank / d")
    ax.set(xscale="log", yscale="log", xlabel="rank as a share of the width", ylabel="energy retained")
    ax.xaxis.set_major_locator(mpl.ticker.FixedLocator(grid))
    ax.yaxis.set_major_locator(mpl.ticker.FixedLocator([0.01, 0.03, 0.1, 0.3, 1.0]))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(mpl.ticker.FuncFormatter(lambda share, _: f"{100 * share:.2g}%"))
        axis.set_minor_formatter(mpl.ticker.NullFormatter())
    return ax


def loss_split(splits: Mapping[str, Any], ax: Axes) -> Axes:
    """Stacked bars of what is kept, lost to misalignment and lost to the rank budget; values are LossSplit."""
    names = list(splits)
    kept, missed, budget = (
        np.array([getattr(s, part) for s in splits.values()]) for part in ("retained", "misalignment", "rank_budget")
    )
    ax.barh(names, kept, color=GREEN, label="kept")
    ax.barh(names, missed, left=kept, color=RED, label="lost: misalignment")
    ax.barh(names, budget, left=kept + missed, color="#D9D9D9", label="lost: rank budget")
    for row, split in enumerate(splits.values()):
        ax.plot([split.chance] * 2, [row - 0.4, row + 0.4], color=BLACK, lw=1.5, label="kept by chance" if row == 0 else None)
    _downwards(ax, len(names)).set(xlabel="share of the energy", xlim=(0, 1))
    ax.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), columnspacing=1)
    return ax


def bars_with_zero(values: Mapping[str, float], label: str, ax: Axes, colours: Mapping[str, str] | None = None) -> Axes:
    """Named horizontal bars around zero, each with its value."""
    names = list(values)
    shades = [(colours or {}).get(name, BLUE) for name in names]
    ax.barh(names, list(values.values()), color=shades)
    ax.axvline(0, color=BLACK, lw=0.8)
    reach = max(abs(v) for v in values.values()) or 1
    for row, value in enumerate(values.values()):
        ax.text(
            value + np.sign(value) * 0.02 * reach,
            row,
            f"{value:+.2g}",
            va="center",
            ha="left" if value >= 0 else "right",
            fontsize=8.5,
        )
    ax.margins(x=0.18)
    _downwards(ax, len(names)).set(xlabel=label)
    return ax


def overlap_by_basis(table: pd.DataFrame, ax: Axes) -> Axes:
    """Mean overlap of each side's best subspace with every kind of direction, readers and writers side by side."""
    means = table.groupby(["basis", "side"])["overlap"].mean().unstack()
    order = [name for name in BASIS if name in means.index]
    at = np.arange(len(order))
    for shift, side, colour, hatch in ((-0.2, "reader", SKY, ""), (0.2, "writer", ORANGE, "//")):
        ax.bar(at + shift, means.loc[order, side], 0.38, color=colour, hatch=hatch, edgecolor="white", label=f"{side}s")
    ax.axhline(table["chance"].iloc[0], color=BLACK, lw=0.8, label="chance")
    ax.set(xticks=at, ylabel="overlap with the best subspace")
    ax.set_xticklabels([BASIS[name][0].replace(" (the scalpel)", "").replace(" ", "\n") for name in order])
    ax.legend()
    return ax


def layer_scores(table: pd.DataFrame, null: np.ndarray, contrast: str, ax: Axes) -> Axes:
    """Layer scores with the permutation band (2.5 to 97.5 %), the random dictionary's scores, and the selected layers."""
    rows, (name, colour, marker) = table[table["contrast"] == contrast], CONTRAST[contrast]
    low, high = np.quantile(null, [0.025, 0.975], axis=1)
    ax.fill_between(rows["layer"], low, high, color="#D9D9D9", label="shuffled labels, 95 %")
    ax.plot(rows["layer"], rows["score_random"], color=GREY, ls=":", marker="x", label="random dictionary")
    ax.plot(rows["layer"], rows["score"], color=colour, marker=marker, label=name)
    chosen = rows[rows["selected"] == 1]
    ax.scatter(
        chosen["layer"], chosen["score"], s=130, facecolors="none", edgecolors=BLACK, linewidths=1.5, zorder=3, label="selected"
    )
    _whole_layers(ax).set(xlabel="layer", ylabel="layer score", ylim=(min(0, low.min()), None))
    ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), columnspacing=1)
    return ax


def effects(table: pd.DataFrame, ax: Axes) -> Axes:
    """What each layer is worth on the validation loss: injected alone, and left out of the whole."""
    rows = table[table["contrast"] == "corpus"]
    ax.plot(rows["layer"], rows["effect_left_out"], color=GREEN, marker="^", label="left out of the whole")
    ax.plot(rows["layer"], rows["effect_alone"], color=ORANGE, marker="D", label="injected alone")
    ax.axhline(0, color=BLACK, lw=0.8)
    _whole_layers(ax).set(xlabel="layer", ylabel="effect (nats a token)")
    ax.legend()
    return ax


def score_against_effect(table: pd.DataFrame, ax: Axes) -> Axes:
    """Layer score against the effect of injecting that layer alone, numbered by layer, one colour a contrast."""
    for contrast, (name, colour, marker) in CONTRAST.items():
        rows = table[table["contrast"] == contrast]
        ax.scatter(rows["score"], rows["effect_alone"], color=colour, marker=marker, label=name)
        for _, row in rows.iterrows():
            ax.annotate(
                int(row["layer"]),
                (row["score"], row["effect_alone"]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7.5,
                color=colour,
            )
    ax.set(xlabel="layer score", ylabel="effect alone (nats a token)")
    ax.legend()
    return ax


def layer_sets(table: pd.DataFrame, ax: Axes) -> Axes:
    """Loss change of random sets of m layers as a histogram, every selector's set marked on it."""
    random = table[table["selector"] == "random"]["loss_change"]
    ax.hist(random, bins=30, color="#D9D9D9", label=f"{len(random)} random sets")
    ax.axvline(random.median(), color=GREY, ls=":", label="their median")
    top = ax.get_ylim()[1]
    shown = [name for name in SELECTOR if name in set(table["selector"])]
    for row, name in enumerate(shown):
        value = table.loc[table["selector"] == name, "loss_change"].iloc[0]
        colour, marker = SELECTOR[name]
        ax.axvline(value, color=colour, lw=1, alpha=0.6)
        ax.plot(value, top * (0.97 - 0.085 * row), marker=marker, color=colour, ms=8, ls="none", label=name.replace("_", " "))
    ax.set(xlabel="change of validation loss (nats a token); left is better", ylabel="sets")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def accuracies(table: pd.DataFrame, subject: str, order: Sequence[str], ax: Axes) -> Axes:
    """Accuracy of every variant on a subject (or `all`) with 95 % intervals of the harness's standard error."""
    rows = table[table["subject"] == subject].set_index("variant").loc[list(order)]
    at = np.arange(len(rows))
    ax.errorbar(rows["accuracy"], at, xerr=1.96 * rows["stderr"], fmt="o", color=BLUE, ecolor=SKY, capsize=2)
    ax.axvline(rows.loc["base", "accuracy"], color=GREY, ls=":", label="base")
    ax.set(yticks=at, xlabel="accuracy (exact match)", xlim=(0, None))
    ax.set_yticklabels([name.replace("_", " ") for name in rows.index])
    ax.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    _downwards(ax, len(rows)).legend(loc="lower left")
    return ax


def gain_split(table: pd.DataFrame, variants: Sequence[str], ax: Axes) -> Axes:
    """The gain over the base, split into problems readable under both models and problems whose readability changed."""
    rows = table[table["subject"] == "all"].set_index("variant").loc[list(variants)]
    at = np.arange(len(rows))
    ax.barh(at - 0.19, rows["gain_both_extractable"], 0.36, color=BLUE, label="answer readable under both")
    ax.barh(
        at + 0.19,
        rows["gain_format_bound"],
        0.36,
        color=ORANGE,
        hatch="//",
        edgecolor="white",
        label="readability changed (bounds format)",
    )
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.set(yticks=at, xlabel="part of the gain in accuracy")
    ax.set_yticklabels([name.replace("_", " ") for name in rows.index])
    ax.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    _downwards(ax, len(rows)).legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2)
    return ax


def token_limits(table: pd.DataFrame, names: Mapping[str, str], ax: Axes) -> Axes:
    """Accuracy against the token limit, one line a variant; columns variant, limit, accuracy."""
    for (variant, name), colour, marker in zip(names.items(), (GREY, GREEN, RED, BLUE), "xosD", strict=False):
        rows = table[table["variant"] == variant]
        ax.plot(rows["limit"], rows["accuracy"], color=colour, marker=marker, ms=4, label=name)
    ax.axvline(table["limit"].max(), color=BLACK, lw=0.8, ls=":", label="the limit that was used")
    ax.set(xlabel="limit on new tokens", ylabel="accuracy (exact match)", ylim=(0, None))
    ax.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    ax.legend(loc="lower right")
    return ax


def claims_by_world(table: pd.DataFrame, column: str, ax: Axes) -> Axes:
    """One square a claim and world: holds, contradicted, or not testable; the count of worlds stands at the right."""
    rows = list(dict.fromkeys(zip(table["claim"], table["contrast"], strict=True)))
    worlds = sorted(table["world"].unique())
    look = {"contradicted": (ORANGE, "no"), "not testable": ("#D9D9D9", "?")}
    for y, (claim, contrast) in enumerate(rows):
        of = table[(table["claim"] == claim) & (table["contrast"] == contrast)].set_index("world")[column]
        for x, world in enumerate(worlds):
            colour, sign = look.get(of[world], (BLUE, "yes"))
            ax.add_patch(mpl.patches.Rectangle((x - 0.45, y - 0.42), 0.9, 0.84, color=colour))
            ax.text(x, y, sign, ha="center", va="center", fontsize=8, color="white" if colour == BLUE else BLACK)
        ax.text(len(worlds) - 0.35, y, f"{sum(of.map(lambda v: v not in look))} of {len(worlds)}", va="center", fontsize=9)
    words = {"-": "", "corpus": " all tokens", "matched": " matched words"}
    ax.set(xlim=(-0.6, len(worlds) + 0.4), xticks=range(len(worlds)), yticks=range(len(rows)), xlabel="world (seed)")
    ax.set_xticklabels(worlds)
    ax.set_yticklabels([claim + words[contrast] for claim, contrast in rows])
    ax.grid(False)
    return _downwards(ax, len(rows))


def percentiles_by_world(table: pd.DataFrame, ax: Axes) -> Axes:
    """Percentile of each contrast's selected set among random sets, one dot a world; chance is a half."""
    for shift, (contrast, (name, colour, marker)) in zip((-0.09, 0.09), CONTRAST.items(), strict=True):
        at, share = table["world"] + shift, table[f"percentile_{contrast}"]
        ax.plot(at, share, color=colour, marker=marker, ls="none", ms=8, label=name)
    ax.axhline(0.5, color=GREY, ls=":", label="chance")
    ax.axhline(0.95, color=BLACK, lw=0.8, label="better than 95 %")
    _whole_layers(ax).set(xlabel="world (seed)", ylabel="random sets that do worse", ylim=(-0.03, 1.03), xticks=table["world"])
    ax.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0))
    ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return ax


def forest(table: pd.DataFrame, variants: Mapping[str, str], ax: Axes) -> Axes:
    """Paired differences by subject with bootstrap intervals, one colour a variant, with zero and the margins."""
    subjects = ["all", *sorted(set(table["subject"]) - {"all"})]
    colours = dict(zip(variants, (RED, BLUE, GREEN, ORANGE, PURPLE), strict=False))
    spread = np.linspace(-0.28, 0.28, len(variants))
    for shift, (variant, name), marker in zip(spread, variants.items(), "osD^v", strict=False):
        rows = table[table["variant"] == variant].set_index("subject").loc[subjects]
        error = np.abs(rows[["ci_low", "ci_high"]].to_numpy().T - rows["difference"].to_numpy())
        ax.errorbar(
            rows["difference"],
            np.arange(len(subjects)) + shift,
            xerr=error,
            fmt=marker,
            ms=5,
            color=colours[variant],
            capsize=2,
            label=name,
        )
    margins = table[table["variant"] == next(iter(variants))].set_index("subject").loc[subjects, "margin"]
    for row, margin in enumerate(margins):
        ax.plot([-margin, -margin], [row - 0.45, row + 0.45], color=GREY, ls=":", label="margin" if row == 0 else None)
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.set(yticks=range(len(subjects)), xlabel="difference in accuracy to the base (points), 95 % paired interval")
    ax.set_yticklabels([subject.replace("_", " ") for subject in subjects])
    ax.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0, symbol=""))
    _downwards(ax, len(subjects)).legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return ax


def discordance(curve: pd.DataFrame, ax: Axes) -> Axes:
    """The published gain of 53 problems: McNemar's z against how many problems change their verdict."""
    ax.plot(curve["changed"], curve["z"], color=BLUE, label="McNemar's z for the same gain")
    ax.axhline(curve["unpaired"].iloc[0], color=RED, ls="--", label="published z (unpaired)")
    ax.axvline(curve["crossing"].iloc[0], color=GREY, ls=":", label=f"equal at {curve['crossing'].iloc[0]:.0f} of 540")
    ax.set(xlabel="problems whose verdict changes, of 540", ylabel="z", ylim=(0, None))
    ax.legend()
    return ax


def uniform_check(p_values: Sequence[float], ax: Axes) -> Axes:
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
