"""`make slides`: figures and questions of the notebooks, without code, in files that ask for nothing."""

import html
import json
import re

import pytest
from conftest import ROOT
from nbconvert import HTMLExporter

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def deck(notebook, tmp_path):
    path = tmp_path / "one.ipynb"
    path.write_text(json.dumps(notebook))
    return HTMLExporter(template_name="slides", extra_template_basedirs=[str(ROOT / "notebooks")]).from_filename(str(path))[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_and_every_question_is_on_a_slide_and_nothing_is_fetched(path, tmp_path):
    notebook = json.loads(path.read_text())
    shown = deck(notebook, tmp_path)
    pictures = [
        o["data"]["image/png"] for c in notebook["cells"] for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert pictures and all(f'base64,{"".join(one).replace(chr(10), "")}"' in shown for one in pictures)
    assert shown.count("<section>") >= len(pictures) - 4 and shown.count("<img alt") == len(pictures)
    assert len(re.findall(r"<strong>\d · ", shown)) == 3 and "What we saw" in shown
    assert not re.search(r'(src|href)="(?!data:|#)', shown) and "import " not in shown and "answer =" not in shown
    assert "$" not in html.unescape(re.sub(r"<script>.*?</script>|base64,[^\"]*", "", shown, flags=re.S)), (
        "formulas are not typeset here"
    )


def test_a_cell_that_says_skip_is_left_out(tmp_path):
    notebook = json.loads(NOTEBOOKS[0].read_text())
    before = deck(notebook, tmp_path)
    (cell,) = [cell for cell in notebook["cells"] if "".join(cell["source"]).startswith("## Did the fine-tune learn?")]
    cell["metadata"]["slideshow"] = {"slide_type": "skip"}
    after = deck(notebook, tmp_path)
    assert "Did the fine-tune learn?" in before and "Did the fine-tune learn?" not in after
    assert before.count("<section>") == after.count("<section>") + 1 and before.count("<img") == after.count("<img") + 1
