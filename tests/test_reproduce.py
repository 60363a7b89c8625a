"""Which notebooks run again: those whose text, profile, code, models or worlds have changed, and no other."""

import pytest

from stetholib import profiles
from stetholib.commands import notebooks, reproduce
from stetholib.store.tables import Workspace


@pytest.fixture()
def ran(tmp_path, monkeypatch):
    """Runs all six as if they left one table each, and says which did."""
    workspace, steps = Workspace("mini", tmp_path), []
    for folder in (workspace.figures, workspace.executed, tmp_path / "notebooks"):
        folder.mkdir(parents=True)
    for step in notebooks.STEPS:
        (tmp_path / "notebooks" / f"{step}.ipynb").write_text('{"cells": []}')

    def execute(path, workspace, parameters):
        steps.append(path.stem)
        (workspace.figures / f"{path.stem}.csv").write_text("1")

    monkeypatch.setattr(reproduce, "execute", execute)
    monkeypatch.setattr(reproduce.doctor, "refuse", lambda *_: None)

    def run(name="mini"):
        steps.clear()
        paths = {step: tmp_path / "notebooks" / f"{step}.ipynb" for step in notebooks.STEPS}
        reproduce._run_all(profiles.load(name), dict(profile=name, device="cpu"), workspace, paths, 1)
        return tuple(steps)

    return run, workspace


def test_tables_of_other_worlds_run_the_notebook_again_that_reads_them(ran):
    run, workspace = ran
    assert run() == notebooks.STEPS and run() == ()
    for table in workspace.over_worlds():
        table.parent.mkdir()
        for content in ("1", "2"):
            table.write_text(content)
            assert run() == ("04_layer_selection",) and run() == ()


def test_another_text_and_a_lost_table_run_one_notebook_again(ran):
    run, workspace = ran
    run()
    (workspace.root / "notebooks" / f"{notebooks.STEPS[1]}.ipynb").write_text(
        '{"cells": [{"cell_type": "markdown", "source": ["x"]}]}'
    )
    (workspace.figures / f"{notebooks.STEPS[2]}.csv").write_text("2")
    assert run() == notebooks.STEPS[1:3] and run() == ()


def test_the_weights_that_ship_with_the_package_are_part_of_what_a_run_depends_on():
    names = [name for name, *_ in reproduce._local_files(profiles.load("mini"))]
    assert any(name.endswith("mini/base/model.safetensors") for name in names)
    assert not any("checkpoint" in name for name in names)
