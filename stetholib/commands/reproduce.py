"""Run the six notebooks in order with papermill, and only those that have something to do.

A notebook is done when its text, the profile, the package's code and the libraries are those of its last run and its files
are still the ones it left. What it stands on is kept by stage: after an edit of prose everything is found in the store."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import stetholib
from stetholib import comparison, profiles
from stetholib.adapters import harness, own_code
from stetholib.commands import doctor, watch
from stetholib.commands.environment import LIBRARIES
from stetholib.commands.notebooks import STEPS, check_all, execute, notebook_text
from stetholib.commands.watch import say
from stetholib.data.mini import MODELS
from stetholib.data.source import Source
from stetholib.errors import UserError
from stetholib.profiles import Profile, signed
from stetholib.store.code import canonical
from stetholib.store.files import atomic, digest_of, file_hash, held
from stetholib.store.tables import Workspace

SELECTING, ANSWERING = "04_layer_selection", "05_minerva_math"


def reproduce(name: str, device: str, processes: int, overrides: Mapping[str, Any]) -> None:
    """Bring `figures/<profile>/` up to date, or with single keys overridden a folder beside it, and say what they changed. Raises
    UserError with one line where that cannot be done.
    processes: how many of them answer the test, one a GPU; the answers are the same as one alone would give."""
    check_processes(processes, device)
    profile = profiles.load(name, overrides)
    workspace = Workspace.of(profile.name, profile.digest, overrides)
    notebooks = check_all(workspace.root / "notebooks")
    with alone(workspace, profile):
        for folder in (workspace.figures, workspace.records):
            for left in folder.glob(".[0-9]*.*"):  # by a run that was killed while it wrote
                left.unlink()
        asked = str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name
        parameters = dict(profile=asked, device=device) | (dict(overrides=dict(overrides)) if overrides else {})
        _run_all(profile, parameters, workspace, notebooks, processes)
    if overrides:
        say(comparison.told(workspace, signed(profile.title, overrides)))


def alone(workspace: Workspace, profile: Profile) -> AbstractContextManager[Any]:
    """Fix the environment and take the one lock of a profile's runs; raises UserError where another run holds it."""
    set_environment(profile.threads, workspace.root / "runs")
    busy = f"another run of profile {profile.name} is under way in this folder; wait for it or use a second clone"
    return held(workspace.runs / "reproduce.lock", busy)


@contextmanager
def opened(name: str, device: str) -> Iterator[Any]:
    """The study of a profile, while its runs are locked."""
    profile = profiles.load(name)
    with alone(Workspace(profile.name), profile):
        yield stetholib.Study.open(name, device=device)


def _run_all(profile: Profile, parameters: dict[str, Any], workspace: Workspace, paths: dict[str, Path], processes: int) -> None:
    times: dict[str, float] = {}
    peaks: dict[str, dict[str, float]] = {}
    code = code_key(profile, parameters["device"])
    for step, path in paths.items():
        mark = workspace.executed / f"{step}.json"
        key = key_of(step, path, code, workspace)
        if _is_done(mark, key, workspace):
            say(f"{step}: unchanged")
            continue
        if not times:
            doctor.refuse(profile, parameters["device"], processes)
        say(f"{step}: running ...")
        started = time.monotonic()
        with watch.peaks(parameters["device"]) as peaks[step], watch.progress(workspace.runs / "progress.log"):
            if processes > 1 and step == ANSWERING:
                _answer(workspace, parameters, processes)
            execute(path, workspace, parameters)
        times[step] = round(time.monotonic() - started, 1)
        made = {str(p.relative_to(workspace.root)): file_hash(p) for p in _outputs(step, workspace)}
        atomic(mark, partial(Path.write_text, data=json.dumps(dict(key=key, files=made), indent=1)))
        say(f"{step}: {times[step]:.0f} s, {len(made)} files")
    if times:
        _record(workspace, times, peaks, parameters["device"])
        place = workspace.figures.relative_to(workspace.root)
        say(f"all of it: {sum(times.values()):.0f} s; tables and figures are in {place}/")


def key_of(step: str, path: Path, code: str, workspace: Workspace) -> str:
    """What a notebook's files hang on: its text, `code_key`, and the worlds whose tables it reads."""
    reads = workspace.over_worlds() if step == SELECTING else ()
    return digest_of(code, notebook_text(path), [file_hash(one) for one in reads if one.is_file()])


def check_processes(processes: int, device: str) -> None:
    """Refuse a number of processes that this machine has no GPUs for."""
    if processes < 1:
        raise UserError(f"PROCESSES is {processes}; it must be 1 or more")
    if device == "cuda" and 1 < processes > torch.cuda.device_count():
        raise UserError(f"PROCESSES is {processes}, but PyTorch sees {torch.cuda.device_count()} GPUs; give at most so many")


