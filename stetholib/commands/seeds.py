"""The experiment in several worlds: new data, fine-tune and SAEs from new seeds, on the same base model: `make seeds SEEDS=5`.

What is the Hub's stays the same, and world 0 is the profile's own run. Every world is a process of its own, so that memory stays
flat, and is cached by stage."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import pandas as pd

import stetholib
from stetholib import layer_sets, profiles
from stetholib.claims import HOLDS
from stetholib.commands.organisms import INTO as ORGANISMS
from stetholib.commands.organisms import leave
from stetholib.commands.reproduce import alone, check_processes
from stetholib.commands.watch import say
from stetholib.errors import UserError
from stetholib.statistics import mean_interval
from stetholib.store.tables import Workspace

SAE_SEEDS = 1  # further SAE trainings within each world
REFERENCES = {"percentile_": 0.5, "reliability": 0.5, "r_held_out": 0.1, "misalignment_index": 0.5}  # of others it is 0


def run(name: str, device: str, count: int, into: str | None = None, processes: int = 1) -> None:
    """Run `count` worlds of a profile and leave tables and a figure in `figures/<into>/`, by default `seeds-<profile>`.
    processes: how many worlds at once, on a CPU; what they give is the same."""
    profile = profiles.load(name)
    into = profiles.check_name(f"seeds-{profile.name}" if into is None else into, "seeds: INTO")
    if into in (profile.name, *profiles.available()):
        raise UserError(f"seeds: INTO is {into}, a profile's own figures; give another name")
    if into == ORGANISMS:
        raise UserError(f"seeds: {into} is where `make organisms` writes; give another INTO")
    if count < 1:
        raise UserError(f"seeds: {count} worlds were asked for; SEEDS must be 1 or more")
    check_processes(processes, device)
    if processes > 1 and device != "cpu":
        raise UserError(f"seeds: PROCESSES is {processes}, but worlds share a GPU in turns only; leave it out")
    os.environ["STETHOLIB_PROGRESS"] = "/dev/stderr"
    if processes > 1:  # worlds that share cores leave them at once
        os.environ["GOMP_SPINCOUNT"] = "0"
    with alone(Workspace(profile.name), profile), ThreadPoolExecutor(processes) as threads:
        seeds = range(profile.seed, profile.seed + count)
        found = list(threads.map(partial(_apart, name, device), seeds))
    tables = {key: pd.concat([world[key] for world, _ in found], ignore_index=True) for key in found[0][0]}
    tables["spread"] = spread(tables["worlds"])
    manifest = found[0][1] | dict(seeds=tables["worlds"]["world"].tolist())
    leave(tables, manifest, Workspace(into), ["world"])
    _draw(profile, tables, Workspace(into))


def _apart(name: str, device: str, seed: int) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """One world in a process of its own."""
    started = time.monotonic()
    say(f"world {seed}: running ...")
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(one, name, device, seed).result()
    except BrokenProcessPool:
        raise UserError(f"world {seed}: its process was killed, most often for want of memory; finished work is kept") from None
    say(f"world {seed}: {time.monotonic() - started:.0f} s")
    return found


def spread(worlds: pd.DataFrame, level: float = 0.05) -> pd.DataFrame:
    """Each figure over worlds: n, reference, mean, sd, Student's interval of the mean (low, high; NaN of one world) and the
    verdict, on which side of the reference the interval lies. worlds: one row a world; p-values have no mean and are left out."""
    rows = []
    for name, column in worlds.select_dtypes("number").filter(regex="^(?!p_|world$)").items():
        values, reference = column.dropna(), next((r for start, r in REFERENCES.items() if str(name).startswith(start)), 0.0)
        mean, low, high = mean_interval(values.to_numpy(), level)
        side = "above" if low > reference else "below" if high < reference else ""
        verdict = f"{side} {reference:g}" if side else "cannot be told"
        about = dict(quantity=name, n=len(values), reference=reference, mean=mean, sd=values.std())
        rows.append(about | dict(low=low, high=high, verdict=verdict))
    return pd.DataFrame(rows)


def one(name: str, device: str, seed: int) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """One world: its ledger, its main figures in one row, and how stable its layer scores are over SAE seeds; its manifest."""
    own = profiles.load(name).seed
    study = stetholib.Study.open(name, {} if seed == own else {"seed": seed}, device)
    tables = {
        "claims": study.significance.claims(),
        "worlds": pd.DataFrame([study.significance.headline()]),
        "stability": study.layer_selection.sae_stability(SAE_SEEDS),
        "selectors": layer_sets.standing(study.layer_selection.sets()),
    }
    return {key: table.assign(world=seed) for key, table in tables.items()}, study.manifest()


def _draw(profile: profiles.Profile, tables: dict[str, pd.DataFrame], folder: Workspace) -> None:
    from stetholib import plots  # not earlier: matplotlib reads its settings on import, after set_environment has placed them

    claims, count = tables["claims"], tables["worlds"]["world"].nunique()
    fig, axes = plots.panels(columns=4, width=4.6, height=5.2)
    for ax, column, title in zip(axes, ("verdict", "verdict_strict"), ("Like for like", "Strictly"), strict=False):
        plots.claims_by_world(claims, column, ax)
        holds = claims[column].isin(HOLDS)
        always = int(holds.groupby([claims["claim"], claims["contrast"]]).all().sum())
        ax.set_title(f"{title}, {always} of {len(claims) // count} hold in every world")
    axes[1].set_yticklabels([])
    plots.percentiles_by_world(tables["worlds"], axes[2])
    medians = tables["worlds"][["percentile_corpus", "percentile_matched"]].median()
    axes[2].set_title(f"The selected sets beat {medians.iloc[0]:.0%} and {medians.iloc[1]:.0%} (medians)")
    plots.gains_by_world(tables["worlds"], tables["spread"], axes[3])
    means = tables["spread"].set_index("quantity")["mean"]
    full, steth = (100 * means[f"gain_{name}_math_verify"] for name in ("full", "stethoscope"))
    axes[3].set_title(f"Mean gain: whole {full:+.1f}, stethoscope {steth:+.1f} points")
    plots.labelled(fig, f"Ours, {profile.title}, {count} world" + "s" * (count > 1))
    for kind in ("png", "svg"):
        folder.file(f"seeds.{kind}", lambda path: plots.save(fig, path))
