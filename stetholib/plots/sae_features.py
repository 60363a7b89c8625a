"""Figures of step 02."""

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from stetholib.plots.style import BASES, BLACK, CONTRASTS, GREY, MIST, SLATE, lines, percent, whole_numbers, with_legend


def self_test(table: pd.DataFrame, ax: Axes) -> Axes:
    """Fraction of variance unexplained by layer, SAE against a random dictionary, with the anchors 0 and 1."""
    ax.axhline(1, color=BLACK, lw=0.8)
    ax.text(0, 1.02, "1: no better than the mean", fontsize=8)
    ax.plot(table["layer"], table["fvu_random"], color=GREY, ls=":", marker="x", label="random dictionary, same L0")
    ax.plot(table["layer"], table["fvu"], color=BASES["sae_decoder"].colour, marker="o", label="SAE")
    whole_numbers(ax).set(xlabel="layer", ylabel="variance unexplained", ylim=(0, 1.12))
    return with_legend(ax, loc="center left", bbox_to_anchor=(0, 0.36))


def training(curves: pd.DataFrame, k: float, axes: Sequence[Axes]) -> Sequence[Axes]:
    """How SAEs were trained, one line a layer, light for the first and dark for the last, and the median: the variance left
    unexplained, the L0 of their thresholds beside k, and the share of dead features. curves: layer, tokens, fvu, l0, dead."""
    for ax, value, label in zip(axes, ("fvu", "l0", "dead"), ("variance unexplained", "L0", "dead features"), strict=True):
        wide = curves.pivot(index="tokens", columns="layer", values=value)
        for colour, layer in zip(sns.color_palette(f"blend:{MIST},{SLATE}", len(wide.columns)), wide, strict=True):
            ax.plot(wide.index, wide[layer], color=colour, lw=0.8)
        ax.plot(wide.index, wide.median(axis=1), "o-", color=BASES["sae_decoder"].colour, ms=3, label="median of the layers")
        ax.set(xlabel="tokens", ylabel=label, ylim=(0, None))
    axes[0].set_ylim(0, 1.12)
    axes[1].axhline(k, color=BLACK, lw=0.8, label=f"k = {k:g}")
    axes[1].set(yscale="log", ylim=(k / 4, None))
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].legend()
    percent(axes[2].yaxis)
    return axes


def by_layer(table: pd.DataFrame, value: str, label: str, ax: Axes) -> Axes:
    """A value by layer under each contrast."""
    lines(table, "layer", value, "contrast", CONTRASTS, whole_numbers(ax)).set(xlabel="layer", ylabel=label)
    return with_legend(ax)
