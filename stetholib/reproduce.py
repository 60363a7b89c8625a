"""Run the six notebooks in order with papermill, and only those that have something to do.

A notebook is done when its own text, the profile, the package's code and the libraries are those of its last run and
its files are still the ones it left. What it stands on is kept by stage, so a notebook that runs again after an edit
of its prose finds everything in the store.
"""

import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from stetholib import doctor, minerva_math, profiles
from stetholib.environment import LIBRARIES
from stetholib.errors import UserError
from stetholib.hub import full_disk
from stetholib.workspace import Workspace, atomic, code_text, digest_of, file_hash, held

STEPS = (
    "01_task_vectors",
    "02_sae_features",
    "03_subspace_projection",
    "04_layer_selection",
    "05_minerva_math",
    "06_significance",
)
ANSWERING = "05_minerva_math"
PARAMETERS = ("profile", "device", "overrides")


def reproduce(name: str, device: str, root: Path | None = None, out: Any = sys.stderr, processes: int = 1) -> None:
    """Bring `figures/<profile>/` up to date. Raises UserError with one line where that cannot be done.

    processes: how many of them answer the test, one a GPU; the answers are the same as one alone would give.
    """
    check_processes(processes, device)
    profile = profiles.load(name)
    workspace = Workspace(profile.name, root)
    notebooks = {step: workspace.root / "notebooks" / f"{step}.ipynb" for step in STEPS}
    for path in notebooks.values():
        check_notebook(path)
    set_environment(profile.threads, workspace.root / "runs")
    with alone(workspace, profile.name):
        for folder in (workspace.figures, workspace.records):
            for left in folder.glob(".[0-9]*.*"):  # by a run that was killed while it wrote
                left.unlink()
        asked = str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name
        _run_all(profile, dict(profile=asked, device=device), workspace, notebooks, out, processes)


@contextmanager
def alone(workspace: Workspace, name: str) -> Iterator[None]:
    """Hold the one lock of a profile's runs; raises UserError where another run holds it."""
    busy = f"another run of profile {name} is under way in this folder; wait for it or use a second clone"
    with held(workspace.runs / "reproduce.lock", busy):
        yield


def _run_all(
    profile: profiles.Profile,
    parameters: dict[str, str],
    workspace: Workspace,
    notebooks: dict[str, Path],
    out: Any,
    processes: int,
) -> None:
    times: dict[str, float] = {}
    peaks: dict[str, dict[str, float]] = {}
    code = _code_key(profile, parameters["device"])
    for step, path in notebooks.items():
        mark = workspace.executed / f"{step}.json"
        key = digest_of(code, notebook_text(path))
        if _is_done(mark, key, workspace):
            print(f"{step}: unchanged", file=out, flush=True)
            continue
        if not times:
            doctor.refuse(profile, parameters["device"], processes)
        print(f"{step}: running ...", file=out, flush=True)
        started = time.monotonic()
        with _peaks(parameters["device"]) as peaks[step]:
            if processes > 1 and step == ANSWERING:
                _answer(workspace, parameters, processes, out)
            _execute(path, workspace, parameters, out)
        times[step] = round(time.monotonic() - started, 1)
        made = {str(p.relative_to(workspace.root)): file_hash(p) for p in _outputs(step, workspace)}
        atomic(mark, lambda draft, content=dict(key=key, files=made): draft.write_text(json.dumps(content, indent=1)))
        print(f"{step}: {times[step]:.0f} s, {len(made)} files", file=out, flush=True)
    if times:
        _record(workspace, times, peaks, parameters["device"])
        print(
            f"all of it: {sum(times.values()):.0f} s; tables and figures are in {workspace.figures.relative_to(workspace.root)}/",
            file=out,
        )


