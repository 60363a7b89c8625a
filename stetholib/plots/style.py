"""What all figures share: one look for one thing, the project's style, and how a figure is opened, signed and saved.

Colours are Okabe and Ito's and a few more, which survive colour blindness; they belong to edits, bases and contrasts, all else is slate
or grey, and every series has a marker or dash of its own.
Chance and ceiling are drawn wherever they exist.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from IPython.core.pylabtools import print_figure
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"]
GREY, PALE, VIOLET, WINE, BROWN = "#8C8C8C", "#D9D9D9", "#5E3C99", "#882255", "#8C510A"
SLATE, MIST = "#4A5A6A", "#B4C0CC"  # of what belongs to no edit, basis or contrast: colours are theirs

READABLE = 4.5  # to 1: the contrast that WCAG wants of text


def contrast_of(colour: Any, ground: Any = "white") -> float:
    """Contrast of two colours by WCAG 2, from 1 to 21."""
    rgb = [np.array(to_rgb(one)) for one in (colour, ground)]
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in rgb]
    low, high = sorted(float(one @ (0.2126, 0.7152, 0.0722)) + 0.05 for one in linear)
    return high / low


def ink(colour: str) -> str:
    """A colour to write in on white: the same hue, as dark as it must be to be read."""
    darker = (to_hex(share * np.array(to_rgb(colour))) for share in np.linspace(1, 0, 51))
    return next(one for one in darker if contrast_of(one) >= READABLE)


class Look(NamedTuple):
    """How a thing is named and drawn, in whichever figure it stands."""

    name: str
    colour: str
    marker: str
    dash: str = "-"


BASES = {
    "own_svd_matrix": Look("best for each matrix", GREEN, "^", "--"),
    "own_svd": Look("best for each side", GREEN, "o", "-."),
    "own_svd_layer": Look("best for each layer (ceiling)", GREEN, "P"),
    "gradient_pca": Look("gradient components", PURPLE, "D"),
    "activation_pca": Look("activation components", BROWN, "s"),
    "sae_decoder": Look("SAE decoder (the scalpel)", ORANGE, "o"),
    "sae_encoder": Look("SAE encoder", ORANGE, "v", "--"),
    "random": Look("random subspaces", GREY, "x", ":"),
}
CONTRASTS = {"corpus": Look("all tokens", RED, "o"), "matched": Look("matched words", BLUE, "s")}
SELECTORS = {
    "greedy": Look("greedy", GREEN, "*"),
    "stethoscope": Look("stethoscope", RED, "o"),
    "stethoscope_matched": Look("stethoscope matched", BLUE, "s"),
    "largest_norm": Look("largest norm", BLACK, "D"),
    "small_step": Look("small step", GREEN, "P"),
    "first": Look("first", BLACK, "<"),
    "middle": Look("middle", BLACK, "^"),
    "last": Look("last", BLACK, ">"),
    "least_specific": Look("least specific", GREY, "v"),
    "full_shrunk": Look("whole vector, shrunk", SKY, "h"),
    "own": Look("your own edit", VIOLET, "X"),
}
LOSSES = {
    "solution": Look("solution", SLATE, "o"),
    "closing": Look("its closing sentence", BLACK, "s", "--"),
    "general": Look("general text", GREY, "^", ":"),
}
VARIANTS = SELECTORS | {
    "base": Look("base", GREY, "x"),
    "full": Look("whole vector", GREEN, "D"),
    "scalpel": Look("scalpel", ORANGE, "^"),
}
CODE = re.compile(r"[A-Za-z0-9|]+(?:_[A-Za-z0-9]+)+|\b(?:taylor|fisher|auroc)\b")
NAMES = {key: look.name for key, look in (BASES | CONTRASTS | VARIANTS).items()} | {
    "raw": "the raw vector",
    "projected": "projected (the scalpel)",
    "l0": "L0",
    "fvu": "FVU",
    "fvu_random": "FVU, random dictionary",
    "fvu_neighbour": "FVU, next layer's stream",
    "fvu_with_outliers": "FVU, outliers too",
    "l0_random": "L0, random dictionary",
    "score_random": "score, random dictionary",
    "p_value": "p",
    "p_max": "p, largest of all layers",
    "ci_low": "low",
    "ci_high": "high",
    "mcnemar_p": "p (McNemar)",
    "mcnemar_p_holm": "p (McNemar, Holm)",
    "mde": "smallest detectable",
    "r2": "R²",
    "r_held_out": "best beyond median, held out",
    "r_in_sample": "best beyond median, in sample",
    "math_verify": "Math-Verify",
    "cohen_d": "Cohen's d",
    "auroc": "AUROC",
    "taylor": "Taylor",
    "fisher": "Fisher",
    "all": "all subjects",
    "|tau|": "norm of the change",
}
STYLE: Any = {
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


def words(name: Any) -> Any:
    """A name of the code in words, names within a text too; whatever is no text stays as it is."""
    if not isinstance(name, str):
        return name
    return NAMES.get(name) or CODE.sub(lambda found: NAMES.get(found[0], found[0].replace("_", " ")), name)


def panels(columns: int = 1, width: float = 6.4, height: float = 3.8, **options: Any) -> tuple[Figure, Any]:
    """A figure with a row of axes in the project's style; a notebook keeps it with its words."""
    mpl.rcParams.update(STYLE)
    made = plt.subplots(1, columns, figsize=(width * columns, height), **options)
    if (shell := get_ipython()) is not None:  # after pyplot has set up what a kernel shows
        shell.display_formatter.formatters["image/png"].for_type(Figure, _in_words)
    return made


