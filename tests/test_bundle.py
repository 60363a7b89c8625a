"""A folder for a room without a network, and whether a laptop will do there."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging import tags
from packaging.utils import parse_wheel_filename

from stetholib.commands import bundle, laptop
from stetholib.commands.laptop import GIB, Laptop
from stetholib.errors import UserError

LINUX = bundle.target("linux-x86_64", "3.11")
ARM = bundle.target("linux-aarch64", "3.12")
MAC = bundle.target("macos-arm64", "3.12")
LOCK = "torch==2.13.0\nJinja2==3.1.6\nchardet==6.0.0.post1\n"
WHEELS = [
    "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl",
    "jinja2-3.1.6-py3-none-any.whl",
    "chardet-6.0.0.post1-py3-none-any.whl",
]


def accepted(one):
    """Every tag that `packaging` would have an installer take there."""
    if one.system == "Darwin":
        platforms = list(tags.mac_platforms(one.release, one.machine))
    else:
        old = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}
        platforms = [f"manylinux_2_{minor}_{one.machine}" for minor in range(one.release[1], 4, -1)]
        platforms += [*(f"{old[minor]}_{one.machine}" for minor in old), f"linux_{one.machine}"]
    interpreter = f"cp3{one.python[1]}"
    return {*tags.cpython_tags(one.python, [interpreter], platforms), *tags.compatible_tags(one.python, interpreter, platforms)}


@pytest.mark.parametrize("one", [LINUX, ARM, MAC], ids=["Linux", "ARM", "macOS"])
def test_a_wheel_fits_where_packaging_says_that_it_does(one):
    names = [f"a-1-{python}-none-any" for python in ("py3", "py2.py3", "py2", "py310", "py312")]
    for python, abi in (
        ("cp311", "cp311"),
        ("cp312", "cp312"),
        ("cp38", "abi3"),
        ("cp312", "abi3"),
        ("cp313", "abi3"),
        ("py3", "none"),
        ("cp310", "cp310"),
        ("cp313", "cp313t"),
    ):
        for platform in (
            "manylinux_2_28_x86_64",
            "manylinux_2_34_x86_64",
            "manylinux_2_17_x86_64.manylinux2014_x86_64",
            "manylinux1_x86_64",
            "manylinux2014_aarch64",
            "linux_x86_64",
            "musllinux_1_2_x86_64",
            "macosx_11_0_arm64",
            "macosx_15_0_arm64",
            "macosx_10_9_universal2",
            "macosx_10_9_x86_64",
            "win_amd64",
        ):
            names.append(f"a-1-{python}-{abi}-{platform}")
    wanted = {name for name in names if parse_wheel_filename(f"{name}.whl")[3] & accepted(one)}
    assert {name for name in names if laptop.fits(f"{name}.whl", one)} == wanted and len(wanted) >= 8


def test_what_the_lock_names_and_no_wheel_brings_is_lacking():
    assert laptop.lacking(LOCK, WHEELS, LINUX) == []
    assert laptop.lacking(LOCK, WHEELS, LINUX._replace(python=(3, 12))) == ["torch"]
    assert laptop.lacking(LOCK, WHEELS, LINUX._replace(release=(2, 27))) == ["torch"]
    assert laptop.lacking(LOCK, [*WHEELS[1:], "torch-2.12.0-cp311-cp311-manylinux_2_28_x86_64.whl"], LINUX) == ["torch"]
    assert laptop.lacking(LOCK, WHEELS[:1], MAC) == ["torch", "Jinja2", "chardet"]


def wheel(folder, name, *needs):
    """A wheel that is nothing but what it asks for."""
    with zipfile.ZipFile(folder / f"{name}.whl", "w") as packed:
        said = "".join(f"Requires-Dist: {need}\n" for need in needs)
        packed.writestr(f"{'-'.join(name.split('-')[:2])}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: a\n{said}")


def test_what_wheels_ask_for_beside_the_lock_depends_on_the_laptop(tmp_path):
    needs = 'appnope>=0.1; platform_system == "Darwin"', 'tomli<3; python_version < "3.12"', 'extra-one; extra == "x"', "b.b"
    wheel(tmp_path, "a-1-py3-none-any", *needs)
    wheel(tmp_path, "b_b-1-py3-none-any")
    assert bundle.required(tmp_path, LINUX) == {"tomli": "tomli<3"}
    assert bundle.required(tmp_path, MAC) == {"appnope": "appnope>=0.1"}
    assert bundle.required(tmp_path, ARM) == {}


def test_what_is_asked_for_is_fetched_until_nothing_is_and_what_is_not_to_be_had_is_named(tmp_path, monkeypatch):
    shelf = {"one": ("two>=2", "three"), "two>=2": (), "three": ("four",)}

    def pip(*arguments, needed=False):
        asked = [word for word in arguments if word in (*shelf, "four")]
        if not set(asked) <= shelf.keys():
            return False
        for word in asked:
            wheel(tmp_path, f"{word.split('>')[0]}-1-py3-none-any", *shelf[word])
        return True

    monkeypatch.setattr(bundle, "pip", pip)
    assert bundle.fetch(["one", "four"], tmp_path, LINUX) == ["four"] and bundle.fetch([], tmp_path, LINUX) == []
    assert bundle.complete(tmp_path, LINUX) == ["four"]
    assert bundle.names(tmp_path) == [f"{name}-1-py3-none-any.whl" for name in ("one", "three", "two")]


def test_a_pytorch_that_wants_cuda_is_no_wheel_for_a_laptop(tmp_path, monkeypatch):
    wheel(tmp_path, "torch-2.13.0-cp312-cp312-manylinux_2_28_aarch64", 'nvidia-nccl-cu13==2; platform_system == "Linux"')
    wheel(tmp_path, "torch-2.13.0-cp312-cp312-macosx_14_0_arm64", 'nvidia-nccl-cu13==2; platform_system == "Linux"')
    wheel(tmp_path, "accelerate-1-py3-none-any", "torch>=2")  # for which another version would do as well
    monkeypatch.setattr(bundle, "pip", None)
    assert bundle.complete(tmp_path, MAC, ["Torch"]) == [] and bundle.complete(tmp_path, ARM, ["Torch"]) == [
        f"torch ({bundle.CPU})"
    ]
    assert bundle.names(tmp_path)[1:] == ["torch-2.13.0-cp312-cp312-macosx_14_0_arm64.whl"]


@pytest.fixture()
def room(tmp_path):
    """A bundle in small."""
    for name, said in {
        "requirements.lock": LOCK,
        "notebooks/01.ipynb": "{}",
        "runs/mini/store/losses-1.jsonl": "{}\n",
        "runs/mini/store/hear-1/value": "1",
        **{f"wheels/{name}": name for name in WHEELS},
    }.items():
        path = tmp_path / "a room" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said)
    bundle.write_sums(tmp_path / "a room")
    return tmp_path / "a room"


def said(one, folder):
    """The lines of a laptop that are not `ok`, by name."""
    return {line.name: f"{line.mark} {line.said}" for line in laptop.examine(one, folder) if line.mark != "ok"}


def test_hashes_are_those_of_sha256sum_and_what_use_changes_may_change(room):
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=room).returncode == 0
    assert laptop.sums(room) == [] and said(LINUX, room) == {}
    (room / "notebooks/01.ipynb").write_text("{} ")
    (room / "runs/mini/store/losses-1.jsonl").write_text("{}\n{}\n")
    assert laptop.sums(room) == []
    (room / "notebooks/01.ipynb").unlink()
    (room / "wheels" / WHEELS[1]).write_text("altered")
    assert laptop.sums(room) == ["notebooks/01.ipynb", f"wheels/{WHEELS[1]}"]
    assert said(LINUX, room) == {"files": f"MEND 2 missing or altered: copy again notebooks/01.ipynb, wheels/{WHEELS[1]}"}


def test_an_altered_store_is_told_from_one_that_was_never_there(room):
    (room / "runs/mini/store/hear-1/value").write_text("2")
    assert said(LINUX, room)["store"].startswith("MEND 1 files are missing or altered: copy runs/ again")
    (room / "SHA256SUMS").unlink()
    assert said(LINUX, room) == {}
    shutil.rmtree(room / "runs")
    assert said(LINUX, room)["store"].startswith("note none: notebooks compute")


@pytest.mark.parametrize(
    ("facts", "name", "line"),
    [
        (dict(python=(3, 8)), "python", "MEND Python 3.8, but 3.11 or 3.12 is wanted: sudo apt install python3.12-venv"),
        (
            dict(python=(3, 13), others=["python3.11"]),
            "python",
            "MEND Python 3.13 will not do, python3.11 will: make env PYTHON=",
        ),
        (dict(venv=False), "python", "MEND Python 3.11 lacks venv: sudo apt install python3.11-venv"),
        (dict(python=(3, 12)), "wheels", "MEND 1 packages have none that fits here (torch); with a network: make env WHEELS="),
        (
            dict(python=(3, 12), others=["python3.11"]),
            "wheels",
            "MEND none for this Python, but for python3.11: make env PYTHON=",
        ),
        (dict(disk=GIB), "disk", "MEND 1.0 GiB free, 3.5 wanted: free some"),
        (dict(memory=2 * GIB), "memory", "MEND 2.0 GiB in all"),
        (dict(cores=1), "cores", "note 1 core"),
        (dict(browser=False), "browser", "MEND none was found"),
        (dict(writable=False), "folder", "MEND "),
        (dict(port=False), "port", "MEND none from 8888"),
        (dict(machine="armv7l"), "system", "MEND Linux 2.28 on armv7l: packages are built for 64-bit"),
        (dict(release=()), "system", "MEND Linux  on x86_64"),
    ],
)
def test_each_lack_of_a_laptop_is_a_line_with_its_mend(room, facts, name, line):
    found = said(LINUX._replace(**facts), room)
    assert found[name].startswith(line) and set(found) <= {name, "python", "wheels"}


def test_windows_gets_one_line_that_sends_it_to_wsl_and_an_intel_mac_one_too(room):
    windows = list(laptop.examine(Laptop("Windows", "AMD64", (), (3, 12)), room))
    assert len(windows) == 1 and windows[0].mark == "MEND" and "wsl --install" in windows[0].said
    assert said(Laptop("Darwin", "x86_64", (13, 0), (3, 12)), room)["system"].endswith("or use Colab")
    assert "browser" not in said(LINUX._replace(wsl=True, browser=False), room)


def test_what_is_set_up_needs_no_wheels_and_less_room(room):
    assert said(LINUX._replace(installed=True, python=(3, 13), disk=GIB), room) == {}


def test_the_check_is_read_by_an_old_python_and_needs_the_standard_library_alone():
    text = Path(laptop.__file__).read_text()
    tree = ast.parse(text, feature_version=(3, 8))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
    assert "\n@$(PYTHON) stetholib/commands/laptop.py" in (ROOT / "Makefile").read_text().replace("\t", "")


@pytest.mark.parametrize("python", [sys.executable, shutil.which("python3.8"), "/usr/bin/python3"])
def test_the_check_fits_one_screen_and_its_status_is_its_last_line(python):
    if not python or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip("this Python is not here")
    done = subprocess.run([python, laptop.__file__], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert not done.stderr and len(lines) <= 20 and all(line[:5].strip() in ("ok", "note", "MEND") for line in lines[:-1])
    assert done.returncode == ("not do yet" in lines[-1]) == any(line.startswith("MEND") for line in lines)


def test_a_clone_holds_the_commit_and_not_where_it_came_from(tmp_path):
    source, said = tmp_path / "a certain place", []
    source.mkdir()
    for arguments in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"]):
        (source / "file").write_text("1")
        subprocess.run(["git", *arguments], cwd=source, check=True)
    (source / "file").write_text("2")
    bundle.clone(source, tmp_path / "copy", said.append)
    assert (tmp_path / "copy" / "file").read_text() == "1" and said[0].startswith(
        "note 1 files differ from the last commit (file)"
    )
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.is_file() and b"a certain place" in path.read_bytes()]
    with pytest.raises(UserError, match="a bundle is made from a git clone, but git says: "):
        bundle.clone(tmp_path / "nowhere", tmp_path / "other", said.append)


def test_the_store_is_taken_without_locks_and_halves_and_a_checkout_without_one_is_told_so(tmp_path):
    store = tmp_path / "here" / bundle.STORE
    for name in ("hear-1/value", "hear-1.lock", ".draft-1/value", "unfinished-tune/value", "../notebooks/01.ipynb"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text("1")
    assert "open in seconds" in bundle.warm(tmp_path / "here", tmp_path / "there")
    left = [path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*") if path.is_file()]
    assert left == ["runs/mini/store/hear-1/value"]
    assert bundle.warm(tmp_path / "nowhere", tmp_path / "there").startswith("note there is no runs/mini here")


@pytest.mark.parametrize(
    ("into", "platform", "python", "line"),
    [
        (None, ["linux-sparc"], None, "PLATFORM=linux-sparc is not known; give some of linux-x86_64"),
        (None, None, ["3.13"], "PYTHONS=3.13 is not 3.11 or 3.12"),
        (str(ROOT), None, None, "is there already; remove it"),
    ],
)
def test_a_bundle_that_cannot_be_is_refused_before_anything_is_fetched(into, platform, python, line, monkeypatch):
    monkeypatch.setattr(bundle, "clone", None)
    with pytest.raises(UserError, match=line):
        bundle.bundle(into, platform, python, print)


@pytest.mark.parametrize("lack", [[], ["Linux x86_64, Python 3.11: no wheel for torch"]], ids=["whole", "lacking"])
def test_a_bundle_is_a_folder_or_a_tar_that_names_nobody_and_says_what_it_lacks(tmp_path, monkeypatch, lack):
    said = []

    def clone(checkout, folder, say):
        (folder / "wheels").mkdir(parents=True)
        (folder / "README.md").write_text("read me")

    monkeypatch.setattr(bundle, "clone", clone)
    monkeypatch.setattr(bundle, "wheels", lambda folder, targets, say: iter(lack))
    monkeypatch.setattr(bundle, "warm", lambda checkout, folder: "store")
    for name in ("a room", "a room.tar"):
        assert bundle.bundle(str(tmp_path / name), ["linux-x86_64"], ["3.11"], said.append) == (not lack)
    assert said.count("store") == 2 and said.count(f"MEND {lack[0]}" if lack else "MEND") == 2 * len(lack)
    assert f"MiB in {tmp_path / 'a room.tar'}; copy it to each laptop" in said[-1]
    with tarfile.open(tmp_path / "a room.tar") as tar:
        assert {(one.uid, one.uname, one.gname) for one in tar} == {(0, "", "")}
    shutil.unpack_archive(tmp_path / "a room.tar", tmp_path / "there")
    for folder in (tmp_path / "a room", tmp_path / "there" / "a room"):
        assert laptop.sums(folder) == [] and (folder / "README.md").read_text() == "read me"
    assert not list(tmp_path.glob(".bundle-*"))


def test_the_environment_is_made_from_wheels_where_they_lie_in_the_checkout(tmp_path):
    def asked(*words):
        make = ["make", "-n", "env", "PYTHON=false", *words]
        return subprocess.run(make, cwd=tmp_path, capture_output=True, text=True).stdout

    shutil.copy(ROOT / "Makefile", tmp_path)
    assert "install" in asked() and "--no-index" not in asked()
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / WHEELS[0]).touch()
    assert "--no-index --find-links wheels -r requirements.lock" in asked() and "--no-index" not in asked("WHEELS=")


@pytest.mark.campaign
def test_a_bundle_that_was_moved_sets_up_and_checks_itself_without_a_route(tmp_path, covered):
    """Fetches some 300 MiB, then has neither a network nor this home; some ten minutes on a busy machine."""
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("a network namespace is not to be had here")
    made = subprocess.run([sys.executable, "-m", "stetholib", "bundle", "--into", tmp_path / "made.tar"], cwd=ROOT)
    assert made.returncode == 0
    shutil.unpack_archive(tmp_path / "made.tar", tmp_path / "a room")
    folder, home = tmp_path / "another room", tmp_path / "home"
    (tmp_path / "a room" / "made").rename(folder)
    home.mkdir()
    python = Path(sys.base_prefix, "bin")
    alone = dict(HOME=str(home), PATH=f"{python}:{os.defpath}", BROWSER="true", LANG="C.UTF-8")
    begun = time.monotonic()
    for command in (
        "make check-laptop",
        "make env",
        "make check-laptop",
        ".venv/bin/python -m pytest -q tests/test_statistics.py",
    ):
        done = subprocess.run(["unshare", "-n", "bash", "-c", command], cwd=folder, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, command + done.stdout + done.stderr
        if command == "make env":
            covered(f"a bundle's environment: {time.monotonic() - begun:.0f} s")
