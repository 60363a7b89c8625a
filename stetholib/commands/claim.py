"""One claim of the paper, checked alone: `make claim CLAIM=C3` measures what its rule reads and nothing else."""

from stetholib.claims import NAMES
from stetholib.commands.reproduce import opened
from stetholib.errors import UserError


def check(claim: str, name: str, device: str) -> str:
    """A claim's statement, rule, measured figure and both verdicts, one item a line; writes no figure.
    claim: C1 to C9; name: the profile's. What is measured is kept, and a whole run finds it."""
    if claim not in NAMES:
        raise UserError(f"claim: unknown claim {claim!r}; there are: {', '.join(NAMES)}")
    with opened(name, device) as study:
        rows = study.significance.claims(claim).to_dict("records")
    first, items = rows[0], dict(measured="measured", testable="testable", verdict="like for like", verdict_strict="strictly")
    lines = [f"{claim}: {first['statement']}", f"published: {first['published']}", f"rule: {first['rule']}"]
    for row in rows:
        where = "" if row["contrast"] == "-" else f" ({row['contrast']})"
        lines += [f"{label}{where}: {row[column]}" for column, label in items.items()]
    return "\n".join(lines)