def described(figure: Figure) -> str:
    """A figure in words, for who cannot see it: of each panel its title, its axes, what stands on them by name, and its legend."""
    said: list[str] = []
    for ax in figure.axes:
        title, legend = ax.get_title("left") or ax.get_title(), ax.get_legend()
        words = {
            "Across": ax.get_xlabel(),
            "Up": ax.get_ylabel(),
            "Columns": _listed(ax.get_xticklabels() if isinstance(ax.xaxis.get_major_locator(), FixedLocator) else ()),
            "Rows": _listed(ax.get_yticklabels() if isinstance(ax.yaxis.get_major_locator(), FixedLocator) else ()),
            "Shown": _listed(legend.get_texts() if legend else ()),
            "Written in it": _listed(ax.texts if len(ax.texts) < 30 else ()),
        }
        said += [title, *(f"{what}: {text}" for what, text in words.items() if text)]
    said += [text.get_text() for text in figure.texts]
    return " ".join(f"{one.rstrip('.')}." for one in said if one).replace("\n", " ").replace("$", "")


def _listed(texts: Iterable[Text]) -> str:
    return "; ".join(filter(None, (text.get_text() for text in texts)))


def _in_words(figure: Figure) -> tuple[str, dict[str, str]]:
    """A figure as a notebook keeps it: the picture, and its words beside it."""
    return print_figure(figure, "png", base64=True), {"alt": described(figure)}


def labelled(figure: Figure, whose: str) -> Figure:
    """Say in the figure itself whose numbers it shows, and break titles that are wider than their panel; one that says so already
    stays as it is."""
    if not figure.texts:
        _break_titles(figure)
        figure.text(0.995, -0.005, whose, ha="right", va="top", fontsize=8, color=ink(GREY))
    return figure


def _break_titles(figure: Figure) -> None:
    """Break what is wider than its panel between words, by measured width; formulas, which have no words, stay as they are."""
    figure.draw_without_rendering()  # panels have a place only then
    font = FontProperties(weight=STYLE["axes.titleweight"])
    wide = lambda text: TextPath((0, 0), text, STYLE["axes.titlesize"], prop=font).get_extents().width  # noqa: E731
    for ax in figure.axes:
        room, title = ax.get_window_extent().width / figure.dpi * 72, ax.get_title("left")
        if title and "$" not in title and any(wide(line) > room for line in title.split("\n")):
            lines = [""]
            for word in title.split():
                longer = f"{lines[-1]} {word}".strip()
                lines[-1:] = [longer] if not lines[-1] or wide(longer) <= room else [lines[-1], word]
            ax.set_title("\n".join(lines), loc="left")


def save(figure: Figure, path: Path) -> None:
    """Write PNG or SVG, by the path's ending, without dates, so that the same figure gives the same bytes."""
    buffer, kind = BytesIO(), path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, metadata=metadata, bbox_inches="tight")
    path.write_bytes(buffer.getvalue())


def whole_numbers(ax: Axes) -> Axes:
    """Layers and worlds are counted in whole numbers."""
    ax.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    return ax


def percent(axis: Axis, symbol: str = "%") -> None:
    """Shares of one are read as percentages."""
    axis.set_major_locator(mpl.ticker.MaxNLocator(steps=[1, 2, 5, 10]))
    axis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0, symbol=symbol))


def rows(names: Iterable[str], ax: Axes) -> Axes:
    """One row a name, the first on top, also where axes are shared."""
    said = [words(name) for name in names]
    ax.set_yticks(range(len(said)), said)
    ax.set_ylim(len(said) - 0.4, -0.6)
    return ax


def with_legend(ax: Axes, *entries: Any, below: tuple[float, float] | None = None, **options: Any) -> Axes:
    """The axis with its legend, for a plot to end with; below: the place of the legend's upper edge, under the axis."""
    ax.legend(*entries, **(dict(loc="upper center", bbox_to_anchor=below) if below else {}), **options)
    return ax


def lines(table: pd.DataFrame, x: str, y: str, by: str, looks: Mapping[str, Look], ax: Axes, **options: Any) -> Axes:
    """One line for each look whose key stands in the column `by`, in the looks' order."""
    for key, look in looks.items():
        if len(part := table[table[by] == key]):
            ax.plot(part[x], part[y], color=look.colour, marker=look.marker, label=look.name, **{"ls": look.dash} | options)
    return ax


def twin_bars(table: pd.DataFrame, colours: Sequence[str], ax: Axes, **axes: Any) -> Axes:
    """Bars of two kinds side by side, means where a kind has many rows; the second is hatched."""
    sns.barplot(table, palette=colours, saturation=1, edgecolor="white", errorbar=None, legend=False, ax=ax, **axes)
    plt.setp(ax.containers[1], hatch="//")
    return ax


def small(value: float) -> str:
    """A signed number with two digits, and no exponent where it can be read without one."""
    return f"{value:+.5f}" if 1e-5 <= abs(value) < 1e-4 else f"{value:+.2g}"


def bars_with_zero(values: Mapping[str, float], label: str, ax: Axes) -> Axes:
    """Named horizontal bars around zero, each with its value."""
    bars = ax.barh(range(len(values)), list(values.values()), color=SLATE)
    ax.bar_label(bars, fmt=small, padding=3, fontsize=8.5)
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.margins(x=0.18)
    rows(values, ax).set(xlabel=label)
    return ax
