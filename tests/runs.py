"""Whole runs of `make reproduce` in copies of the checkout, undisturbed and killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from conftest import ROOT


def clone(folder: Path) -> Path:
    """The parts of the checkout that a run needs."""
    for part in ("stetholib", "notebooks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def launch(
    folder: Path, arguments: Sequence[str], before: Callable[[], None] | None = None, **environment: str
) -> subprocess.Popen:
    """Begin a command of the package in a process group of its own; `before` runs in it first."""

    def ready() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which whoever started the tests in the background had ignored
        if before:
            before()

    known = dict(os.environ, PYTHONPATH=str(folder), STETHOLIB_HOME=str(folder)) | environment
    asked = dict(cwd=folder, env=known, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen([sys.executable, "-m", "stetholib", *arguments], preexec_fn=ready, **asked)


def start(folder: Path, profile: str, *options: str, **environment: str) -> subprocess.Popen:
    """Begin a run."""
    return launch(folder, ["reproduce", "--profile", profile, *options], **environment)


def run(folder: Path, profile: str = "smoke", *options: str, **environment: str) -> str:
    """A run to its end; returns what it said."""
    process = start(folder, profile, *options, **environment)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    return said


def kill(process: subprocess.Popen, how: signal.Signals = signal.SIGKILL) -> None:
    """End a run and all its processes at once; a notebook's kernel, in a session of its own, is one of them."""
    everybody = tree(process)
    os.killpg(process.pid, how)
    for one in everybody if how == signal.SIGKILL else []:
        with suppress(psutil.Error):
            one.kill()
    process.communicate()


def tree(process: subprocess.Popen) -> list[psutil.Process]:
    """A run's processes, itself first."""
    with suppress(psutil.Error):
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return []


def held(process: subprocess.Popen, condition: Callable[[], bool]) -> bool:
    """Hold a run still and look again; where the condition no longer holds, it goes on."""
    for one in tree(process):
        with suppress(psutil.Error):
            one.suspend()
    if condition():
        return True
    for one in tree(process):
        with suppress(psutil.Error):
            one.resume()
    return False


def killed_after(folder: Path, profile: str, seconds: float) -> bool:
    """Begin a run and kill it; False where it had ended by then."""
    process = start(folder, profile)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        return True
    return False


def made(folder: Path, profile: str = "smoke") -> dict[str, bytes]:
    """Every file of `figures/<profile>/`."""
    return {path.name: path.read_bytes() for path in sorted((folder / "figures" / profile).iterdir())}


def stages(folder: Path, profile: str = "smoke") -> dict[str, int]:
    """When each finished stage was made."""
    found = (folder / "runs" / profile / "store").glob("[a-z]*/artefact.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found if not path.parent.name.startswith("damaged")}


def answers(folder: Path, profile: str = "smoke") -> dict[str, list[str]]:
    """The names of the answers' ledgers, each with the problems it holds, in the order they were answered."""
    found = {}
    for path in (folder / "runs" / profile / "store").glob("answers-*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[path.name] = [json.loads(line)["problem_id"] for line in lines if line.endswith("}")]
    return found


def records(folder: Path, profile: str = "smoke") -> dict[str, bytes]:
    """Every record file."""
    return {path.name: path.read_bytes() for path in (folder / "runs" / profile / "records").iterdir()}


def memory_by_world(process: subprocess.Popen) -> tuple[dict[str, float], str]:
    """Peak memory of `make seeds` in each world, GiB of all its processes together, and what it said; waits for its end."""
    peaks, now, said, over = {}, ["before"], [], threading.Event()

    def watch() -> None:
        while not over.wait(0.3):
            with suppress(psutil.Error):
                used = sum(one.memory_info().rss for one in tree(process)) / 2**30
                peaks[now[0]] = max(peaks.get(now[0], 0.0), used)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    for line in process.stderr:
        said.append(line)
        if line.startswith("world ") and line.endswith(": running ...\n"):
            now[0] = line.split(":")[0]
    over.set()
    thread.join()
    return {name: peak for name, peak in peaks.items() if name.startswith("world")}, "".join(said)


def wait_for(condition, process: subprocess.Popen, every: float = 0.02) -> None:
    """Wait until something is so, while the run lives."""
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(every)
