"""Where the truth is known: does a rule find the layers that a vector's mathematics was put into?

That a vector is local is a construction (`adapters.two_tasks`), and no finding. What it can show is whether a rule is right where
there is something to be right about; an instrument that has never been right cannot be said to have failed.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from stetholib import selectors
from stetholib.layer_sets import IN_ALL, SEEING, PlannedSet, Rules, named_sets, reliability_of_sets, standing
from stetholib.statistics import mean_interval

RELIABILITY, HELD_OUT, AHEAD = 0.8, 0.3, 0.95  # what such a world must show, fixed before any score was seen


def planned(known: Sequence[int], layers: int) -> list[PlannedSet]:
    """The known layers, and all the others."""
    rest = tuple(layer for layer in range(layers) if layer not in known)
    return [PlannedSet("known", 0, "-", tuple(known)), PlannedSet("outside", 0, "-", rest)]


def measure(rules: Rules, sets: pd.DataFrame, known: Sequence[int]) -> pd.DataFrame:
    """One row a rule. Columns selector, contrast, layers, auroc (of a known layer's score against another's; .5 is chance),
    overlap (how many of its layers are known ones), exact, share (of the whole vector's fall of the solution's loss that its set
    brings), and percentile among random sets with its interval. sets: the table of sets of layers."""
    told, rows = standing(sets).set_index("selector"), []
    for name, (contrast, score) in rules.items():
        row = told.loc[name]
        layers = {int(layer) for layer in row["layers"].split()}
        found = dict(selector=name, contrast=contrast, layers=row["layers"], auroc=selectors.auroc(score, known))
        rows.append(found | dict(overlap=len(layers & {*known}), exact=layers == {*known}, share=row["share"]))
    ends = ["percentile", "percentile_low", "percentile_high"]
    return pd.DataFrame(rows).join(named_sets(sets)[ends], on="selector")


def holds(sets: pd.DataFrame, reliability: pd.DataFrame) -> bool:
    """Whether this world can test a rule at all: the whole vector lowers the loss, sets of layers are ranked, and the known ones
    lower it as well and are better than chance, which those of a vector without mathematics are not."""
    told, named = reliability_of_sets(reliability), named_sets(sets)
    lowered = named["loss_change"]["full"] < 0 and named["loss_change"]["known"] < 0
    ranked = told["reliability"] >= RELIABILITY and told["r_held_out"] >= HELD_OUT
    return bool(lowered and ranked and named["percentile"]["known"] > AHEAD)


def summary(table: pd.DataFrame, sets: pd.DataFrame, reliability: pd.DataFrame) -> str:
    """What the rules find, as Markdown; the tables of `measure`, of sets, and of reliability."""
    change, told = named_sets(sets)["loss_change"], reliability_of_sets(reliability)
    shares = {name: change[name] / change["full"] for name in ("known", "outside")}
    known = named_sets(sets)["layers"]["known"].replace(" ", ", ")
    exact, best = table[table["exact"]]["selector"], table.sort_values("auroc", ascending=False)
    said = lambda names: ", ".join(f"*{name}*" for name in names) or "none"  # noqa: E731
    verdict = "can test a rule" if holds(sets, reliability) else "**cannot test a rule** by the bars that were fixed"
    place = f"Mathematics was put into layers {known}: **by construction**. Alone they bring {shares['known']:.0%} of the whole vector's fall, all others {shares['outside']:.0%}."
    if not (change["full"] < 0 and change["known"] < 0):
        place = f"The vector lowers no loss in layers {known}, the only ones that could have learnt mathematics: **there is nothing to find**."
    return f"""
