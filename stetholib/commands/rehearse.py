"""A profile's six notebooks on fabricated weights of the true shapes, or of a fraction: `make rehearse PROFILE=paper`.

It runs with its own ids and releases, from a cache of the Hub that holds fabricated files, on small budgets. What is measured
is time and memory, step by step; the full run takes as much memory and far more time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from stetholib import profiles
from stetholib.adapters import saes
from stetholib.commands import fabricate
from stetholib.commands.notebooks import check_all
from stetholib.commands.watch import say
from stetholib.data.mini.problems import SUBJECTS
from stetholib.data.source import Source
from stetholib.errors import UserError
from stetholib.profiles import Profile
from stetholib.store.files import digest_of, held, repository

PROBLEMS = dict(train_problems=3, validation_problems=4, feature_problems=4, test_problems=dict.fromkeys(SUBJECTS, 1))
FEW: dict[str, dict[str, Any]] = {
    "data": dict(general_documents=14, **PROBLEMS),
    "finetune": dict(gradient_accumulation=4),
    "features": dict(minimum_firing=0.0, matched_minimum=5),
    "projection": dict(random_draws=2, gradient_problems=1),
    "selection": dict(permutations=50, resamples=20, loss_problems=1, random_sets=3, greedy=False),
    "evaluation": dict(max_new_tokens=16, general_documents=6, noise_problems=1),
}


def rehearse(name: str, device: str, scale: float) -> None:
    """Run a profile on fabricated weights in `runs/<profile>-rehearsal/` and print what each step took."""
    full = profiles.load(name)
    if not 0 < scale <= 1:
        raise UserError(f"rehearsal: SCALE is {scale:g}; it must be above 0 and at most 1, the true shapes")
    if Source.of(full.data.maths, kind="dataset").where == "shipped":
        raise UserError(f"rehearsal: profile {full.name} fetches nothing; run it: make reproduce PROFILE={full.name}")
    notebooks = Path(__file__).parents[2] / "notebooks"
    check_all(notebooks)
    home = (repository() / "runs" / f"{full.name}-rehearsal").resolve()
    small = _small(name, home)
    with held(home / "rehearsal.lock", f"another rehearsal of {full.name} is under way in this folder; wait for it"):
        _fabricate(small, home, scale)
        if not (home / "notebooks").exists():
            (home / "notebooks").symlink_to(notebooks)
        _reproduce(home / f"{full.name}.yaml", device, home)
    run = json.loads((home / "runs" / full.name / "run.json").read_text(encoding="utf-8"))
    for step, seconds in run["seconds"].items():
        memory, gpu = run["peak_gib"].get(step, 0.0), run.get("peak_gpu_gib", {}).get(step)
        say(f"{step}: {seconds:.0f} s, peak {memory:.1f} GiB" + (f", GPU {gpu:.1f} GiB" if gpu else ""))


def _reproduce(profile: Path, device: str, home: Path) -> None:
    """The run, in a process of its own: huggingface_hub reads where its cache is when it is imported, and whoever
    fabricates has imported it by now. Raises UserError with the run's own line where it fails."""
    command = [sys.executable, "-m", "stetholib", "reproduce", "--profile", str(profile), "--device", device]
    known = os.environ | {"HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1", "STETHOLIB_HOME": str(home)}
    for narrower in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):  # they would win over HF_HOME
        known.pop(narrower, None)
    said = ""
    with subprocess.Popen(command, env=known, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr or ():
                if line.startswith("stetholib: "):
                    said = line.removeprefix("stetholib: ").strip()
                else:
                    say(line, end="")
        except KeyboardInterrupt:
            process.terminate()  # where the interruption was sent to this process alone
            raise
    if process.returncode:
        raise UserError(said or f"rehearsal: its run ended with status {process.returncode}; see {home / 'runs'}")


def _small(name: str, home: Path) -> Profile:
    """The profile with few of everything, written as a file of the same name."""
    values = profiles.read(name)
    for section, sizes in FEW.items():
        values[section] = values[section] | sizes
    values["published_rung"] = False
    values["threads"] = min(values["threads"], os.cpu_count() or 1)
    values["title"] = f"rehearsal of {values['title']}, fabricated weights"
    home.mkdir(parents=True, exist_ok=True)
    (home / f"{values['name']}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return profiles.load(name, values)


def _fabricate(profile: Profile, home: Path, scale: float) -> None:
    """Fill a cache of the Hub with fabricated repositories, at the revisions that the profile pins."""
    cache, mark = home / "hub" / "hub", home / "hub" / "fabricated.json"
    made_of = digest_of(scale, profile.digest)
    if mark.is_file() and json.loads(mark.read_text())["key"] == made_of:
        return
    say(f"rehearsal: fabricating weights at {scale:g} of the true shapes ...")
    shutil.rmtree(home / "hub", ignore_errors=True)
    shutil.rmtree(home / "runs", ignore_errors=True)
    data, model = profile.data, profile.model
    pinned = {model.base: model.revision, data.maths: data.maths_revision, data.general: data.general_revision}
    pinned[saes.registered(profile.sae.release).repo_id] = profile.sae.revision
    for repo, folder in fabricate.everything(profile, home / "hub" / "made", scale).items():
        kind = "datasets" if repo in (data.maths, data.general) else "models"
        place, revision = cache / f"{kind}--{repo.replace('/', '--')}", pinned.get(repo) or "0" * 40
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(revision)
        (place / "snapshots").mkdir()
        shutil.move(folder, place / "snapshots" / revision)
    mark.write_text(json.dumps(dict(key=made_of)))
