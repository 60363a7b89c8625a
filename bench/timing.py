"""How works are timed: our run and the peer's in turn, processes with their peak memory, and slopes of cost against size."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from stetholib.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


@dataclass(frozen=True)
class Pair:
    """What both sides took, in seconds, and what they gave, run by run."""

    ours: list[float]
    theirs: list[float]
    our_results: list[Any]
    their_results: list[Any]

    def row(self, work: str, peer: str, equal: str) -> dict[str, Any]:
        """The row of the table, with medians."""
        return row(work, peer, self.ours, self.theirs, equal)


def row(work: str, peer: str, ours: Sequence[float], theirs: Sequence[float], equal: str) -> dict[str, Any]:
    """A row of the table: medians of both sides, and how many times ours theirs is."""
    one, other = median(ours), median(theirs)
    return dict(work=work, peer=peer, ours=one, theirs=other, ratio=other / one, equal=equal)


def alternating(
    ours: Callable[[int], Any],
    theirs: Callable[[int], Any],
    runs: int,
    before: Callable[[str], Any] = lambda side: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Pair:
    """Ours, theirs, ours, theirs, ...: each is given the number of the run.
    before: called ahead of each with `ours` or `theirs`, outside the timing."""
    pair = Pair([], [], [], [])
    sides = (("ours", ours, pair.ours, pair.our_results), ("theirs", theirs, pair.theirs, pair.their_results))
    for run in range(runs):
        for side, work, seconds, results in sides:
            before(side)
            started = clock()
            results.append(work(run))
            seconds.append(clock() - started)
    return pair


def process(command: Sequence[Any], log: Path, folder: Path = ROOT) -> float:
    """Run a command to its end and return its peak memory in MiB; its words go to `log`. Raises UserError where it fails.
    On Linux a process is charged with what its parent held when it began, so the caller must be smaller than the command."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as handle:
        begun = subprocess.Popen([str(part) for part in command], cwd=folder, stdout=handle, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(begun.pid, 0)
        begun.returncode = os.waitstatus_to_exitcode(status)
    if begun.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        raise UserError(f"bench: {Path(command[0]).name} failed ({said[-1][:200]}); see {log.relative_to(ROOT)}")
    return usage.ru_maxrss / 1024


def peak(work: Callable[[], Any]) -> float:
    """What a piece of work adds to this process's memory at its peak, MiB, as Linux counts it."""
    held = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    work()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024 - held / MIB


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the line through log(seconds) against log(size): 1 where cost is proportional to size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def share(same: int, of: int) -> str:
    """`yes` where all are the same, else how many."""
    return "yes" if same == of else f"{same} of {of}"
