"""The experiment in several worlds: new data, fine-tune and SAEs from new seeds, on the same base model.

`make seeds SEEDS=5` repeats a profile under the seeds 0, 1, 2, ... and says how often each claim holds; world 0 is its own run.
What is the Hub's stays the same. Every world is a process of its own, so that memory stays flat, and is cached by stage."""

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pandas as pd

import stetholib
from stetholib import profiles
from stetholib.claims import FAILS
from stetholib.commands.reproduce import alone, set_environment
from stetholib.errors import UserError
from stetholib.store.tables import Workspace

SAE_SEEDS = 1  # further SAE trainings within each world


def run(name: str, device: str, count: int, into: str | None = None, root: Path | None = None, out: Any = sys.stderr) -> None:
    """Run `count` worlds of a profile and leave tables and a figure in `figures/<into>/`, by default `seeds-<profile>`."""
    profile = profiles.load(name)
    if count < 1:
        raise UserError(f"seeds: {count} worlds were asked for; SEEDS must be 1 or more")
    workspace = Workspace(profile.name, root)
    set_environment(profile.threads, workspace.root / "runs")
    os.environ["STETHOLIB_PROGRESS"] = "/dev/stderr"
    found = []
    with alone(workspace, profile.name):
        for seed in range(profile.seed, profile.seed + count):
            started = time.monotonic()
            print(f"world {seed}: running ...", file=out, flush=True)
            try:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    found.append(pool.submit(one, name, device, seed, root).result())
            except BrokenProcessPool:
                raise UserError(
                    f"world {seed}: its process was killed, most often for want of memory; finished work is kept"
                ) from None
            print(f"world {seed}: {time.monotonic() - started:.0f} s", file=out, flush=True)
    tables = {key: pd.concat([world[key] for world in found], ignore_index=True) for key in found[0]}
    _write(profile, tables, Workspace(into or f"seeds-{profile.name}", root))


def one(name: str, device: str, seed: int, root: Path | None = None) -> dict[str, pd.DataFrame]:
    """One world: its ledger, its main figures in one row, and how stable its layer scores are over SAE seeds."""
    own = profiles.load(name).seed
    study = stetholib.Study.open(name, {} if seed == own else {"seed": seed}, device, root)
    tables = {
        "claims": study.significance.claims(),
        "worlds": pd.DataFrame([study.significance.headline()]),
        "stability": study.layer_selection.sae_stability(SAE_SEEDS),
    }
    return {key: table.assign(world=seed) for key, table in tables.items()}


def _write(profile: profiles.Profile, tables: dict[str, pd.DataFrame], folder: Workspace) -> None:
    from stetholib import plots  # not earlier: matplotlib reads its settings on import, after set_environment has placed them

    for stem, table in tables.items():
        ordered = table[["world", *(column for column in table if column != "world")]]
        folder.text(f"{stem}.csv", ordered.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    claims, count = tables["claims"], tables["worlds"]["world"].nunique()
    fig, axes = plots.panels(columns=3, width=4.6, height=5.2)
    for ax, column, title in zip(axes, ("verdict", "verdict_strict"), ("Like for like", "Strictly"), strict=False):
        plots.claims_by_world(claims, column, ax)
        holds = ~claims[column].isin(FAILS)
        always = int(holds.groupby([claims["claim"], claims["contrast"]]).all().sum())
        ax.set_title(f"{title}, {always} of {len(claims) // count} hold in every world")
    axes[1].set_yticklabels([])
    plots.percentiles_by_world(tables["worlds"], axes[2])
    medians = tables["worlds"][["percentile_corpus", "percentile_matched"]].median()
    axes[2].set_title(f"The selected sets beat {medians.iloc[0]:.0%} and {medians.iloc[1]:.0%} (medians)")
    plots.labelled(fig, f"{profile.title}, {count} worlds")
    for kind in ("png", "svg"):
        folder.file(f"seeds.{kind}", lambda path: plots.save(fig, path))