def _execute(path: Path, workspace: Workspace, parameters: dict[str, str], out: Any) -> None:
    """One notebook through papermill; the executed copy stays in `runs/`, whole or up to where it failed."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    workspace.executed.mkdir(parents=True, exist_ok=True)
    for name in ("asyncio", "papermill", "traitlets"):  # after an interruption they would print tracebacks of their own
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _progress(workspace.runs / "progress.log", out):
        try:
            papermill.execute_notebook(
                str(path),
                str(workspace.executed / path.name),
                parameters=parameters,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(workspace.root),
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            )
        except papermill.PapermillExecutionError as error:
            raise UserError(f"{path.stem}, cell {error.exec_count}: {_told(error, workspace.executed / path.name)}") from None
        except DeadKernelError:
            raise UserError(f"{path.stem}: its process was killed, most often for want of memory; see: make doctor") from None


def _told(error: Any, executed: Path) -> str:
    """What went wrong in a notebook, in one line, with the mend where it is known."""
    said = f"{error.ename}: {' '.join(str(error.evalue).split())}"
    if error.ename.endswith(("UserError", "ProfileError", "ModelError", "HubError", "WorkspaceError")):
        return said
    if full_disk(said):
        return f"{said}; the disk is full: free some space, then run the same command again, what is finished is kept"
    if "[Errno 13]" in said or "[Errno 30]" in said:
        return f"{said}; it cannot be written: give rights to this folder, then run the same command again"
    return f"{said}; the traceback is in {executed}"


def check_processes(processes: int, device: str) -> None:
    """Refuse a number of processes that this machine has no GPUs for."""
    if processes < 1:
        raise UserError(f"PROCESSES is {processes}; it must be 1 or more")
    if device == "cuda" and processes > 1:
        import torch

        if processes > torch.cuda.device_count():
            raise UserError(f"PROCESSES is {processes}, but PyTorch sees {torch.cuda.device_count()} GPUs; give at most so many")


def _answer(workspace: Workspace, parameters: dict[str, str], processes: int, out: Any) -> None:
    """Let several processes answer the test before its notebook runs, by `accelerate launch`."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launch += ["--num_cpu_threads_per_process", os.environ["OMP_NUM_THREADS"]]
    launch += ["--multi_gpu"]  # on CPUs as well: with `--cpu` it would start one process only
    command = ["--module", "stetholib", "answer", "--profile", parameters["profile"], "--device", parameters["device"]]
    with _progress(workspace.runs / "progress.log", out):
        done = subprocess.run([*launch, *command], cwd=workspace.root, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("stetholib: ")]
        log = workspace.runs / "answer.log"
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        killed = "SIGKILL" in done.stderr or done.returncode == -signal.SIGKILL
        why = "one was killed, most often for want of memory" if killed else f"see {log}"
        raise UserError(said[0].removeprefix("stetholib: ") if said else f"answering in {processes} processes failed: {why}")


def answer(name: str, device: str) -> None:
    """What each process of `accelerate launch` does: its share of every variant's batches, into a file of its own."""
    from accelerate import PartialState

    from stetholib.study import Study

    state = PartialState(cpu=device == "cpu")
    study = Study.open(name, device=device)
    for variant in study.variants().values():
        study.answers(variant, state.process_index, state.num_processes)
    state.destroy_process_group()


@contextmanager
def _peaks(device: str) -> Iterator[dict[str, float]]:
    """Watch the memory of a step's processes, and of the GPU: the dict holds the peaks in GiB when it is over."""
    import psutil

    found, done = {"ram": 0.0, "gpu": 0.0}, threading.Event()

    def resident() -> int:
        total = 0
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                total += child.memory_info().rss
        return total

    def watch() -> None:
        while not done.wait(0.3):
            found["ram"] = max(found["ram"], resident() / 2**30)
            if device == "cuda":
                asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
                with suppress(OSError, ValueError, subprocess.SubprocessError):
                    used = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout.split()
                    found["gpu"] = max([found["gpu"], *(int(mib) / 1024 for mib in used)])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@contextmanager
