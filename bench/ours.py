"""Our side of what is asked from a shell: `python -m bench.ours export ...` and `python -m bench.ours answer ...`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.inputs import MAX_NEW_TOKENS, Two
from bench.timing import ROOT, process
from stetholib.data.prompts import problem_id
from stetholib.editing import Edit, edited
from stetholib.models import export, loading
from stetholib.models.answering import Answer, Limits, answer_some
from stetholib.models.loading import LanguageModel

LOG = ROOT / "runs" / "bench" / "logs" / "ours.log"
SLOTS = 512  # as many as a chunk has: on two cores the best of those tried, as the peer gets its best batch size


def answered(model: LanguageModel, prompts: Mapping[str, str], stops: Sequence[str], max_new_tokens: int, slots: int) -> dict:
    """Answers by problem id."""
    limits = Limits(max_new_tokens, slots, tuple(stops))
    return {answer.problem_id: answer for answer in answer_some(model, prompts, limits)}


def ids(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The problem ids of some rows."""
    return [problem_id(row["subject"], row["problem"]) for row in rows]


def verdicts(two: Two, edits: Sequence[Sequence[int]], rows: Sequence[Mapping[str, str]]) -> list[dict]:
    """The records' verdicts by problem id, of each edit in turn, over one loaded model."""
    from stetholib.adapters import harness  # here, since an export starts without it

    base, vector = loading.load(two.base), two.vector()
    tasks = harness.Tasks(rows, 0, harness.MINERVA)
    asked, found = harness.asked(tasks, None), []
    for layers in edits:
        with edited(base.model, Edit(vector, tuple(layers))):
            answers: dict[str, Answer] = answered(base, asked.prompts, asked.stops, MAX_NEW_TOKENS, SLOTS)
        records = harness.records("edit", rows, answers, tasks).set_index("problem_id")
        found.append(records[["exact_match", "math_verify"]].astype(int).to_dict("index"))
    return found


def write(two: Two, layers: Sequence[int], into: Path) -> None:
    """Export an edit."""
    edit = Edit(two.vector(), tuple(layers))
    with export.whole(into, export.bytes_wanted(two.base, edit, False)) as draft:
        export.write_model(two.base, edit, draft)


def run_export(two: Two, layers: Sequence[int], into: Path) -> float:
    """`write` in a process of its own; returns its peak memory in MiB."""
    asked = ["export", two.base, two.finetuned, into, "--edits", json.dumps([list(layers)])]
    return process([sys.executable, "-m", "bench.ours", *asked], LOG)


def run_answer(two: Two, edits: Sequence[Sequence[int]], rows: Path, into: Path) -> list[dict[str, Any]]:
    """`verdicts` in a process of its own; rows, into: JSON files."""
    asked = ["answer", two.base, two.finetuned, into, "--edits", json.dumps([list(one) for one in edits]), "--rows", rows]
    process([sys.executable, "-m", "bench.ours", *asked], LOG)
    return json.loads(into.read_text(encoding="utf-8"))


def main() -> None:
    """Do what was typed."""
    parser = argparse.ArgumentParser(prog="bench.ours")
    parser.add_argument("what", choices=["export", "answer"])
    for name in ("base", "finetuned", "into", "--rows"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--edits", type=json.loads, required=True)
    asked = parser.parse_args()
    two = Two(asked.base, asked.finetuned)
    if asked.what == "export":
        write(two, asked.edits[0], asked.into)
    else:
        rows = json.loads(asked.rows.read_text(encoding="utf-8"))
        asked.into.write_text(json.dumps(verdicts(two, asked.edits, rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
