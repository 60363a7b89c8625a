"""Figures of step 02."""

import pandas as pd
from matplotlib.axes import Axes

from stetholib.plots.style import BASES, BLACK, CONTRASTS, GREY, lines, whole_numbers


def self_test(table: pd.DataFrame, ax: Axes) -> Axes:
    """Fraction of variance unexplained by layer, SAE against a random dictionary, with the anchors 0 and 1."""
    ax.axhline(1, color=BLACK, lw=0.8)
    ax.text(0, 1.02, "1: always answering the mean", fontsize=8)
    ax.plot(table["layer"], table["fvu_random"], color=GREY, ls=":", marker="x", label="random dictionary, same L0")
    ax.plot(table["layer"], table["fvu"], color=BASES["sae_decoder"].colour, marker="o", label="SAE")
    whole_numbers(ax).set(xlabel="layer", ylabel="variance unexplained", ylim=(0, 1.12))
    ax.legend(loc="center left", bbox_to_anchor=(0, 0.36))
    return ax


def by_layer(table: pd.DataFrame, value: str, label: str, ax: Axes) -> Axes:
    """A value by layer under each contrast."""
    lines(table, "layer", value, "contrast", CONTRASTS, whole_numbers(ax)).set(xlabel="layer", ylabel=label)
    ax.legend()
    return ax
