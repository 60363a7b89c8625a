"""What an override changed: a tweaked run beside the profile's own, and what of it noise alone would give.

Both runs are read from what they left: tables in figures/, answers in runs/. Nothing is computed anew but paired intervals."""

from collections.abc import Iterator

import pandas as pd

from stetholib.significance import SPOKEN, Margins, metrics_of, paired_against, points
from stetholib.store.tables import Workspace

COLUMNS = ("what", "default", "here", "change", "beyond noise?")
RULES = dict(stethoscope="the stethoscope's layers", stethoscope_matched="its layers on matched words", own="your own layers")
ANSWERING = dict(scalpel="the scalpel", stethoscope="the stethoscope", stethoscope_matched="the stethoscope, matched words")
ANSWERING |= dict(full_shrunk="the whole vector, shrunk", full="the whole vector", own="your own edit")
NOTHING = (
    "Nothing is overridden here. Change a key in the second cell, for example `overrides = {'selection.layer_share': 0.25}` or "
    "`{'edit.layers': [1, 4, 5, 11]}`, run all cells again, and the change appears here, beside the default."
)
WORDS = {"corpus": "all tokens", "matched": "matched words"}
MARGINS = Margins(0.05, 0.03, 0.05, 2000, 0)
Row = tuple[str, ...]


def told(here: Workspace, whose: str) -> str:
    """A table of what differs from the profile's own run, as Markdown, and what does not; a line where nothing is overridden, or
    where the profile itself has not run. whose: the run, with its overrides."""
    usual = here.usual
    if usual is None:
        return NOTHING
    if not (usual.figures / "04_layer_selection.csv").is_file():
        return (
            f"**{whose}**: the default has left nothing here to compare with; `make reproduce PROFILE={usual.figures.name}` does."
        )
    rows = [*_chosen(usual, here), *_sets(usual, here), *_accuracies(usual, here), *_verdicts(usual, here)]
    changed = [row for row in rows if row[1] != row[2] or "your own" in row[0]]
    same = len(rows) - len(changed)
    kept = f"\n\n{same} further measurement{'s are' if same > 1 else ' is'} the same in both." if same else ""
    if not changed:
        return f"**{whose}**: nothing that both runs have measured so far differs.{kept}"
    table = pd.DataFrame(changed, columns=list(COLUMNS)).to_markdown(index=False)
    return f"**{whose}**, beside the default:\n\n{table}{kept}"


def _both(usual: Workspace, here: Workspace, stem: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """A table of both runs, where both have left it."""
    paths = [one.figures / f"{stem}.csv" for one in (usual, here)]
    return (pd.read_csv(paths[0]), pd.read_csv(paths[1])) if all(path.is_file() for path in paths) else None


def _chosen(usual: Workspace, here: Workspace) -> Iterator[Row]:
    """Which layers the stethoscope chooses."""
    if not (found := _both(usual, here, "04_layer_selection")):
        return
    for contrast, words in WORDS.items():
        sets = [{*table.loc[table["selected"] & (table["contrast"] == contrast), "layer"]} for table in found]
        default, ours = (", ".join(map(str, sorted(one))) for one in sets)
        yield f"layers by the stethoscope, {words}", default, ours, f"{len(sets[1] - sets[0])} of {len(sets[1])} are new", "-"


def _sets(usual: Workspace, here: Workspace) -> Iterator[Row]:
    """How many random sets of layers each choice beats; an edit of one's own stands beside the default's stethoscope."""
    if not (found := _both(usual, here, "04_layer_sets")):
        return
    columns = ["percentile", "percentile_low", "percentile_high"]
    default, ours = (table[table["draw"] == 0].drop_duplicates("selector").set_index("selector")[columns] for table in found)
    for name, words in RULES.items():
        rival = name if name in default.index else "stethoscope"
        if name in ours.index and ours.loc[name].notna().all() and default.loc[rival].notna().all():
            a, b = default.loc[rival], ours.loc[name]
            apart = a["percentile_high"] < b["percentile_low"] or b["percentile_high"] < a["percentile_low"]
            spread = [f"{one['percentile']:.1%} ({one['percentile_low']:.0%} to {one['percentile_high']:.0%})" for one in (a, b)]
            beside = "" if rival == name else ", beside the stethoscope's"
            change = f"{100 * (b['percentile'] - a['percentile']):+.1f} points"
            yield f"random sets that {words} beat{beside}", *spread, change, "yes" if apart else "no, the intervals meet"


def _accuracies(usual: Workspace, here: Workspace) -> Iterator[Row]:
    """Accuracies over all subjects, paired by problem where both runs asked the same ones."""
    text = {"problem_id": str, "extracted": str}
    for name, words in ANSWERING.items() if (here.figures / "05_minerva_math.csv").is_file() else ():
        rival = name if (usual.records / f"{name}.jsonl").is_file() else "stethoscope"
        paths = dict(default=usual.records / f"{rival}.jsonl", here=here.records / f"{name}.jsonl")
        if not all(path.is_file() for path in paths.values()):
            continue
        runs = [pd.read_json(path, lines=True, dtype=text).assign(variant=run) for run, path in paths.items()]
        records = pd.concat(runs, ignore_index=True)
        asked = records.groupby("variant")["problem_id"].agg(frozenset)
        beside = "" if rival == name else ", beside the stethoscope"
        for metric in metrics_of(records):
            share = records.groupby("variant")[metric].mean()
            shown = f"{words} answers right ({SPOKEN[metric]}){beside}", f"{share['default']:.2%}", f"{share['here']:.2%}"
            if asked["default"] != asked["here"]:
                yield *shown, f"{100 * (share['here'] - share['default']):+.1f} points", "not told: other problems were asked"
                continue
            row = paired_against(records, "default", "here", MARGINS, metric)
            beyond = row["ci_low"] > 0 or row["ci_high"] < 0
            yield *shown, points(row), "yes" if beyond else "no, the interval holds 0"


def _verdicts(usual: Workspace, here: Workspace) -> Iterator[Row]:
    """The verdicts of the ledger."""
    if found := _both(usual, here, "06_claims"):
        default, ours = (table.set_index(["claim", "contrast"])[["verdict", "verdict_strict"]] for table in found)
        for key in (key for key in default.index if key in ours.index):
            said = [f"{one['verdict']}, strictly {one['verdict_strict']}" for one in (default.loc[key], ours.loc[key])]
            yield f"verdict on {key[0]}" + (f" ({WORDS[key[1]]})" if key[1] in WORDS else ""), *said, "-", "-"