def _answer(workspace: Workspace, parameters: dict[str, Any], processes: int) -> None:
    """Let several processes answer the test before its notebook runs, by `accelerate launch`."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += ["--num_cpu_threads_per_process", os.environ["OMP_NUM_THREADS"]]
    launch += ["--multi_gpu"]  # on CPUs as well: with `--cpu` it would start one process only
    command = ["--module", "stetholib", "answer", "--profile", parameters["profile"], "--device", parameters["device"]]
    for key, value in parameters.get("overrides", {}).items():
        command += ["--set", f"{key}={json.dumps(value)}"]  # which YAML reads as well
    done = subprocess.run([*launch, *command], cwd=workspace.root, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("stetholib: ")]
        log = workspace.runs / "answer.log"
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        killed = "SIGKILL" in done.stderr or done.returncode == -signal.SIGKILL
        why = "one was killed, most often for want of memory" if killed else f"see {log}"
        raise UserError(said[0].removeprefix("stetholib: ") if said else f"answering in {processes} processes failed: {why}")


def answer(name: str, device: str, overrides: Mapping[str, Any] | None = None) -> None:
    """What each process of `accelerate launch` does: its share of every variant's batches, into a file of its own."""
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    step = stetholib.Study.open(name, overrides, device).minerva_math
    for variant in step.variants().values():
        step.answers(variant, state.process_index, state.num_processes)
    state.destroy_process_group()


def set_environment(threads: int, runs: Path) -> None:
    """What must be fixed before a kernel starts, so that two runs give the same bytes; libraries' own bars are off.
    Settings of Jupyter and matplotlib come from a folder in `runs/`: a user's own would change figures, or not be writable."""
    own = runs / ".settings"
    for name, folder in (("JUPYTER_RUNTIME_DIR", "jupyter"), ("IPYTHONDIR", "ipython"), ("MPLCONFIGDIR", "matplotlib")):
        (own / folder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(own / folder)
    os.environ |= {
        "TQDM_DISABLE": "1",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def code_key(profile: Profile, device: str) -> str:
    """Everything that a notebook's result depends on besides its own text."""
    package = Path(__file__).parents[1]
    code = {str(p.relative_to(package)): canonical(p.read_text(encoding="utf-8")) for p in sorted(package.rglob("*.py"))}
    libraries = [version(library) for library in (*LIBRARIES, "matplotlib", "seaborn")]
    return digest_of(profile.digest, device, code, libraries, _local_files(profile))


def _local_files(profile: Profile) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file that a profile points at: one's own, or a model that ships with the package."""
    data = profile.data
    models = [Source.of(name) for name in (profile.model.base, profile.finetune.finetuned) if name]
    texts = [Source.of(name, kind="dataset") for name in (data.maths, data.general)]
    places = [*models, Source.of(profile.sae.release, kind="sae"), *texts]
    files = [
        file for place in places if place.where == "folder" or place.name in MODELS for file in sorted(place.folder().rglob("*"))
    ]
    files += [*harness.task_files(profile.evaluation.task), *filter(None, [own_code.file_of(profile.features.specificity)])]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _outputs(step: str, workspace: Workspace) -> list[Path]:
    """What a step left where others read it: figures and tables, the records, the manifest."""
    further = {ANSWERING: workspace.records.glob("*.jsonl"), STEPS[-1]: workspace.figures.glob("manifest.json")}
    return sorted([*workspace.figures.glob(f"{step[:2]}_*"), *further.get(step, ())])


def _is_done(mark: Path, key: str, workspace: Workspace) -> bool:
    with suppress(OSError, ValueError, KeyError, TypeError):
        done = json.loads(mark.read_text(encoding="utf-8"))
        intact = all(file_hash(workspace.root / name) == known for name, known in done["files"].items())
        return done["key"] == key and bool(done["files"]) and intact
    return False


def _record(workspace: Workspace, times: dict[str, float], peaks: dict[str, dict[str, float]], device: str) -> None:
    """What is not stable about a run: times, peaks of memory and machine."""
    path = workspace.runs / "run.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    content = dict(seconds=known.get("seconds", {}) | times)
    for key, name in (("ram", "peak_gib"), ("gpu", "peak_gpu_gib")):
        content[name] = known.get(name, {}) | {step: round(peak[key], 2) for step, peak in peaks.items()}
    machine = dict(system=platform.platform(), python=platform.python_version(), cores=os.cpu_count(), device=device)
    content |= dict(machine=machine, finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    atomic(path, lambda draft: draft.write_text(json.dumps(content, indent=1)))
