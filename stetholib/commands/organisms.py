"""The positive control in several organisms: `make organisms` asks every rule for the layers that are known in each of them.

Each organism is a profile whose fine-tune names blocks. It runs with SAEs of several seeds, and leaves in `figures/seeds-organism/`
whether it can test a rule at all (`bars`, read before any score), what each rule finds (`known_layers`), and what other seeds of the
SAEs change (`instruments`)."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import stetholib
from stetholib import known_layers, profiles
from stetholib.commands.reproduce import alone
from stetholib.commands.watch import say
from stetholib.data.mini import MODELS
from stetholib.data.mini.organism import KNOWN
from stetholib.errors import UserError
from stetholib.layer_sets import layer_energies, named_sets, reliability_of_sets
from stetholib.store.tables import Workspace

INTO = "seeds-organism"


def run(names: Sequence[str], device: str, seeds: int, root: Path | None = None) -> None:
    """Ask every rule in each organism, with SAEs of `seeds` seeds. Raises UserError for a profile that names no blocks."""
    found: dict[str, list[pd.DataFrame]] = {"bars": [], "known_layers": [], "instruments": []}
    for name in names:
        blocks, base = profiles.load(name).finetune.blocks, MODELS.get(profiles.load(name).model.base)
        if not blocks:
            raise UserError(f"organisms: profile {name} names no finetune.blocks, so that no layers are known in it")
        if base and (base / KNOWN).is_file() and json.loads((base / KNOWN).read_text()) != list(blocks):
            grown = "which are not those that its model was grown with"
            raise UserError(f"organisms: profile {name} names blocks {list(blocks)}, {grown}")
    if seeds < 1:
        raise UserError(f"organisms: SAEs of {seeds} seeds were asked for; SAES must be 1 or more")
    os.environ["STETHOLIB_PROGRESS"] = "/dev/stderr"
    manifests: dict[str, Any] = {}
    for name in names:
        profile = profiles.load(name)
        with alone(Workspace(profile.name, root), profile):
            for seed in range(profile.sae.seed, profile.sae.seed + seeds):
                say(f"{name}, SAEs of seed {seed}: running ...")
                changed = {} if seed == profile.sae.seed else {"sae.seed": seed}
                tables, manifest = one(stetholib.Study.open(name, changed, device, root), seed == profile.sae.seed)
                manifests.setdefault(name, manifest)
                for key, table in tables.items():
                    found[key].append(table.assign(world=name, sae_seed=seed))
    tables = {key: pd.concat(parts, ignore_index=True) for key, parts in found.items()}
    leave(tables, manifests, Workspace(INTO, root), ["world", "sae_seed"])


def one(study: Any, first: bool) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """One organism with SAEs of one seed: its bars, what each rule finds, and, with the first, what other SAE seeds change."""
    from stetholib.study import instruments
    from stetholib.study import layer_selection as wired

    step = study.layer_selection
    table, about = wired.known_layers(step), bars(study)
    assert table is not None
    tables = {"bars": pd.DataFrame([about]), "known_layers": table.assign(holds=about["holds"])}
    if first:
        others = instruments.reseeded(study.sae_features, 1)
        tables["instruments"] = instruments.over_seeds(study.sae_features, others, step.selected_count)
    return tables, study.manifest()


def bars(study: Any) -> dict[str, Any]:
    """What a world must show before a rule is asked: does it rank sets, are the known layers the good ones, are energies level?"""
    step, known = study.layer_selection, study.profile.finetune.blocks
    sets, told = step.sets(), step.reliability()
    change, about = named_sets(sets)["loss_change"], reliability_of_sets(told)
    energy = layer_energies(study.task_vectors.energies())
    found = dict(known=" ".join(map(str, known)), full=change["full"], share_known=change["known"] / change["full"])
    found |= dict(share_outside=change["outside"] / change["full"], percentile_known=named_sets(sets)["percentile"]["known"])
    found |= dict(reliability=about["reliability"], r_held_out=about["r_held_out"])
    found |= dict(energy_lowest=energy.min() / energy.mean(), energy_highest=energy.max() / energy.mean())
    return found | dict(holds=known_layers.holds(sets, told))


def leave(tables: dict[str, pd.DataFrame], manifest: dict[str, Any], folder: Workspace, first: Sequence[str]) -> None:
    """Write tables, with the columns of `first` in front, and a manifest into a workspace's figures."""
    for stem, table in tables.items():
        ordered = table[sorted(table, key=lambda column: column not in first)]
        folder.text(f"{stem}.csv", ordered.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    folder.text("manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
