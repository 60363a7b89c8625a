"""What is put into a committed notebook: what its run showed, and nothing that belongs to one machine."""

import json

import pytest

from stetholib.commands import publish
from stetholib.commands.notebooks import STEPS, notebook_text
from stetholib.errors import UserError
from stetholib.store.files import digest_of

SHOWN = {"output_type": "execute_result", "execution_count": 7, "metadata": {}, "data": {"text/plain": "41"}}


def code(name, source, *outputs, tags=()):
    return dict(cell_type="code", id=name, metadata=dict(tags=[*tags]), source=[source], outputs=[*outputs], execution_count=7)


def notebook(*cells):
    return dict(cells=[dict(cell_type="markdown", id="a", metadata={}, source=["# A\n", "prose"]), *cells], metadata={})


def test_outputs_are_those_of_the_run_numbered_in_order():
    before, about = notebook(code("b", "1"), code("c", "2")), dict(profile="mini")
    ran = notebook(code("b", "1"), code("c", "2", SHOWN, dict(output_type="stream", name="stdout", text=[])))
    made = publish.shown(before, ran["cells"], about, "/home/me")
    assert [cell.get("execution_count") for cell in made["cells"]] == [None, 1, 2]
    assert made["cells"][2]["outputs"] == [{**SHOWN, "execution_count": 2}] and made["metadata"]["stetholib"] == about


@pytest.mark.parametrize(
    "output",
    [
        dict(output_type="stream", name="stderr", text=["UserWarning: careful"]),
        dict(output_type="error", ename="ValueError", evalue="no", traceback=[]),
        {**SHOWN, "data": {"text/plain": "/home/me/runs"}},
    ],
)
def test_a_warning_an_error_and_a_path_of_this_machine_are_refused(output):
    with pytest.raises(UserError, match="cell b shows an error, a warning or a path"):
        publish.shown(notebook(code("b", "1")), notebook(code("b", "1", output))["cells"], {}, "/home/me")


def test_six_notebooks_are_published_only_as_they_ran(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "key_of", lambda *_: "k")
    for folder in ("notebooks", "runs/mini/notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    for step in STEPS:
        (tmp_path / "notebooks" / f"{step}.ipynb").write_text(json.dumps(notebook(code("b", "1"))))
        ran = notebook(code("p", "profile = 1", tags=["injected-parameters"]), code("b", "1", SHOWN))
        (tmp_path / "runs/mini/notebooks" / f"{step}.ipynb").write_text(json.dumps(ran))
        (tmp_path / "runs/mini/notebooks" / f"{step}.json").write_text(
            json.dumps(dict(key="k", files={"figures/mini/x.csv": "1", "runs/y": "2"}))
        )
    publish.publish(tmp_path)
    path = tmp_path / "notebooks" / f"{STEPS[-1]}.ipynb"
    about = json.loads(path.read_text())["metadata"]["stetholib"]
    assert about["figures"] == {"x.csv": "1"} and about["source"] == digest_of(notebook_text(path))
    monkeypatch.setattr(publish, "key_of", lambda *_: "of other code")
    with pytest.raises(UserError, match="ran with other code"):
        publish.publish(tmp_path)
    monkeypatch.setattr(publish, "key_of", lambda *_: "k")
    path.write_text(path.read_text().replace("prose", "other prose"))
    with pytest.raises(UserError, match="has changed since it ran"):
        publish.publish(tmp_path)
    (tmp_path / "runs/mini/notebooks" / f"{STEPS[0]}.json").unlink()
    with pytest.raises(UserError, match="has not run to its end"):
        publish.publish(tmp_path)
