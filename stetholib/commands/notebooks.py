"""The six notebooks: their order, what each must look like before it runs, and a run of one by papermill."""

import json
import logging
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from stetholib.data.hub import full_disk
from stetholib.errors import MEMORY, UserError, want_of_memory
from stetholib.store.tables import Workspace

NAMES = "01_task_vectors 02_sae_features 03_subspace_projection 04_layer_selection 05_minerva_math 06_significance"
STEPS = tuple(NAMES.split())
PARAMETERS = ("profile", "device", "overrides")
QUIETLY = dict(kernel_name="python3", progress_bar=False, extra_arguments=["--IPKernelApp.log_level=CRITICAL"])


def notebook_text(path: Path) -> list[tuple[str, str]]:
    """A notebook's cells as (type, source); outputs and metadata do not count."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"notebooks/{path.name} is missing or not a notebook; restore it with: git checkout notebooks/{path.name}"
        ) from None


def check_notebook(path: Path) -> None:
    """Each notebook must have one cell tagged `parameters`, before any other code, with the three names; cells in order."""
    mend = f"restore it with: git checkout notebooks/{path.name}"
    notebook_text(path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    tagged = [i for i, cell in enumerate(code) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if tagged != [0]:
        what = "has no cell tagged `parameters`" if not tagged else "does not open with its one `parameters` cell"
        raise UserError(f"notebooks/{path.name} {what}; {mend}")
    _check_parameters(path, "".join(code[0]["source"]))
    numbered = [cell["id"] for cell in cells if re.fullmatch(rf"{path.stem[:2]}-\d\d", cell.get("id", ""))]
    if early := next((one for one, other in pairwise(numbered) if one > other), None):
        raise UserError(f"notebooks/{path.name}: its cells are out of order at {early}; {mend}")


def _check_parameters(path: Path, source: str) -> None:
    """The parameters cell sets the three names and no other, and overrides nothing."""
    parted = (line.partition("=") for line in source.splitlines() if "=" in line)
    given = {name.strip(): value.partition("#")[0].strip() for name, _, value in parted}
    if wrong := sorted(set(given) - set(PARAMETERS)) or sorted(set(PARAMETERS) - set(given)):
        raise UserError(f"notebooks/{path.name}: the parameters cell must set {', '.join(PARAMETERS)}; mend {wrong[0]!r}")
    if given["overrides"] != "{}":
        raise UserError(
            f"notebooks/{path.name} has overrides in its parameters cell, which make would write beside the profile's own files; "
            'run it in JupyterLab (make lab), or give them to make: make reproduce SET="selection.layer_share=0.25"'
        )


def check_all(folder: Path) -> dict[str, Path]:
    """The six notebooks of a folder by step, each as it must be. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: the notebooks come with the repository, not with the package; run this in a clone of it, "
            "or set STETHOLIB_HOME to one"
        )
    found = {step: folder / f"{step}.ipynb" for step in STEPS}
    for path in found.values():
        check_notebook(path)
    return found


def execute(path: Path, workspace: Workspace, parameters: dict[str, str]) -> None:
    """One notebook through papermill; its copy stays in `runs/`, up to where it failed. Raises UserError with one line then."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    executed = workspace.executed / path.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    for name in ("asyncio", "papermill", "traitlets"):  # after an interruption they would print tracebacks of their own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        papermill.execute_notebook(str(path), str(executed), parameters=parameters, cwd=str(workspace.root), **QUIETLY)
    except papermill.PapermillExecutionError as error:
        raise UserError(f"{path.stem}, cell {error.exec_count}: {told(error, executed)}") from None
    except DeadKernelError:
        raise UserError(f"{path.stem}: its process was killed, most often for want of memory; see: make doctor") from None


def told(error: Any, executed: Path) -> str:
    """What went wrong in a notebook, in one line, with the mend where it is known."""
    said = f"{error.ename}: {' '.join(str(error.evalue).split()) or _last_words(executed)}"
    if error.ename.endswith(("UserError", "ProfileError", "ModelError", "HubError", "WorkspaceError")):
        return said
    if want_of_memory(said):
        return f"{said}; {MEMORY}"
    if full_disk(said):
        return f"{said}; the disk is full: free some space, then run the same command again, what is finished is kept"
    if "[Errno 13]" in said or "[Errno 30]" in said:
        return f"{said}; it cannot be written: give rights to this folder, then run the same command again"
    return f"{said}; the traceback is in {executed}"


def _last_words(executed: Path) -> str:
    """The last line that a notebook wrote to stderr: all that is left where IPython had no memory to show an error."""
    outputs = [output for cell in json.loads(executed.read_text(encoding="utf-8"))["cells"] for output in cell.get("outputs", [])]
    said = "".join("".join(one["text"]) for one in outputs if one.get("name") == "stderr")
    return ([line.strip() for line in said.splitlines() if line.strip()] or ["no message"])[-1]
