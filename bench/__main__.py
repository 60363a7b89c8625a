"""`make bench`: every work beside its peer in one run, or some of them (`--works answer edit`)."""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from bench import inputs, peers, results
from bench.inputs import Plan
from bench.size import size
from bench.timing import ROOT
from bench.works import WORKS
from stetholib import profiles
from stetholib.__main__ import Parser
from stetholib.commands.reproduce import set_environment
from stetholib.errors import UserError
from stetholib.profiles import nearest
from stetholib.store.files import held

EVERY = [*WORKS, "size"]
DEFAULT = [name for name in EVERY if name != "reproduce"]


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """What was typed; raises UserError with one line where it cannot be."""
    parser = Parser(prog="make bench", description="Ours beside its peers: times, memory, and whether outputs are equal.")
    parser.add_argument("--works", nargs="*", default=[], help=f"some of: {', '.join(EVERY)} (all but reproduce)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each side, ours and theirs in turn (5)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the true sizes; less, to try the command, writes to runs/ (1)"
    )
    parser.add_argument("--reproduce", action="store_true", help="the smoke profile as well, in a clone, cold and again")
    asked = parser.parse_args(arguments)
    if unknown := [name for name in asked.works if name not in EVERY]:
        raise UserError(f"WORKS: there is no work {unknown[0]!r}{nearest(unknown[0], EVERY)}; there are: {', '.join(EVERY)}")
    if asked.runs < 1:
        raise UserError(f"RUNS is {asked.runs}; it must be 1 or more")
    if not 0 < asked.scale <= 1:
        raise UserError(f"SCALE is {asked.scale:g}; it must be above 0 and at most 1")
    wanted = [*(asked.works or DEFAULT), *["reproduce"] * asked.reproduce]
    asked.works = [name for name in EVERY if name in wanted]
    return asked


def alone(function: Any, plan: Plan) -> Any:
    """Call a function in a fresh process, so that no work is charged with what another has left in memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, plan).result()


def run(asked: argparse.Namespace) -> None:
    """Measure work after work; each leaves its rows as soon as it is done."""
    home = ROOT / "runs" / "bench"
    into = ROOT / "figures" / "bench" if asked.scale == 1 else home / "figures"
    plan = Plan(asked.runs, asked.scale, home)
    peers.install()
    set_environment(profiles.load("mini").threads, home)
    os.environ["HF_HUB_OFFLINE"] = "1"
    alone(partial(inputs.prepare, works=asked.works), plan)
    for name in asked.works:
        started = time.monotonic()
        sys.stderr.write(f"{name}: running ...\n")
        if name == "size":
            results.keep(into / "size.csv", alone(size, plan), results.SIZES, [*results.KINDS])
        else:
            results.keep(into / "bench.csv", alone(WORKS[name], plan), results.COLUMNS, results.ORDER)
        sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
        results.keep_machine(into)
        results.draw(into)
    sys.stderr.write(f"tables and figure are in {into.relative_to(ROOT)}/\n")


def main(arguments: list[str] | None = None) -> int:
    """Do what was typed; a user's mistake is one line and exit status 2."""
    try:
        asked = parsed(arguments)
        with held(ROOT / "runs" / "bench.lock", "another run of make bench is under way in this folder; wait for it"):
            run(asked)
    except UserError as error:
        sys.stderr.write(f"bench: {str(error).removeprefix('bench: ')}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("bench: stopped; the rows that were measured are kept\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
