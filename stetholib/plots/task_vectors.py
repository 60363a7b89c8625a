"""Figures of step 01."""

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from stetholib.plots.style import GREY, SLATE, whole_numbers


def loss_curve(curve: pd.DataFrame, ax: Axes) -> Axes:
    """Training loss by step; columns step, loss."""
    ax.plot(curve["step"], curve["loss"], color=SLATE, marker="o", ms=4)
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
    ax.bar(range(len(values)), values, color=SLATE)
    if even is not None:
        ax.axhline(even, color=GREY, ls=":", label="even spread")
        ax.legend()
    whole_numbers(ax).set(xlabel="layer", ylabel=label)
    return ax
