"""The notebooks as a reader uses them: in a kernel that stays, cell by cell, run again, with other parameters. Slow."""

import os
import shutil

import nbformat
import pytest
import runs
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from stetholib.commands.notebooks import STEPS

pytestmark = pytest.mark.slow
OVERRIDES = '{"selection.score_share": 0.05}'


@pytest.fixture(scope="module")
def opened(undisturbed, tmp_path_factory):
    """A copy of an undisturbed run, whose notebooks are opened one after the other."""
    return shutil.copytree(undisturbed, tmp_path_factory.mktemp("opened") / "clone")


def with_parameters(notebook, *changes):
    """The notebook's parameters cell as a reader leaves it."""
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    for old, new in changes:
        assert cell.source.count(old) == 1
        cell.source = cell.source.replace(old, new)
    return cell


def run_all(client, notebook):
    """Run every cell from the top; returns all that was shown, as text."""
    for number, cell in enumerate(notebook.cells):
        client.execute_cell(cell, number)
    return nbformat.writes(notebook)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def shown(cell):
    return " ".join(str(output.get("data", {}).get("text/markdown", "")) for output in cell.outputs)


def check_clean(notebook, folder):
    """No warning, no bar that stays, no place on this machine."""
    found = outputs(notebook)
    assert found and not [output for output in found if output.output_type == "stream" and output.name == "stderr"]
    assert not [output for output in found if any("widget" in kind for kind in output.get("data", {}))]
    assert str(folder) not in nbformat.writes(notebook)


@pytest.mark.parametrize("step", STEPS)
def test_a_notebook_runs_again_in_its_kernel_and_with_overrides_beside_the_profiles_own_files(opened, step):
    notebook = nbformat.read(opened / "notebooks" / f"{step}.ipynb", as_version=4)
    parameters, heading = (
        with_parameters(notebook, ('"mini"', '"smoke"')),
        [c for c in notebook.cells if c.cell_type == "code"][1],
    )
    before, kernel = runs.made(opened), NotebookClient(notebook, resources={"metadata": {"path": str(opened / "notebooks")}})
    known = {name: value for name, value in os.environ.items() if name not in ("STETHOLIB_HOME", "TQDM_DISABLE")}
    with kernel.setup_kernel(env=known | dict(PYTHONPATH=str(opened), PYTHONHASHSEED="0")):
        for _ in range(2):
            run_all(kernel, notebook)
            check_clean(notebook, opened)
            assert "Overridden" not in shown(heading)
        assert runs.made(opened) == before
        with_parameters(notebook, ("overrides = {}", f"overrides = {OVERRIDES}"))
        run_all(kernel, notebook)
        check_clean(notebook, opened)
        assert "**Overridden**: `selection.score_share` = 0.05." in shown(heading)
        (apart,) = (opened / "figures").glob("smoke-*")
        assert {path.name for path in apart.glob(f"{step[:2]}_*")} == {name for name in before if name.startswith(f"{step[:2]}_")}
        assert runs.made(opened) == before
        parameters.source = parameters.source.replace("overrides", "overides")
        kernel.execute_cell(parameters, 0)
        with pytest.raises(CellExecutionError):
            kernel.execute_cell(heading, 1)
        (refused,) = [output for output in heading.outputs if output.output_type == "error"]
        assert len(refused.traceback) == 1 and "did you mean 'overrides'" in refused.traceback[0]
        left = nbformat.v4.new_code_cell("sorted({'study', 'step'} & set(globals()))")
        notebook.cells.append(left)
        kernel.execute_cell(left, len(notebook.cells) - 1)
        assert left.outputs[0].data["text/plain"] == "[]"


def test_executed_notebooks_hold_no_warning_no_widget_and_no_place_of_this_machine(undisturbed):
    for path in sorted((undisturbed / "runs" / "smoke" / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.pop("papermill", None)  # which says from where to where
        check_clean(notebook, undisturbed)
