"""An edited model as a folder that any tool loads: `make export VARIANT=stethoscope`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from stetholib import minerva_math, profiles
from stetholib.commands.reproduce import opened
from stetholib.data.hub import MODEL_FILES, files_key
from stetholib.data.source import SHIPPED
from stetholib.editing import Edit
from stetholib.errors import UserError
from stetholib.minerva_math import Variant
from stetholib.models import export as files
from stetholib.profiles import Profile, nearest
from stetholib.significance import ALL, SPOKEN, interval
from stetholib.store.files import file_hash
from stetholib.store.tables import Workspace
from stetholib.study.world import library_versions

UNEDITED = ("base", "finetuned")
VECTORS = {
    "raw": "The raw task vector (fine-tune minus base)",
    "projected": "The task vector projected onto directions of sparse autoencoders",
    "projected_rescaled": "The task vector projected onto directions of sparse autoencoders and brought back to its energy",
    "raw_shrunk": "The task vector, each matrix shrunk to the energy of its projection",
}
DELTA = f"""Here is only what was added, in `{files.DELTA}`: tensors in float32 under the base's names. Add each to the base's tensor in
float32 and round once to the base's dtype; a delta rounded beforehand would give other bits."""
WHOLE = "Here is the whole model: the base's own files with those matrices replaced, which load as the base does."
RECIPE = f"`{files.RECIPE}` gives the same tensors by mergekit, from the two checkpoints that it names."
NO_RECIPE = "No recipe of mergekit gives these tensors: task arithmetic adds whole differences of checkpoints."
OTHER = """The model that was measured computed in {}. The tensors here are stored in {}, as the base's are, and that rounding may
take away part of what was added; the same export with `--delta` keeps all of it."""
UNMEASURED = "No measurement of this very model is at hand."
TOY = "**This is a miniature**, made to try a method on; it is of no use as a model of mathematics or language."


def export(name: str, profile_name: str, device: str, into: str | None = None, delta: bool = False) -> Path:
    """Write the model of a variant, or what it adds (`delta`), with card, recipe and provenance; returns the folder.
    into: a new folder, or an earlier export to replace; by default runs/<profile>/export/<variant>, or <variant>-delta. What
    the variant stands on is found or computed. Raises UserError for a variant or a place that cannot be."""
    profile = profiles.load(profile_name)
    known = [one for one in profile.evaluation.variants if one not in UNEDITED]
    if name not in known:
        what = "has nothing added to it and is whole on disk" if name in UNEDITED else f"is no variant{nearest(name, known)}"
        raise UserError(f"export: {name!r} {what}; there are: {', '.join(known)}")
    folder = Path(into) if into else Workspace(profile.name).runs / "export" / (name + "-delta" * delta)
    files.check_place(folder)
    with opened(profile_name, device) as study:
        variant, base = study.minerva_math.variants()[name], study.world.base_folder
        vector = study.subspace_projection.vector_of(variant.vector)
        with vector.opened() as tau:
            edit = Edit(tau, variant.layers, alpha=variant.alpha)
            with files.whole(folder, files.bytes_wanted(base, edit, delta)) as draft:
                (files.write_delta if delta else files.write_model)(base, edit, draft)
                _papers(study, variant, vector.identity, delta, draft)
    return folder