def _progress(log: Path, out: Any) -> Iterator[None]:
    """Pass on what the notebook's kernel says of its progress."""
    log.write_text("")
    os.environ["STETHOLIB_PROGRESS"] = str(log)
    done = threading.Event()

    def follow() -> None:
        with log.open(encoding="utf-8") as handle:
            while not done.wait(1):
                out.write(handle.read())
                out.flush()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def set_environment(threads: int, runs: Path) -> None:
    """What must be fixed before a kernel starts, so that two runs give the same bytes; libraries' own bars are off.

    Settings of Jupyter and matplotlib come from a folder in `runs/`: a user's own would change figures, and a home
    folder need not be writable.
    """
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


def _code_key(profile: profiles.Profile, device: str) -> str:
    """Everything that a notebook's result depends on besides its own text."""
    package = Path(__file__).parent
    code = {str(p.relative_to(package)): code_text(p.read_text(encoding="utf-8")) for p in sorted(package.rglob("*.py"))}
    libraries = [version(library) for library in (*LIBRARIES, "matplotlib", "seaborn")]
    return digest_of(profile.digest, device, code, libraries, _local_files(profile))


def _local_files(profile: profiles.Profile) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file of one's own that a profile points at."""
    data = profile.data
    places = (profile.model.base, profile.finetune.finetuned, profile.sae.release, data.maths, data.general)
    files = [file for place in places if place for file in sorted(Path(place).rglob("*"))]
    files += minerva_math.task_files(profile.evaluation.task)
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _outputs(step: str, workspace: Workspace) -> list[Path]:
    """What a step left where others read it: figures and tables, the records, the manifest."""
    further = {ANSWERING: workspace.records.glob("*.jsonl"), STEPS[-1]: workspace.figures.glob("manifest.json")}
    return sorted([*workspace.figures.glob(f"{step[:2]}_*"), *further.get(step, ())])


def _is_done(mark: Path, key: str, workspace: Workspace) -> bool:
    try:
        done = json.loads(mark.read_text(encoding="utf-8"))
        intact = all(file_hash(workspace.root / name) == known for name, known in done["files"].items())
        return done["key"] == key and bool(done["files"]) and intact
    except (OSError, ValueError, KeyError, TypeError):
        return False


def notebook_text(path: Path) -> list[tuple[str, str]]:
    """A notebook's cells as (type, source); outputs and metadata do not count."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"notebooks/{path.name} is missing or not a notebook; restore it with: git checkout notebooks/{path.name}"
        ) from None


def check_notebook(path: Path) -> None:
    """Each notebook must have one cell tagged `parameters`, before any other code, with the three names; cells in order."""
    notebook_text(path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    tagged = [i for i, cell in enumerate(code) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if tagged != [0]:
        what = "has no cell tagged `parameters`" if not tagged else "does not open with its one `parameters` cell"
        raise UserError(f"notebooks/{path.name} {what}; restore it with: git checkout notebooks/{path.name}")
    lines = "".join(code[0]["source"]).splitlines()
    set_to = {
        name.strip(): value.partition("#")[0].strip() for name, _, value in (line.partition("=") for line in lines if "=" in line)
    }
    names = list(set_to)
    if wrong := sorted(set(names) - set(PARAMETERS)) or sorted(set(PARAMETERS) - set(names)):
        raise UserError(f"notebooks/{path.name}: the parameters cell must set {', '.join(PARAMETERS)}; mend {wrong[0]!r}")
    if set_to["overrides"] != "{}":
        raise UserError(
            f"notebooks/{path.name} has overrides in its parameters cell, which make would write beside the profile's own files; "
            "run it in JupyterLab (make lab), or put them into a profile of your own: make reproduce PROFILE=mine.yaml"
        )
    numbered = [cell["id"] for cell in cells if re.fullmatch(rf"{path.stem[:2]}-\d\d", cell.get("id", ""))]
    if early := next((one for one, other in pairwise(numbered) if one > other), None):
        raise UserError(
            f"notebooks/{path.name}: its cells are out of order at {early}; restore it with: git checkout notebooks/{path.name}"
        )


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