- {place}
- Two halves of the problems rank sets with rho {told["reliability"]:+.2f}, and the best set that one finds is worth {told["r_held_out"]:.0%} on the other: this world {verdict}.
- Exactly the known layers are picked by {said(exact)}; the score that sets them apart best is *{best["selector"].iloc[0]}* (AUROC {best["auroc"].iloc[0]:.2f}), and the paper's has {float(table.set_index("selector")["auroc"]["stethoscope"]):.2f}; chance is .50.
""".strip()


def over_worlds(worlds: pd.DataFrame, organisms: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every rule over worlds, best first: mean percentile of its set among random ones with Student's interval (low, high). Over
    those organisms that can test a rule: how many (organisms), the mean over them of its AUROC, which is a mean over seeds of the
    SAEs, with its interval (auroc_low, auroc_high), and in how many of all `runs` its set is exactly right. worlds, organisms:
    `layer_sets.standing` and `measure` of each, with a column world; organisms also with `holds`."""
    rows: list[dict[str, Any]] = []
    for name, group in worlds.groupby("selector", sort=False):
        mean, low, high = _share_interval(group["percentile"])
        rows.append(dict(selector=name, worlds=len(group), percentile=mean, low=low, high=high))
    table = pd.DataFrame(rows).set_index("selector")
    for name, group in organisms[organisms["holds"]].groupby("selector", sort=False) if organisms is not None else ():
        each = group.groupby("world")["auroc"].mean()
        mean, low, high = _share_interval(each)
        found = dict(organisms=len(each), auroc=mean, auroc_low=low, auroc_high=high, exact=group["exact"].sum(), runs=len(group))
        table.loc[name, [*found]] = [*found.values()]
    return table.sort_values("percentile", ascending=False, kind="stable")


def _share_interval(values: pd.Series) -> tuple[float, float, float]:
    """The mean of shares with Student's interval, which ends where shares do."""
    mean, *ends = mean_interval(values)
    low, high = (min(max(end, 0.0), 1.0) if end == end else end for end in ends)
    return mean, low, high


def between(mean: float, low: float, high: float, form: str = ".1%") -> str:
    """A mean with its interval in words, alone where one value has none."""
    said = format(mean, form) + ("" if pd.isna(low) else f" ({low:{form}} to {high:{form}})")
    return said.replace("%", " %")


def favourites(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """By `over_worlds`, the rules that are in the race, best first in the worlds, and those of them that find known layers best, none
    where no organism was asked. Rules that see losses are out of the race."""
    rules = table.drop(index=[*IN_ALL, *SEEING, "known", "outside"], errors="ignore")
    if "auroc" not in rules or rules["auroc"].isna().all():
        return rules, rules.iloc[:0]
    right = rules.sort_values(["auroc", "exact", "percentile"], ascending=False)
    return rules, right[(right["auroc"] == right["auroc"].iloc[0]) & (right["exact"] == right["exact"].iloc[0])]


def bet(table: pd.DataFrame) -> str:
    """Which rule one would bet on, by `over_worlds`, in two sentences."""
    rules: Any
    rules, right = favourites(table)
    best, ours = rules.index[0], rules.loc["stethoscope"]
    row = rules.loc[best]
    share = lambda row: between(row["percentile"], row["low"], row["high"])  # noqa: E731
    over, sets = "In the default world", "its set beats"
    if row["worlds"] > 1:
        over, sets = f"Over {row['worlds']:.0f} worlds", "the sets it picks beat"
    beside = "" if best == "stethoscope" else f"; the stethoscope's, {share(ours)} of random sets"
    worlds = f"{over} *{best}* does best: {sets} {share(row)} of random sets{beside}."
    if right.empty:
        return worlds
    names, row = ", ".join(f"*{name}*" for name in right.index), right.iloc[0]
    found = f"AUROC {row['auroc']:.2f}, exact in {row['exact']:.0f} of {row['runs']:.0f}"
    mine = f"AUROC {ours['auroc']:.2f}, exact in {ours['exact']:.0f}"
    known = f"Where the layers are known, {names} find{'s' * (len(right) == 1)} them best ({found}; the stethoscope {mine}; chance .50)."
    both = f" Of these *{right.index[0]}* does best in the worlds too, with {share(row)}."
    return f"{worlds} {known}{both if len(right) > 1 else ''}"
