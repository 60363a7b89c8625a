"""The notebooks in a real browser: JupyterLab in headless Chromium, driven as a reader would, and pages that axe reads.

pytest tests/test_browser.py          screenshots are left in runs/screens/, to be looked at
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import nbformat
import pytest
import runs
from conftest import ROOT

from stetholib.commands.notebooks import STEPS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make env installs it")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on this machine: apt-get install chromium")

SCREENS = ROOT / "runs" / "screens"
TWEAKED = re.compile("^Overridden$")  # the heading's word; prose speaks of overrides as well
OVERRIDE = '{"selection.score_share": 0.05}'
QUIET = {  # JupyterLab's settings: the whole notebook is in the page, nothing is fetched, nothing is asked
    "notebook-extension/tracker": dict(windowingMode="none"),
    "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False),
}
FOREIGN = {  # parts of a page that axe finds fault with, and why they are not ours
    ".jp-InputPrompt": "the numbers of cells are as pale as JupyterLab's theme has them",
    ".jp-OutputPrompt": "so are those of outputs",
    ".highlight": "so are the colours of code, such as those of its numbers",
    ".noUi-handle": "a slider of ipywidgets has no name; the number field beside it, which has one, sets the same value",
}
KINDS = {  # rules that a theme breaks everywhere
    "link-in-text-block": "JupyterLab's theme underlines a link only below the pointer"
}
BENCH = ".stetholib-bench"
CHANGED = (STEPS[0], STEPS[4])  # which notebooks run once more, with an override; `test_notebooks` has all six do so
sync_api.expect.set_options(timeout=60_000)  # a busy machine is slow


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as made:
        opened = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


def with_smoke(path):
    """A notebook as a reader leaves it who wants the smoke profile, without outputs."""
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert cell.source.count('"mini"') == 1
    cell.source = cell.source.replace('"mini"', '"smoke"')
    for one in notebook.cells:
        if one.cell_type == "code":
            one.outputs, one.execution_count = [], None
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def lab(undisturbed, tmp_path_factory):
    """The address of JupyterLab, as `make lab` starts it, on a copy of a finished run; on loopback, with a token."""
    home = tmp_path_factory.mktemp("lab")
    folder = shutil.copytree(undisturbed, home / "clone")
    for step in STEPS:
        with_smoke(folder / "notebooks" / f"{step}.ipynb")
    for name, settings in QUIET.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "spaces", "JUPYTER_CONFIG_DIR": "config"}
    places |= {"JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython"}
    known = {name: value for name, value in os.environ.items() if name not in ("STETHOLIB_HOME", "TQDM_DISABLE")}
    known |= {name: str(home / place) for name, place in places.items()} | dict(PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, token = free.getsockname()[1], secrets.token_hex(16)
    asked = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    asked += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    with (home / "lab.log").open("w") as log:
        started = dict(cwd=folder, env=known, stdout=log, stderr=log, start_new_session=True)
        process = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", *asked], **started)
    try:
        address = f"http://127.0.0.1:{port}"
        runs.wait_for(lambda: answers(f"{address}/api?token={token}"), process, every=0.3)
        yield lambda step: f"{address}/lab/tree/notebooks/{step}.ipynb?token={token}&reset"
    finally:
        runs.kill(process)


def answers(address):
    with suppress(OSError), urllib.request.urlopen(address, timeout=2) as said:
        return said.status == 200
    return False


@pytest.fixture()
def page(browser):
    """A page of its own, on whose console nothing may be wrong."""
    context = browser.new_context(viewport=dict(width=1400, height=1000))
    opened, said = context.new_page(), []
    opened.set_default_timeout(60_000)
    opened.on("console", lambda one: said.append(one.text) if one.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(f"{error.name}: {error.message}"))
    yield opened
    context.close()
    assert not said, said


OPEN = "jupyterapp.shell.currentWidget"


def opened(page, address):
    """A notebook in the lab, its kernel ready."""
    page.goto(address)
    page.wait_for_function(
        f"() => window.jupyterapp && {OPEN}?.sessionContext?.session?.kernel?.status === 'idle'", timeout=120_000
    )


def run_all(page):
    """Run every cell by the menu's command, to the end; returns the notebook as it then is."""
    assert page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells').then(() => true)")
    return nbformat.from_dict(page.evaluate(f"{OPEN}.content.model.toJSON()"))


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def typed(page, source):
    """Write a cell's source anew, as a reader does, on the keyboard."""
    page.evaluate(f"{OPEN}.content.activeCellIndex = 1; jupyterapp.commands.execute('notebook:enter-edit-mode')")
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(source)


