"""Put what a run of the miniature shows into the committed notebooks, so that they can be read without running: `make publish`.

A run itself never touches them. Beside the outputs a notebook keeps which profile they come from, and the hashes of its own source
and of the figures and tables that the same run left, so that a test can tell whether all of them still belong together."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from stetholib import profiles
from stetholib.commands.notebooks import STEPS, notebook_text
from stetholib.commands.reproduce import code_key, key_of
from stetholib.errors import UserError
from stetholib.store.files import atomic, digest_of
from stetholib.store.tables import Workspace

PROFILE = "mini"


def publish(root: Path | None = None) -> None:
    """Write the outputs of the last run into the six notebooks. Raises UserError where a notebook has changed since, or shows what
    belongs to one machine or one run."""
    workspace = Workspace(PROFILE, root)
    profile, texts = profiles.load(PROFILE), {}
    code = code_key(profile, "cpu")
    for step in STEPS:
        path = workspace.root / "notebooks" / f"{step}.ipynb"
        notebook = json.loads(path.read_text(encoding="utf-8"))
        texts[path] = shown(notebook, *_ran(workspace, path, profile.digest, code), str(workspace.root))
    for path, notebook in texts.items():
        text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        atomic(path, partial(Path.write_text, data=text, encoding="utf-8"))


def _ran(workspace: Workspace, path: Path, digest: str, code: str) -> tuple[list[Any], dict[str, Any]]:
    """The cells of a notebook as they ran, and what it says of that run."""
    again = f"run `make reproduce PROFILE={PROFILE}` first"
    ran, mark = (workspace.executed / f"{path.stem}.{kind}" for kind in ("ipynb", "json"))
    if not (ran.is_file() and mark.is_file()):
        raise UserError(f"notebooks/{path.name} has not run to its end in this folder; {again}")
    done, now = json.loads(mark.read_text(encoding="utf-8")), key_of(path.stem, path, code, workspace)
    if done["key"] != now:
        raise UserError(f"notebooks/{path.name} ran with other code, libraries or another device than the CPU; {again}")
    cells = json.loads(ran.read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if "injected-parameters" not in cell["metadata"].get("tags", [])]  # papermill's own
    if [(cell["cell_type"], "".join(cell["source"])) for cell in cells] != notebook_text(path):
        raise UserError(f"notebooks/{path.name} has changed since it ran; {again}")
    figures = {Path(name).name: known for name, known in done["files"].items() if name.startswith("figures/")}
    about = dict(profile=PROFILE, digest=digest, source=digest_of(notebook_text(path)), figures=figures)
    return cells, about


def shown(notebook: dict[str, Any], ran: list[Any], about: dict[str, Any], root: str) -> dict[str, Any]:
    """A notebook with the outputs of its cells as they ran, numbered in order. Raises UserError for a path of this machine, an
    error, or a warning among them."""
    number = 0
    for cell, done in zip(notebook["cells"], ran, strict=True):
        if cell["cell_type"] != "code":
            continue
        number += 1
        outputs = [one for one in done["outputs"] if one["output_type"] != "stream" or one["text"]]
        said = json.dumps(outputs)
        if any(one["output_type"] == "error" or one.get("name") == "stderr" for one in outputs) or root in said:
            raise UserError(f"cell {cell['id']} shows an error, a warning or a path of this machine: {said[:200]}")
        numbered = [one | dict(execution_count=number) if "execution_count" in one else one for one in outputs]
        cell |= dict(execution_count=number, outputs=numbered)
    notebook["metadata"]["stetholib"] = about
    return notebook


if __name__ == "__main__":
    publish()
