"""One claim of the paper, checked alone: `make claim CLAIM=C3` measures what its rule reads and nothing else."""

import sys
from pathlib import Path
from typing import Any

import stetholib
from stetholib import profiles
from stetholib.claims import NAMES
from stetholib.commands.reproduce import alone, set_environment
from stetholib.errors import UserError
from stetholib.store.tables import Workspace


def check(claim: str, name: str, device: str, root: Path | None = None, out: Any = sys.stdout) -> None:
    """Print a claim's statement, rule, measured figure and both verdicts, one item a line; writes no figure.

    claim: C1 to C9; name: the profile's. What is measured is kept, and a whole run finds it.
    """
    if claim not in NAMES:
        raise UserError(f"claim: unknown claim {claim!r}; there are: {', '.join(NAMES)}")
    profile = profiles.load(name)
    workspace = Workspace(profile.name, root)
    set_environment(profile.threads, workspace.root / "runs")
    with alone(workspace, profile.name):
        rows = stetholib.Study.open(name, device=device, root=root).significance.claims(claim).to_dict("records")
    first, items = rows[0], dict(measured="measured", testable="testable", verdict="like for like", verdict_strict="strictly")
    print(f"{claim}: {first['statement']}\npublished: {first['published']}\nrule: {first['rule']}", file=out)
    for row in rows:
        where = "" if row["contrast"] == "-" else f" ({row['contrast']})"
        print(*(f"{label}{where}: {row[column]}" for column, label in items.items()), sep="\n", file=out)
