"""Figures of step 05."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from stetholib.minerva_math import judged
from stetholib.plots.style import BLACK, MIST, PALE, SLATE, VARIANTS, Look, lines, percent, rows, twin_bars, with_legend
from stetholib.significance import SPOKEN

HEADLINE = ("base", "scalpel", "stethoscope_matched", "stethoscope", "full_shrunk", "full", "own")
HEARD_ON = {"stethoscope_matched": "stethoscope, matched words", "stethoscope": "stethoscope, all tokens"}


def headline(table: pd.DataFrame, subject: str, ax: Axes) -> Axes:
    """Accuracy on a subject (or `all`) of the base, the scalpel, the stethoscope and the whole vector: filled without the closing
    sentence (Math-Verify), with 95 % intervals, a hollow diamond by exact match; the band spans the random sets of as many layers."""
    of: Any = table[table["subject"] == subject].set_index("variant")
    shown, random = [name for name in HEADLINE if name in of.index], of[of.index.str.startswith("random_")]
    judge, metric = judged(of)
    marks = [(f"{judge}, 95 % interval", "o", BLACK), (SPOKEN["exact_match"], "D", "white")]
    marks = marks[:1] if judge == SPOKEN["exact_match"] else marks
    if len(random):
        ends = metric[random.index].min(), metric[random.index].max()
        ax.axvspan(*ends, color=PALE, label=f"{len(random)} random set{'s' * (len(random) > 1)}", zorder=0)
    for at, name in enumerate(shown):
        p, look = metric[name], VARIANTS[name]
        half = 1.96 * (p * (1 - p) / max(of["n"][name] - 1, 1)) ** 0.5
        ax.plot([p - half, p + half], [at, at], color=look.colour, lw=2)
        ax.plot(p, at, "o", color=look.colour, ms=8)
        if len(marks) > 1:
            ax.plot(of["accuracy"][name], at, "D", color=look.colour, mfc="white", ms=6)
        ax.annotate(f"{p:.0%}", (max(p + half, of["accuracy"][name]), at), xytext=(6, 0), textcoords="offset points", va="center")
    for said, marker, face in marks:
        ax.plot([], [], marker, color=BLACK, mfc=face, ms=7, label=said)
    ax.axvline(metric["base"], color=BLACK, lw=0.8, ls=":")
    rows([HEARD_ON.get(name, name) for name in shown], ax).set(xlabel="accuracy (dotted: the base's)")
    ax.set_xlim(0, 1.18 * max(metric[shown].max(), of["accuracy"][shown].max(), 0.01))
    percent(ax.xaxis)
    return with_legend(ax, below=(0.5, -0.2), ncols=3, columnspacing=1)


def accuracies(table: pd.DataFrame, subject: str, order: Sequence[str], ax: Axes) -> Axes:
    """Accuracy of every variant on a subject (or `all`): exact match filled, with 95 % intervals of the harness's standard
    error, and math_verify hollow below it; dotted lines at the base's."""
    of = table[table["subject"] == subject].set_index("variant").loc[list(order)]
    at, error = np.arange(len(of)), 1.96 * of["stderr"]
    ax.errorbar(of["accuracy"], at - 0.12, xerr=error, fmt="o", color=SLATE, ecolor=MIST, capsize=2, label="exact match")
    ax.plot(of["math_verify"].astype(float), at + 0.18, "D", color=BLACK, mfc="none", label="Math-Verify")
    for metric, colour in (("accuracy", SLATE), ("math_verify", BLACK)):
        ax.axvline(of[metric].astype(float)["base"], color=colour, lw=0.8, ls=":")
    rows(order, ax).set(xlabel="accuracy (dotted: the base's)", xlim=(0, None))
    percent(ax.xaxis)
    return with_legend(ax, below=(0.5, -0.14), ncols=2)


def gain_split(table: pd.DataFrame, variants: Sequence[str], ax: Axes) -> Axes:
    """The gain in exact match over the base, split into problems readable under both models and problems whose readability
    changed."""
    names = {"gain_both_extractable": "answer readable under both", "gain_format_bound": "readability changed"}
    parts = table[(table["subject"] == "all") & (table["metric"] == "exact_match")].melt("variant", list(names))
    twin_bars(parts, (SLATE, MIST), ax, x="value", y="variant", order=list(variants), hue="variable", hue_order=list(names))
    ax.axvline(0, color=BLACK, lw=0.8)
    rows(variants, ax).set(xlabel="part of the gain in accuracy (points)", ylabel=None)
    percent(ax.xaxis, symbol="")
    return with_legend(ax, ax.containers, names.values(), below=(0.45, -0.16), ncols=2)


