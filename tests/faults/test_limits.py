"""Little memory, and a package without its checkout: each is one line with its mend."""

import json
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import runs
from conftest import ROOT

from stetholib.commands import notebooks


@pytest.mark.slow
@pytest.mark.parametrize("kib", [800_000, 1_500_000])
def test_want_of_memory_is_one_line_that_says_how_to_get_more(tmp_path, kib):
    """`ulimit -v`: the first limit is met by the command itself, the second by a notebook's process."""
    lower = lambda: resource.setrlimit(resource.RLIMIT_AS, (1024 * kib, 1024 * kib))  # noqa: E731
    process = runs.launch(runs.clone(tmp_path), ["reproduce", "--profile", "smoke"], lower)
    said = process.communicate()[1]
    lines = [line for line in said.splitlines() if line.startswith("stetholib: ")]
    assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert "there is not enough memory; take a larger machine or a smaller profile, or raise the limit (ulimit -v)" in lines[0]


def test_an_error_that_could_not_be_shown_for_want_of_memory_is_told_by_what_is_left_of_it(tmp_path):
    """IPython writes to stderr then, and papermill knows of no error's name."""
    executed, unnamed = tmp_path / "02.ipynb", SimpleNamespace(ename="CellExecutionError", evalue="")
    for text, wanted in (
        ("Traceback ...\nMemoryError\n\n", "MemoryError; there is not enough memory"),
        ("", "no message; the traceback is"),
    ):
        cells = [{"source": "x"}, {"source": "y", "outputs": [{"output_type": "stream", "name": "stderr", "text": [text]}]}]
        executed.write_text(json.dumps({"cells": cells}))
        assert notebooks.told(unnamed, executed).startswith(f"CellExecutionError: {wanted}")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content in a folder of its own, far from any checkout."""
    source, into = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "stetholib", source / "stetholib", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", into, source]
    subprocess.run(pip, check=True)
    zipfile.ZipFile(next(into.glob("*.whl"))).extractall(into)
    return into


@pytest.mark.parametrize(
    ("arguments", "status", "wanted"),
    [
        (["reproduce"], 2, r"stetholib: there is no folder \S+/notebooks: the notebooks come with the repository, not with the package; run this in a clone of it, or set STETHOLIB_HOME to one"),
        (["doctor", "--profile", "smoke"], 0, "ok   packages +no requirements.lock here"),
        (["--help"], 0, "seeds +run the experiment in several worlds"),
        (["reproduce", "--help"], 0, "Run the six notebooks in order and leave tables and figures in figures/<profile>/"),
        ([], 2, "stetholib: the following arguments are required: command; see: stetholib --help"),
    ],
)  # fmt: skip
def test_the_wheel_outside_a_checkout_says_what_it_needs_and_explains_itself(
    installed, tmp_path, monkeypatch, arguments, status, wanted
):
    monkeypatch.delenv("STETHOLIB_HOME", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    done = subprocess.run([sys.executable, "-P", "-m", "stetholib", *arguments], cwd=tmp_path, capture_output=True, text=True)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == status and "Traceback" not in said, said
    assert re.search(" ".join(wanted.split()), said), said
    if arguments == ["--help"]:
        shown = set(re.findall(r"^    (\w+)", done.stdout, re.M))
        assert shown == {
            "reproduce",
            "doctor",
            "rehearse",
            "seeds",
            "claim",
            "listen",
            "export",
            "organisms",
            "page",
            "bundle",
        }, "each with a line of what it does"
