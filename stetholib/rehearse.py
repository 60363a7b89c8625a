"""A profile's six notebooks on fabricated weights of the true shapes, or of a fraction: `make rehearse PROFILE=paper`.

The profile itself runs, with its own ids and releases, from a cache of the Hub that holds fabricated files; only the
budgets are small. What is measured is time and memory, step by step, and from them a forecast for the full run.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from stetholib import doctor, estimate, fabricate, hub, profiles, saes, texts
from stetholib.errors import UserError
from stetholib.estimate import Machine, Size
from stetholib.minerva_math import prompt, target
from stetholib.mini.problems import SUBJECTS
from stetholib.profiles import Profile
from stetholib.workspace import digest_of, held, repository

FEW: dict[str, dict[str, Any]] = {
    "data": dict(
        train_problems=3,
        validation_problems=4,
        feature_problems=4,
        general_documents=14,
        test_problems=dict.fromkeys(SUBJECTS, 1),
    ),
    "finetune": dict(gradient_accumulation=4),
    "features": dict(minimum_firing=0.0, matched_minimum=5),
    "projection": dict(random_draws=2, gradient_problems=1),
    "selection": dict(permutations=50, resamples=20, loss_problems=1, random_sets=3, random_energy_sets=1, greedy=False),
    "evaluation": dict(max_new_tokens=16, general_documents=6, noise_problems=1),
}


def rehearse(name: str, device: str, scale: float, root: Path | None = None, out: Any = sys.stderr) -> None:
    """Run a profile on fabricated weights in `runs/<profile>-rehearsal/` and print a line a step with its forecast."""
    full = profiles.load(name)
    if not 0 < scale <= 1:
        raise UserError(f"rehearsal: SCALE is {scale:g}; it must be above 0 and at most 1, the true shapes")
    if full.data.maths == "generated":
        raise UserError(f"rehearsal: profile {full.name} fetches nothing; run it: make reproduce PROFILE={full.name}")
    home = (root or repository()) / "runs" / f"{full.name}-rehearsal"
    small = _small(name, home)
    os.environ |= {"HF_HOME": str(home / "hub"), "HF_HUB_OFFLINE": "1", "STETHOLIB_HOME": str(home)}
    from stetholib.reproduce import reproduce

    with held(home / "rehearsal.lock", f"another rehearsal of {full.name} is under way in this folder; wait for it"):
        _fabricate(small, home, scale, out)
        if not (home / "notebooks").exists():
            (home / "notebooks").symlink_to(Path(__file__).parent.parent / "notebooks")
        reproduce(str(home / f"{full.name}.yaml"), device, home, out)
    run = json.loads((home / "runs" / full.name / "run.json").read_text(encoding="utf-8"))
    true = replace(doctor.size(small), parameters=fabricate.parameters(full.model.base), **fabricate.true_shape(full.model.base))
    machine = Machine.measured(device, full.model.dtype)
    for line in forecast((full, replace(true, d_sae=full.sae.d_sae)), (small, _size(small)), run, machine):
        print(line, file=out)


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
    return profiles.load(str(home / f"{values['name']}.yaml"))


def _fabricate(profile: Profile, home: Path, scale: float, out: Any) -> None:
    """Fill a cache of the Hub with fabricated repositories, at the revisions that the profile pins."""
    cache, mark = home / "hub" / "hub", home / "hub" / "fabricated.json"
    made_of = digest_of(scale, profile.digest)
    if mark.is_file() and json.loads(mark.read_text())["key"] == made_of:
        return
    print(f"rehearsal: fabricating weights at {scale:g} of the true shapes ...", file=out, flush=True)
    shutil.rmtree(home / "hub", ignore_errors=True)
    shutil.rmtree(home / "runs", ignore_errors=True)
    data, model = profile.data, profile.model
    pinned = {model.base: model.revision, data.maths: data.maths_revision, data.general: data.general_revision}
    for repo, folder in fabricate.everything(profile, home / "hub" / "made", scale).items():
        kind = "datasets" if repo in (data.maths, data.general) else "models"
        place, revision = cache / f"{kind}--{repo.replace('/', '--')}", pinned.get(repo) or "0" * 40
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(revision)
        (place / "snapshots").mkdir()
        shutil.move(folder, place / "snapshots" / revision)
    mark.write_text(json.dumps(dict(key=made_of)))


def forecast(full: tuple[Profile, Size], small: tuple[Profile, Size], run: dict[str, Any], machine: Machine) -> list[str]:
    """A line a step: measured seconds and peaks, and the full run's time; the last line sums up.

    What was measured is scaled by the ratio of what is expected of the full run and of the rehearsal.
    """
    lines, total = [], 0.0
    wanted, tried = (estimate.seconds(profile, size, machine) for profile, size in (full, small))
    for step, seconds in run["seconds"].items():
        expected = seconds * wanted[step] / tried[step]
        total += expected
        memory, gpu = run["peak_gib"].get(step, 0.0), run.get("peak_gpu_gib", {}).get(step)
        peaks = f"peak {memory:.1f} GiB" + (f", GPU {gpu:.1f} GiB" if gpu else "")
        lines.append(f"{step}: {seconds:.0f} s, {peaks}; the full run about {expected / 3600:.1f} h")
    return [*lines, f"the full run: about {total / 3600:.1f} h on this machine, a forecast"]


def _size(small: Profile) -> Size:
    """The fabricated model's size, its SAEs' and the mean length of its texts."""
    folder = hub.snapshot(small.model.base, small.model.revision)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = texts.problems(small.data, "validation", 0)
    lengths = [len(tokenizer(prompt(row["problem"]) + target(row["solution"])).input_ids) for row in rows]
    size = doctor.size(small)
    d_sae = saes.fetch(small.sae.release, small.sae.sae_id, 0, small.sae.revision).cfg.d_sae
    return replace(size, d_sae=d_sae, text_tokens=sum(lengths) / len(lengths))