def token_limits(table: pd.DataFrame, names: Mapping[str, str], ax: Axes) -> Axes:
    """Accuracy against the token limit, one line a variant; columns variant, limit, accuracy."""
    looks = {key: VARIANTS.get(key, VARIANTS["base"])._replace(name=name) for key, name in names.items()}
    lines(table, "limit", "accuracy", "variant", looks, ax, ms=4)
    ax.axvline(table["limit"].max(), color=BLACK, lw=0.8, ls=":", label="the limit that was used")
    ax.set(xlabel="limit on new tokens", ylabel="accuracy (exact match)", ylim=(0, None))
    percent(ax.yaxis)
    return with_legend(ax, loc="upper left", bbox_to_anchor=(1.01, 1.0))


LIVE = "this setting"


def _bench(setting: str) -> dict[str, Look]:
    """Looks of the bench: a setting that somebody turns is an edit of their own, the one shown where nobody can is the stethoscope's."""
    ours = VARIANTS["own" if setting == LIVE else "stethoscope"]._replace(name=setting)
    return {"base": VARIANTS["base"], "setting": ours, "full": VARIANTS["full"]}


def loss_parts(table: pd.DataFrame, ax: Axes, setting: str = LIVE) -> Axes:
    """Change of both parts of the loss against the base, of a setting beside the whole vector; rows base, setting and full,
    columns solution and closing. setting: what it is called."""
    change: Any = table[["solution", "closing"]] - table.loc["base", ["solution", "closing"]]
    for shift, name in ((-0.2, "setting"), (0.2, "full")):
        look = _bench(setting)[name]
        bars = ax.barh(np.arange(2) + shift, change.loc[name], height=0.36, color=look.colour, label=look.name)
        ax.bar_label(bars, fmt="{:+.4f}", padding=3, fontsize=8.5)
    ax.axvline(0, color=BLACK, lw=0.8)
    ax.margins(x=0.25)
    rows(["solution", "closing sentence"], ax).set(xlabel="change of the loss (nats a token); left is better")
    ax.set_title(f"{setting[0].upper()}{setting[1:]}: {change.loc['setting', 'solution']:+.4f} nats\non the solution")
    return with_legend(ax, below=(0.45, -0.2), ncols=2)


def answered(table: pd.DataFrame, ax: Axes, setting: str = LIVE) -> Axes:
    """Accuracies of a setting beside the base and the whole vector with 95 % intervals; of `LiveBench.accuracy_table`.
    setting: what it is called."""
    metrics = list(dict.fromkeys(table["metric"]))
    for shift, (name, look) in zip((-0.25, 0.0, 0.25), _bench(setting).items(), strict=True):
        of: Any = table[table["variant"] == name].set_index("metric").loc[metrics]
        at, p = np.arange(len(of)) + shift, of["accuracy"]
        ends = [(p - of["low"]).clip(lower=0), (of["high"] - p).clip(lower=0)]  # below 0 by rounding, where all or none are right
        ax.errorbar(p, at, xerr=ends, fmt=look.marker, color=look.colour, capsize=3, label=look.name)
        for y, (share, high) in zip(at, of[["accuracy", "high"]].to_numpy(), strict=True):
            ax.annotate(f"{share:.0%}", (high, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8.5)
    rows([SPOKEN[metric] for metric in metrics], ax).set(xlim=(0, min(1.2, 1.25 * table["high"].max())))
    ax.set_xlabel(f"accuracy of {int(table['n'].iloc[0])} problems, with 95 % intervals")
    last: Any = table[table["variant"] == "setting"].iloc[-1]
    judge, span = SPOKEN[last["metric"]], f"{100 * last['gain_low']:+.1f} to {100 * last['gain_high']:+.1f}"
    ax.set_title(f"{setting[0].upper()}{setting[1:]} gains {100 * last['gain']:+.1f} points\nby {judge} (95 %: {span})")
    percent(ax.xaxis)
    return with_legend(ax, below=(0.45, -0.2), ncols=3)
