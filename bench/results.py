"""What `make bench` leaves: the tables, row by row, the figure and the machine."""

import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from matplotlib.axes import Axes

from bench.peers import pins
from stetholib import plots
from stetholib.plots.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, Look
from stetholib.plots.style import rows as named_rows
from stetholib.store.files import atomic

COLUMNS = ["work", "peer", "ours", "theirs", "ratio", "equal"]
SIZES = ["of", "size", "seconds", "slope"]
ORDER = ["answer", "answer_fewshot", "export", "export_memory", "lm_eval", "recipe", "edit", "sweep", "features"]
ORDER += ["features_memory", "reproduce", "reproduce_again"]
KINDS = {
    "problems": Look("problems answered", BLUE, "o"),
    "variants": Look("variants answered", ORANGE, "s", "--"),
    "layers": Look("layers listened to", GREEN, "^", "-."),
    "width": Look("width of the SAEs", PURPLE, "D", ":"),
}


def replaced(table: pd.DataFrame, rows: Sequence[dict[str, Any]], key: str, order: Sequence[str]) -> pd.DataFrame:
    """The table with these rows in the place of those of the same keys, in this order of keys."""
    new = pd.DataFrame(rows)
    kept = table[~table[key].isin(new[key])]
    whole = pd.concat([kept, new], ignore_index=True) if len(kept) else new
    return whole.sort_values(key, key=lambda names: names.map(list(order).index), kind="stable", ignore_index=True)


def keep(path: Path, rows: Sequence[dict[str, Any]], columns: list[str], order: Sequence[str]) -> pd.DataFrame:
    """Put rows into a table on disk, by its first column, and return it."""
    known = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=columns)
    table = replaced(known, rows, columns[0], order)[columns]
    text = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    atomic(path, lambda draft: draft.write_text(text, encoding="utf-8"))
    return table


def draw(folder: Path) -> None:
    """The figure of the tables that are there, a panel each."""
    drawn = [(path, panel) for path, panel in ((folder / "bench.csv", ratios), (folder / "size.csv", costs)) if path.is_file()]
    figure, axes = plots.panels(len(drawn))
    for (path, panel), ax in zip(drawn, np.atleast_1d(axes), strict=True):
        panel(pd.read_csv(path), ax)
    plots.labelled(figure, "medians of alternating runs")
    for kind in ("png", "svg"):
        atomic(folder / f"bench.{kind}", partial(plots.save, figure))


def ratios(table: pd.DataFrame, ax: Axes) -> Axes:
    """How many times ours the peer takes, a bar a work; 1 is no difference."""
    beside = table.dropna(subset=["ratio"])
    bars = ax.barh(range(len(beside)), beside["ratio"] - 1, left=1, color=BLUE)
    ax.bar_label(bars, labels=[f"{ratio:.3g}" for ratio in beside["ratio"]], padding=3, fontsize=8.5)
    ax.axvline(1, color=BLACK, lw=0.8)
    ax.set_xscale("log")
    ax.margins(x=0.18)
    named_rows(beside["work"], ax).set(xlabel="peer / ours (time, or memory)", title="Beside the peers")
    return ax


def costs(table: pd.DataFrame, ax: Axes) -> Axes:
    """Seconds against size, a line a kind, with its slope."""
    for kind, look in KINDS.items():
        part = table[table["of"] == kind]
        if len(part):
            label = f"{look.name} (slope {part['slope'].iloc[0]:.2f})"
            ax.plot(part["size"], part["seconds"], color=look.colour, marker=look.marker, ls=look.dash, label=label)
    ax.set(xscale="log", yscale="log", xlabel="size", ylabel="seconds", title="Cost against size")
    ax.legend()
    return ax


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no name of a machine, and no path."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    ours = {name: version(name).split("+")[0] for name in ("torch", "transformers", "sae-lens")}
    return dict(
        cores=os.cpu_count(),
        processor=processor,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        libraries=ours,
        peers=pins(),
    )


def keep_machine(folder: Path) -> None:
    """Write the machine beside the tables."""
    text = json.dumps(machine(), indent=1) + "\n"
    atomic(folder / "machine.json", lambda draft: draft.write_text(text, encoding="utf-8"))