def _papers(study: Any, variant: Variant, vector: str, delta: bool, draft: Path) -> None:
    """Recipe where there is one, card, and provenance, which holds the hashes of all the others."""
    p, base = study.profile, study.world.base_folder
    came = {
        "base": (p.model.base, p.model.revision, base),
        "finetune": (p.finetune.finetuned, p.finetune.finetuned_revision, study.task_vectors.folder),
    }
    stored, about = files.dtypes(base), [DELTA if delta else WHOLE]
    if not delta:
        has_recipe = variant.vector == "raw" and len(stored) == 1
        if has_recipe:
            theta_0, theta_1 = (f"{name}@{at}" if at else str(folder.resolve()) for name, at, folder in came.values())
            recipe = files.recipe(theta_0, theta_1, variant.layers, variant.alpha, *stored)
            (draft / files.RECIPE).write_text(recipe, encoding="utf-8")
        about.append(RECIPE if has_recipe else NO_RECIPE)
        about += [OTHER.format(p.model.dtype, " and ".join(sorted(stored)))] * (stored != {p.model.dtype})
    headline = study.minerva_math.headline_subject
    text = card(p, variant, licence(base), about, measured(study.workspace, p, study.world.base_key, variant, headline))
    (draft / files.CARD).write_text(text, encoding="utf-8")
    said = dict(variant=asdict(variant), vector=vector, profile=p.name, profile_hash=p.digest, seed=p.seed, device=study.device)
    for what, (name, revision, folder) in came.items():
        hashes = dict(line.rsplit(" ", 1) for line in files_key(folder, *MODEL_FILES))
        said[what] = dict(name=name, revision=revision, files=hashes)
    written = {path.name: file_hash(path) for path in draft.iterdir()}
    said |= dict(dtype=p.model.dtype, libraries=library_versions(), written=written)
    (draft / files.PROVENANCE).write_text(json.dumps(said, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def licence(base: Path) -> str:
    """The licence that a model's card or configuration gives, `other` where neither does."""
    from huggingface_hub import metadata_load

    card, config = base / files.CARD, json.loads((base / "config.json").read_text(encoding="utf-8"))
    known = (metadata_load(card) if card.is_file() else None) or {}
    return next((one["license"] for one in (known, config) if isinstance(one.get("license"), str)), "other")


def measured(workspace: Workspace, profile: Profile, base_key: str, variant: Variant, headline: str) -> list[str]:
    """What the run's tables say of a variant, as lines of Markdown; none where they are of another profile, base or choice."""
    try:
        run = json.loads((workspace.figures / "manifest.json").read_text(encoding="utf-8"))
        answered, tested, sets = map(workspace.read_table, ("05_minerva_math", "06_significance", "04_layer_sets"))
    except (OSError, ValueError, UserError):
        return []
    chosen = sets.loc[sets["selector"] == variant.name, "layers"].astype(str)
    same = run["profile_hash"] == profile.digest and run["model"]["key"] == base_key
    rows = tested[(tested["variant"] == variant.name) & tested["subject"].isin([ALL, headline]) & tested["difference"].notna()]
    if not same or rows.empty or any(layers != " ".join(map(str, variant.layers)) for layers in chosen):
        return []
    lines = ["| problems | judged by | base | edited | gain | verdict |", "|---|---|---|---|---|---|"]
    for row in rows.to_dict("records"):
        name, judge = str(row["subject"]).replace("_", " "), SPOKEN[row["metric"]]
        gain = f"{100 * row['difference']:+.1f} points, {interval(row)}"
        parts = (f"{name} ({row['n']})", judge, f"{row['base_accuracy']:.1%}", f"{row['accuracy']:.1%}", gain, row["verdict"])
        lines.append(f"| {' | '.join(parts)} |")
    price = minerva_math.price(answered, ["base", variant.name])[variant.name]
    return [*lines, "", f"Its loss on held-out general text differs from the base's by {price:+.4f} nats a token."]


def card(profile: Profile, variant: Variant, licence: str, about: list[str], measured: list[str]) -> str:
    """The card: YAML front matter for the Hub, then what was added where, and what was measured of it."""
    base = profile.model.base
    name = Path(base).name if Path(base).is_dir() else base
    front = dict(base_model=name, license=licence, tags=["task-arithmetic", "model-editing", "stetholib"])
    layers, toy = ", ".join(map(str, variant.layers)) or "none", [TOY] * (base in SHIPPED["model"])
    what = f"{VECTORS[variant.vector]}, times {variant.alpha:.6g}, was added to the seven matrices of layers {layers} (from 0)"
    whose = f"of `{name}`. The profile is `{profile.name}` ({profile.title}, hash `{profile.digest}`, seed {profile.seed})."
    top = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---", f"# {name}, edited: {variant.name}", *toy, f"{what} {whose}"]
    came = f"`{files.PROVENANCE}` holds the hashes of what this came from and of every file here."
    return "\n\n".join([*top, *about, came, "## Measured", "\n".join(measured or [UNMEASURED])]) + "\n"
