"""Ask studies in clones for all that notebooks ask, each by the clone's own code, and say what was made anew.

    python asks.py        reads lines of JSON, {"folder": ..., "profile": ...}, and answers each with its exit status

The libraries are imported once, by a process that knows nothing of the package; each ask is a fork of it.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = (
    "torch transformers peft sae_lens datasets lm_eval.evaluator scipy.stats statsmodels.api seaborn IPython.display tqdm.auto"
)


def everything(profile: str) -> None:
    """All that the notebooks ask, and write."""
    from stetholib import Study, plots, sae_features, significance, task_vectors
    from stetholib.study.layer_selection import additivity, formal_text, known_layers, over_worlds, planted
    from stetholib.study.sae_features import training
    from stetholib.study.subspace_projection import choices

    study = Study.open(profile)
    one, two, three, four = study.task_vectors, study.sae_features, study.subspace_projection, study.layer_selection
    five, six = study.minerva_math, study.significance
    fig, ax = plots.panels()
    plots.loss_curve(one.finetune_curve(), ax) if one.finetune_curve() is not None else None
    study.keep("01_task_vectors", one.table(), fig)
    one.rounding(), one.restored(), one.energy_elsewhere(), task_vectors.algebra(one.vector)
    study.keep("02_sae_features", two.table())
    for at in sae_features.best_features(two.table()).values():
        two.top_tokens(*at)
    two.best_auroc(), training(two)
    study.keep("03_subspace_projection", three.table())
    three.mechanism(), choices(three), three.lora_start(), three.energy_or_direction(), three.rounding_of_edits()
    planted(study.world), formal_text(four), four.agreement(), four.relations(), study.losses.scales(four.shrunk)
    study.keep("04_layer_selection", four.table())
    study.keep("04_layer_sets", four.sets())
    study.keep("04_reliability", four.reliability())
    additivity(four), known_layers(four), over_worlds(four)
    study.keep("05_minerva_math", five.table())
    study.keep("records", five.records())
    five.token_limits(["base", "full", "full_shrunk", "stethoscope", "stethoscope_matched"]), five.noise(), five.checks()
    study.keep("06_significance", six.table())
    study.keep("06_published", six.published())
    six.pairs(significance.control_pairs(five.variants()))
    study.keep("06_claims", six.claims())
    study.keep("manifest", study.manifest())


def made(folder: Path, profile: str) -> dict[str, int]:
    """Stages by the names of their folders, and ledgers with their sizes."""
    store = folder / "runs" / profile / "store"
    return {path.parent.name: 0 for path in store.glob("[a-z]*/artefact.json")} | {
        path.name: path.stat().st_size for path in store.glob("*.jsonl")
    }


def kinds(names: set[str]) -> set[str]:
    """What stages and ledgers are called, without their keys."""
    return {name.rpartition("-")[0] for name in names}


@contextmanager
def asking() -> Iterator["Asking"]:
    """A process that asks, for the length of a block."""
    known = dict(os.environ, TQDM_DISABLE="1", PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="2", HF_HUB_OFFLINE="1")
    process = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=known, cwd="/"
    )
    try:
        yield Asking(process)
    finally:
        process.stdin.close()
        process.wait()


class Asking:
    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def new(self, folder: Path, profile: str, name: str) -> set[str]:
        """What asking for everything made anew: stages by folder, ledgers that are new or longer; name: the profile's."""
        before = made(folder, name)
        self._process.stdin.write(json.dumps(dict(folder=str(folder), profile=profile)) + "\n")
        self._process.stdin.flush()
        status = self._process.stdout.readline().strip()
        assert status == "0", f"asking in {folder} ended with {status!r}; see {folder / 'asked.log'}: {_tail(folder)}"
        return {one for one, size in made(folder, name).items() if before.get(one) != size}


def _tail(folder: Path) -> str:
    return "\n".join((folder / "asked.log").read_text().splitlines()[-8:])


def _ask(folder: str, profile: str) -> None:
    """In a fork: the clone's own package, in its own folder."""
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("asked.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ["STETHOLIB_HOME"] = folder
    sys.path.insert(0, folder)
    try:
        everything(profile)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    for library in LIBRARIES.split():
        importlib.import_module(library)
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            _ask(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