def shot(page, name, **what):
    SCREENS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENS / f"{name}.png", **what)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_notebook_runs_in_jupyterlab_twice_and_says_what_is_overridden(lab, page, step):
    opened(page, lab(step))
    for _ in range(2):
        done = run_all(page)
        found = outputs(done)
        assert not [one for one in found if one.output_type == "error" or one.get("name") == "stderr"]
        code = [cell for cell in done.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in code)
        pictures = [one for one in found if "image/png" in one.get("data", {})]
        assert pictures and all(len(one.metadata["image/png"]["alt"]) > 40 for one in pictures)
    assert page.get_by_text("ours, smoke test").first.is_visible() and not page.locator("strong", has_text=TWEAKED).count()
    shot(page, step)
    if step in CHANGED:
        changed(page, step)
    page.evaluate(f"{OPEN}.sessionContext.shutdown()")


def changed(page, step):
    """Change an override and run again: the heading names it."""
    typed(page, f'profile = "smoke"\ndevice = "cpu"\noverrides = {OVERRIDE}')
    run_all(page)
    page.locator("strong", has_text=TWEAKED).first.scroll_into_view_if_needed()
    assert (
        "selection.score_share = 0.05"
        in page.locator(".jp-RenderedMarkdown", has=page.locator("strong", has_text=TWEAKED)).first.inner_text()
    )
    shot(page, f"{step}-overridden")


@pytest.mark.slow
def test_the_live_bench_is_moved_by_keyboard_and_its_numbers_and_pictures_follow(lab, page, covered):
    opened(page, lab("05_minerva_math"))
    run_all(page)
    bench = page.locator(BENCH)
    bench.scroll_into_view_if_needed()
    status, loss, picture = bench.get_by_role("status"), bench.locator("table"), bench.locator("img")
    sync_api.expect(status).to_contain_text("Ready")
    shot(page, "bench-begins")
    before = loss.inner_text(), [one.get_attribute("src") for one in picture.all()]
    box = bench.get_by_role("checkbox", name="layer 0")
    was = box.is_checked()
    box.focus()
    started = time.monotonic()
    page.keyboard.press("Space")
    sync_api.expect(status).to_contain_text("loss: measured in")
    covered(f"the live bench, in JupyterLab: its loss followed a key within {time.monotonic() - started:.1f} s")
    assert box.is_checked() is not was and loss.inner_text() != before[0]
    assert picture.count() == 1 and picture.first.get_attribute("src") not in before[1]
    button = bench.get_by_role("button", name=re.compile("^Answer 30 problems"))
    for said in ("answers: measured in", "answers: known from before"):
        button.focus()
        page.keyboard.press("Enter")
        sync_api.expect(status).to_contain_text(said)
    assert picture.count() == 2 and "accuracy of 30 problems" in picture.nth(1).get_attribute("alt")
    bench.get_by_label("scale alpha").fill("0")
    page.keyboard.press("Enter")
    sync_api.expect(status).to_contain_text("scale 0.00")
    rows = [line.split()[-2:] for line in loss.inner_text().splitlines() if line.startswith(("base", "this setting"))]
    assert rows[0] == rows[1]
    bench.get_by_label("start from").select_option("whole vector")
    sync_api.expect(status).to_contain_text("layers 0, 1, 2, scale 1.00")
    assert all(bench.get_by_role("checkbox", name=f"layer {at}").is_checked() for at in range(3))
    bench.get_by_label("projected").check()
    sync_api.expect(status).to_contain_text("Projected vector")
    shot(page, "bench-moved")
    assert serious(page, BENCH) == []
    page.evaluate(f"{OPEN}.sessionContext.shutdown()")


def serious(page, where="body"):
    """What axe calls serious or critical below a place, one line a kind, but for what is not ours."""
    context = dict(include=[[where]], exclude=[[one] for one in FOREIGN])
    found = axe.Axe().run(page, context=context).response["violations"]
    grave = [one for one in found if one["impact"] in ("serious", "critical") and one["id"] not in KINDS]
    return [f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}" for one in grave]


@pytest.mark.parametrize("step", STEPS)
def test_a_committed_notebook_as_a_page_has_nothing_serious_against_it(browser, tmp_path, step):
    from nbconvert import HTMLExporter

    text, _ = HTMLExporter(template_name="lab").from_filename(ROOT / "notebooks" / f"{step}.ipynb")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    page.route(re.compile("^https?:"), lambda route: route.abort())
    page.goto(f"file://{tmp_path}/page.html", wait_until="domcontentloaded")
    assert serious(page) == []
    context.close()


@pytest.mark.parametrize("step", STEPS)
def test_every_picture_of_a_committed_notebook_has_words(step):
    notebook = nbformat.read(ROOT / "notebooks" / f"{step}.ipynb", as_version=4)
    pictures = [one for one in outputs(notebook) if "image/png" in one.get("data", {})]
    bare = [one for one in pictures if not one.metadata.get("image/png", {}).get("alt")]
    assert pictures and not bare, "run: make reproduce, make publish"
