"""Rules of the house: notebooks, environment, README and package keep to them."""

import ast
import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from stetholib import profiles
from stetholib.__main__ import COMMANDS, main
from stetholib.commands import environment, notebooks
from stetholib.errors import UserError
from stetholib.plots.style import words
from stetholib.store.files import digest_of, file_hash
from stetholib.store.tables import CONTRACTS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
READMES = ["README.md", *(f"{place}/README.md" for place in ("stetholib", "stetholib/profiles", "figures", "bench", "notebooks"))]
MODULES = sorted([*(ROOT / "stetholib").rglob("*.py"), *(ROOT / "bench").glob("*.py")])


def text(output):
    """What an output says, HTML's signs as they are read."""
    data = output.get("data", {})
    return html.unescape("".join("".join(data.get(kind, "")) for kind in ("text/markdown", "text/html", "text/plain")))


def cells(path, kind="code"):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def test_there_are_six_notebooks_each_with_its_module():
    assert tuple(path.stem for path in NOTEBOOKS) == notebooks.STEPS
    for step in notebooks.STEPS:
        assert (ROOT / "stetholib" / f"{step[3:]}.py").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_short_and_defines_nothing(path):
    content = [one for one in json.loads(path.read_text())["cells"] if "exercise" not in one["metadata"].get("tags", [])]
    code = cells(path)
    lines = [line for cell in code for line in cell.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(content) <= 40 and len(lines) <= 120 and max(len(cell.splitlines()) for cell in code) <= 20
    assert max(len(line) for cell in code for line in cell.splitlines()) <= 100
    assert not any(re.search(r"^\s*(def|class) |sys\.path|^%?cd ", cell, re.M) for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_shows_what_the_run_showed_that_left_the_committed_figures(path):
    notebook, figures = json.loads(path.read_text()), ROOT / "figures" / "mini"
    about, code = notebook["metadata"]["stetholib"], [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    mend = "run: make reproduce, make publish"
    assert about["source"] == digest_of(notebooks.notebook_text(path)), mend
    manifest = json.loads((figures / "manifest.json").read_text())
    assert about["profile"] == "mini" and about["digest"] == profiles.load("mini").digest == manifest["profile_hash"], mend
    left = {one.name: file_hash(one) for one in figures.iterdir() if one.name.startswith(path.stem[:2])}
    assert {name: known for name, known in about["figures"].items() if name != "manifest.json"} == left, mend
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    pictures = [output for cell in code for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert kinds <= {"display_data", "execute_result"} and len(pictures) >= len([name for name in left if name.endswith(".png")])
    assert "papermill" not in notebook["metadata"] and "widgets" not in notebook["metadata"]


def test_the_ledger_that_notebook_06_shows_is_the_committed_one_and_all_notebooks_are_small():
    shown = "\n".join(
        text(output) for cell in json.loads(NOTEBOOKS[-1].read_text())["cells"] for output in cell.get("outputs", [])
    )
    ledger = pd.read_csv(ROOT / "figures" / "mini" / "06_claims.csv")
    assert (
        all(words(measured) in shown for measured in ledger["measured"]) and sum(path.stat().st_size for path in NOTEBOOKS) < 4e6
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_with_its_claim_and_closes_with_a_computed_summary(path):
    first, last = cells(path, "markdown")[0], cells(path)[-1]
    for part in ("claim", "refute", "**Reads**", "**Writes**", "**Takes**"):
        assert part in first
    assert cells(path, "markdown")[-1].startswith("## What we saw") and re.search(
        rf"Markdown\((plots\.words\()?{path.stem[3:]}\.summary\(", last
    )
    notebooks.check_notebook(path)
    assert json.loads(path.read_text())["cells"][1]["metadata"]["tags"] == ["parameters"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_opens_its_study_and_step_and_keeps_its_contract_files(path):
    code, step = cells(path), path.stem[3:]
    assert code[0].splitlines() == ['profile = "mini"', 'device = "cpu"', "overrides = {}"]
    for line in ("study = Study.for_notebook(globals())", f"step = study.{step}", "step.heading()"):
        assert line in code[1]
    kept = set(re.findall(r'study\.keep\("(\w+)"', "\n".join(code)))
    further = {"05_minerva_math": {"records"}, "06_significance": {"manifest"}}.get(path.stem, set())
    assert kept >= {stem for stem in CONTRACTS if stem[:2] == path.stem[:2]} | further
    assert all(stem[:2] == path.stem[:2] for stem in kept - further)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_says_its_ideas_in_formulas_and_names_them(path):
    prose = "\n".join(cells(path, "markdown"))
    assert (
        len(re.findall(r"\$\$.+?\$\$|(?<!\$)\$[^$\n]+\$(?!\$)", prose, re.S)) >= 4
        and len(re.findall(r"\*\*[^*]+\*\*", prose)) >= 7
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_measured_number_is_typed_into_a_notebooks_prose(path):
    allowed = re.compile(r"arxiv\.org/abs/\d+\.\d+|29\.6|39\.4|3\.41|0\.0007|97 %|3 %|50 %|540|160|213|C\d|0\.5|scale 0|n - 1")
    for text in cells(path, "markdown")[1:]:
        rest = allowed.sub("", text)
        assert not re.search(r"\d+\.\d+|\d+ ?%", rest), rest


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_functions_fit_on_a_screen_and_public_ones_have_docstrings(path):
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if node.end_lineno - node.lineno >= 50]
    assert not long, f"{long} are too long"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    public = [node for parent in (tree, *classes) for node in parent.body if isinstance(node, ast.FunctionDef)]
    bare = [node.name for node in public if not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not bare, f"{bare} have no docstring"


def test_the_lock_pins_everything_and_names_no_place():
    lock = (ROOT / "requirements.lock").read_text()
    assert all(environment.PIN.match(line) for line in lock.splitlines() if line.strip())
    assert "+" not in re.sub(r"==[^\n]*", "", lock) and "/" not in lock and "+cpu" not in lock


def test_pyproject_and_conda_agree_with_the_lock():
    pins = {name.lower(): version for name, version in environment.pins((ROOT / "requirements.lock").read_text()).items()}
    project = (ROOT / "pyproject.toml").read_text()
    direct = re.findall(r'"([\w-]+)(?:\[\w+\])?==([\w.]+)"', project)
    assert len(direct) >= 15
    for name, version in direct:
        assert pins.get(name.lower(), pins.get(name.lower().replace("-", "_"))) == version, name
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert conda[-1] == {"pip": ["-r requirements.lock", "-e ."]} and conda[0] == "python=3.11"
    assert "requirements.lock" in (ROOT / "Makefile").read_text()


def test_the_environment_check_tells_what_differs():
    assert environment.differences("no-such-package==1.0\npytest==0.0.1\n") == [
        "no-such-package is missing, 1.0 is wanted",
        f"pytest is {pytest.__version__}, 0.0.1 is wanted",
    ]
    assert environment.differences("torch==2.13.0\n") == []


def test_importing_the_package_imports_nothing_heavy():
    heavy = "print([m for m in ('torch', 'transformers', 'sae_lens', 'matplotlib', 'huggingface_hub') if m in sys.modules])"
    for modules, allowed in (("stetholib, stetholib.__main__", []), ("stetholib.commands.reproduce", ["torch"])):
        done = subprocess.run([sys.executable, "-c", f"import sys, {modules}; {heavy}"], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == str(allowed), done.stderr


def test_each_command_has_a_help_of_its_own_and_the_inner_one_is_not_listed(capsys):
    for name in (*COMMANDS, None):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"] if name else ["--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert (COMMANDS[name][1] in said) if name else all(line in said for line, _ in COMMANDS.values())
    assert "answer" not in said
    assert 'stetholib = "stetholib.__main__:main"' in (ROOT / "pyproject.toml").read_text()


def test_outside_a_checkout_the_run_says_where_the_notebooks_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("STETHOLIB_HOME", str(tmp_path))
    assert main(["reproduce", "--profile", "smoke"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "come with the repository" in said and not list(tmp_path.iterdir())


def test_a_folder_of_another_checkout_than_the_imported_one_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "clone" / "stetholib").mkdir(parents=True)
    (tmp_path / "clone" / "notebooks").mkdir()
    (tmp_path / "clone" / "stetholib" / "__init__.py").touch()
    environment.check_imported_from(tmp_path)
    environment.check_imported_from(ROOT / "notebooks")
    with pytest.raises(UserError, match="this folder belongs to .*clone, but the stetholib of"):
        environment.check_imported_from(tmp_path / "clone" / "notebooks")
    monkeypatch.chdir(tmp_path / "clone")
    assert main(["doctor"]) == 2 and "make env in" in capsys.readouterr().err


def test_an_editable_install_of_a_moved_clone_is_told_and_made_anew(tmp_path, monkeypatch):
    info = tmp_path / "moved_clone-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moved-clone\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    place = tmp_path / "a folder"
    for said, lines in (
        ({"url": place.as_uri(), "dir_info": {"editable": True}}, []),
        ({"url": place.as_uri(), "dir_info": {}}, [f"moved-clone is installed from {place}, not from {place}"]),
        (
            {"url": "file:///old/clone", "dir_info": {"editable": True}},
            [f"moved-clone is installed from /old/clone, not from {place}"],
        ),
    ):
        (info / "direct_url.json").write_text(json.dumps(said))
        assert environment.elsewhere(place, "moved-clone") == lines
    assert environment.elsewhere(place, "no-such-package") == ["no-such-package is not installed"]
    assert "stetholib.commands.environment --installed" in (ROOT / "Makefile").read_text()


def test_a_users_mistake_is_one_line_and_a_status(capsys):
    assert main(["reproduce", "--profile", "minni"]) == 2
    error = capsys.readouterr().err
    assert error == f"stetholib: {error.split(': ', 1)[1]}" and error.count("\n") == 1 and "did you mean 'mini'" in error
    assert UserError("x")._render_traceback_() == ["UserError: x"]


def broken(tmp_path, change):
    notebook = json.loads(NOTEBOOKS[0].read_text())
    change(notebook)
    path = tmp_path / NOTEBOOKS[0].name
    path.write_text(json.dumps(notebook))
    return path


def test_a_notebook_without_its_parameters_or_with_others_is_refused(tmp_path):
    swaps = {
        "has no cell tagged": lambda n: n["cells"][1]["metadata"].update(tags=[]),
        "does not open with": lambda n: n["cells"].insert(1, n["cells"][2]),
        "mend 'profle'": lambda n: n["cells"][1].update(source=['profle = "mini"\n', 'device = "cpu"\n', "overrides = {}"]),
    }
    for message, change in swaps.items():
        with pytest.raises(UserError, match=message):
            notebooks.check_notebook(broken(tmp_path, change))
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(UserError, match="git checkout"):
        notebooks.check_notebook(tmp_path / "x.ipynb")


def opened(**namespace):
    """What a notebook whose namespace is this opens, or is refused."""
    from stetholib.study import Study

    return Study.for_notebook(namespace)


KNOWN = dict(profile="smoke", device="cpu", overrides={})
OWN = "profile = 'mini'\ndevice = 'cpu'\noverrides = {}"


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([OWN, "# Parameters\nprofil = 'mini'\n"], r"'profil' \(did you mean 'profile'\?\)"),
        (["# Parameters\nprofil = 'mini'\n"], r"'profil' \(did you mean 'profile'\?\)"),
        (["profile='smoke'; device='cpu'; overides={}"], r"'overides' \(did you mean 'overrides'\?\)"),
        ([OWN, "%matplotlib inline", "profile='smoke'; device='cpu'; overides={}"], r"'overides' \(did you mean"),
    ],
)
def test_an_unknown_notebook_parameter_is_refused_with_the_nearest(cells, said):
    from stetholib.profiles import ProfileError
    from stetholib.study import Study

    namespace = KNOWN | dict(In=["", *cells], study="an old one", step="an old one")
    with pytest.raises(ProfileError, match=said):
        Study.for_notebook(namespace)
    assert not {"study", "step"} & namespace.keys(), "a refused parameter must not leave an old study behind"


def test_a_notebook_without_a_parameter_or_with_an_unknown_device_is_refused():
    from stetholib.profiles import ProfileError

    with pytest.raises(ProfileError, match="unknown device 'gpu'"):
        opened(**KNOWN | dict(device="gpu"))
    with pytest.raises(ProfileError, match="'overrides' is not set; run the parameters cell first"):
        opened(profile="smoke", device="cpu")


@pytest.mark.parametrize(
    "cells",
    [
        [OWN, "# Parameters\nprofile = 'smoke'\n", "beats = 1"],
        ["profile='smoke'; device='cpu'; overides={}", OWN],  # mended and run again
        [OWN, "beats = 1\nbeats.profile = 2\n(one, other) = 1, 2"],
        [],
    ],
)
def test_other_variables_of_a_notebook_are_nobodys_business(cells):
    study = opened(**KNOWN, In=["", *cells], beats=1, profil=2)
    assert (study.profile.name, study.device) == ("smoke", "cpu")


def test_the_committed_figures_hold_every_contract_file():
    folder = ROOT / "figures" / "mini"
    for stem, (keys, columns) in CONTRACTS.items():
        table = pd.read_csv(folder / f"{stem}.csv")
        assert set(keys + columns) <= set(table.columns) and not table.duplicated(keys).any(), stem
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {path.stem for path in folder.glob("*.svg")} and set(notebooks.STEPS) <= pictures
    assert json.loads((folder / "manifest.json").read_text())["profile"] == "mini"


def test_the_committed_miniature_has_room_to_rise_and_a_real_gain():
    accuracy = pd.read_csv(ROOT / "figures" / "mini" / "05_minerva_math.csv")
    base = accuracy[(accuracy["variant"] == "base") & (accuracy["subject"] != "all")].set_index("subject")
    assert base["accuracy"].between(0.15, 0.60).sum() >= 5
    assert base["n"].min() >= 400 and base.loc["number_theory", "n"] == 540
    significance = pd.read_csv(ROOT / "figures" / "mini" / "06_significance.csv").set_index(["variant", "subject", "metric"])
    for metric in ("exact_match", "math_verify"):
        gain = significance.loc[("full", "all", metric)]
        assert gain["mcnemar_p"] < 0.01 and gain["difference"] > 0


def test_world_zero_of_the_committed_worlds_is_the_committed_run():
    worlds = pd.read_csv(ROOT / "figures" / "seeds" / "claims.csv", keep_default_na=False)
    zero = worlds[worlds["world"] == 0].drop(columns="world").reset_index(drop=True)
    ledger = pd.read_csv(ROOT / "figures" / "mini" / "06_claims.csv", keep_default_na=False)
    assert zero[list(ledger)].equals(ledger) and sorted(set(worlds["world"])) == [0, 1, 2, 3, 4]


def test_the_readme_names_every_notebook_and_the_commands_and_the_packages_names_every_module():
    text, package = ((ROOT / place / "README.md").read_text() for place in (".", "stetholib"))
    for step in notebooks.STEPS:
        assert step in text
    for path in (ROOT / "stetholib").glob("*.py"):
        assert path.name in package or path.stem.startswith("__"), path.name
    for command in ("make reproduce", "make test", "make test-all"):
        assert command in text and command.split()[1] in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("place", [*READMES, "notebooks/GLOSSARY.md", *(f"notebooks/{path.name}" for path in NOTEBOOKS)])
def test_what_is_linked_to_is_committed(place):
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    text = "\n".join(cells(ROOT / place, "markdown")) if place.endswith(".ipynb") else (ROOT / place).read_text()
    for link in re.findall(r"\]\(((?!https?://)[^)\s]+)\)", text):
        target = os.path.normpath(Path(place).parent / link)
        assert target in kept or any(one.startswith(f"{target}/") for one in kept), link


@pytest.mark.parametrize("place", READMES)
def test_what_make_is_asked_for_is_a_target(place):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    asked = set(re.findall(r"`make ([a-z-]+)", (ROOT / place).read_text()))
    assert asked <= targets, asked - targets
