"""Small versions of the real rungs: their own profiles with small budgets, on fabricated repositories served by a Hub."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import ROOT
from hub import LICENSED, Repository

from stetholib import profiles
from stetholib.adapters import saes
from stetholib.commands import fabricate
from stetholib.data.mini.problems import SUBJECTS

SCALE = 0.05
SMALL = {
    "threads": 2,
    "data": dict(
        train_problems=6,
        validation_problems=4,
        feature_problems=4,
        general_documents=14,
        max_tokens=160,
        test_problems=dict.fromkeys(SUBJECTS, 2),
    ),
    "finetune": dict(batch_size=2, gradient_accumulation=2, lora_rank=4),
    "features": dict(minimum_firing=0.0, matched_minimum=5, memory_gib=0.003),
    "projection": dict(random_draws=2, gradient_problems=1),
    "selection": dict(permutations=20, resamples=10, loss_problems=1, random_sets=3, batch_tokens=2048),
    "evaluation": dict(max_new_tokens=6, batch_size=8, general_documents=3, noise_problems=3),
    "significance": dict(bootstrap=200),
}


def small_profile(name: str, folder: Path, **changes: dict) -> Path:
    """The shipped profile with small budgets, as a YAML file of the same name; nothing but sizes differs."""
    values = profiles.read(name)
    for section, sizes in (SMALL | changes).items():
        values[section] = values[section] | sizes if isinstance(sizes, dict) else sizes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def with_small(values: dict) -> dict:
    """A profile's values with small budgets for what they leave open."""
    for section, sizes in SMALL.items():
        values[section] = sizes | values.get(section, {}) if isinstance(sizes, dict) else sizes
    return values


def fabricated(path: Path, folder: Path) -> dict[str, Path]:
    """Folders of all that a profile fetches, small and made up, by their names on the Hub."""
    return fabricate.everything(profiles.load(path.stem, yaml.safe_load(path.read_text())), folder, SCALE)


def repositories(path: Path, folder: Path) -> dict[str, Repository]:
    """All that a profile fetches, fabricated; models are gated, and the pinned revisions are the ones served."""
    profile = profiles.load(path.stem, yaml.safe_load(path.read_text()))
    data, model = profile.data, profile.model
    pinned = {model.base: model.revision, data.maths: data.maths_revision, data.general: data.general_revision}
    pinned[saes.registered(profile.sae.release).repo_id] = profile.sae.revision
    found = {}
    for name, place in fabricated(path, folder).items():
        files = {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}
        files["README.md"] = b"a file that nothing here asks for"
        found[name] = Repository(files, gated=name == model.base, revision=pinned.get(name))
    return found


def environment(home: Path, url: str, cache: Path, token: str | None = LICENSED) -> dict[str, str]:
    """The environment of a process that knows one Hub, one cache and one checkout folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    known = dict(HF_ENDPOINT=url, HF_HOME=str(cache), HF_HUB_DISABLE_XET="1", STETHOLIB_HOME=str(home), PYTHONPATH=str(ROOT))
    return kept | known | ({"HF_TOKEN": token} if token else {})


def reproduce(home: Path, profile: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    """`make reproduce` on a profile's file, in a folder of its own."""
    if not (home / "notebooks").exists():
        home.mkdir(parents=True, exist_ok=True)
        (home / "notebooks").symlink_to(ROOT / "notebooks")
    command = [sys.executable, "-m", "stetholib", "reproduce", "--profile", str(profile)]
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
