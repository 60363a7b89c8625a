"""The one room where everything is wired together: a world, then one small object a step, each given what it reads.

study = Study.open("mini")
study.layer_selection.table()        # makes, or finds, all that it stands on; writes nothing
study.keep("04_layer_selection", study.layer_selection.table())
"""

import ast
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from stetholib import comparison, plots
from stetholib.adapters import saes
from stetholib.commands.environment import check_imported_from
from stetholib.data import corpora, installed
from stetholib.profiles import ProfileError, nearest
from stetholib.store.files import atomic, json_lines
from stetholib.study.layer_selection import LayerSelection
from stetholib.study.losses import Losses
from stetholib.study.minerva_math import MinervaMath
from stetholib.study.sae_features import SaeFeatures
from stetholib.study.significance import Significance
from stetholib.study.subspace_projection import SubspaceProjection
from stetholib.study.task_vectors import TaskVectors
from stetholib.study.world import World, library_versions

PARAMETERS = ("profile", "device", "overrides")
INJECTED = "# Parameters"  # papermill's first line in the cell that it adds


class Study:
    """One world and its six steps."""

    def __init__(self, world: World) -> None:
        """world: a profile on a device; `Study.open` makes one by name."""
        self.world, self.profile, self.device, self.workspace = world, world.profile, world.device, world.workspace
        self.task_vectors = tau = TaskVectors(world)
        self.sae_features = heard = SaeFeatures(world)
        self.losses = losses = Losses(world, tau)
        self.subspace_projection = scalpel = SubspaceProjection(world, tau, heard, losses)
        self.layer_selection = stethoscope = LayerSelection(world, tau, heard, losses)
        self.minerva_math = answers = MinervaMath(world, tau, scalpel, stethoscope)
        self.significance = Significance(world, tau, scalpel, stethoscope, answers)

    @classmethod
    def open(
        cls, name: str = "mini", overrides: Mapping[str, Any] | None = None, device: str = "cpu", root: Path | None = None
    ) -> "Study":
        """A profile by name, with single keys overridden; overridden studies keep their files apart."""
        return cls(World.open(name, overrides, device, root))

    @classmethod
    def for_notebook(cls, namespace: dict[str, Any]) -> "Study":
        """The study that a notebook's parameters ask for. namespace: the notebook's `globals()`. An earlier `study` is dropped
        first, so that a refused parameter leaves none behind. Raises ProfileError for a parameter that does not exist, where
        papermill would only warn."""
        for name in ("study", "step"):
            namespace.pop(name, None)
        check_imported_from(Path.cwd())
        given = parameters_of(namespace.get("In", []))
        if unknown := sorted(given - set(PARAMETERS)):
            near = nearest(unknown[0], PARAMETERS)
            raise ProfileError(f"unknown notebook parameter {unknown[0]!r}{near}; there are: {', '.join(PARAMETERS)}")
        if missing := [name for name in PARAMETERS if name not in namespace]:
            raise ProfileError(f"notebook parameter {missing[0]!r} is not set; run the parameters cell first")
        return cls.open(namespace["profile"], namespace["overrides"], namespace["device"])

    def keep(self, stem: str, *things: Any) -> None:
        """Write things into `figures/<profile>/`: a table as the contract's CSV, a figure as PNG and SVG with whose numbers
        it shows, a dict as JSON. `keep("records", table)` writes the records of each variant into `runs/`. This is the one verb
        that writes. Raises WorkspaceError where a table breaks its contract."""
        for thing in things:
            if isinstance(thing, Figure):
                plots.labelled(thing, f"Ours, {self.world.whose}")
                for kind in ("png", "svg"):
                    self.workspace.file(f"{stem}.{kind}", partial(plots.save, thing))
            elif isinstance(thing, pd.DataFrame) and stem == "records":
                for name, rows in thing.groupby("variant", sort=False):
                    text = json_lines(rows.to_dict("records"))
                    atomic(self.workspace.records / f"{name}.jsonl", partial(Path.write_text, data=text, encoding="utf-8"))
            elif isinstance(thing, pd.DataFrame):
                self.workspace.table(stem, thing)
            elif isinstance(thing, dict):
                self.workspace.text(f"{stem}.json", json.dumps(thing, indent=1, sort_keys=True) + "\n")
            else:
                raise TypeError(f"keep: {type(thing).__name__} is no table, figure or dict")

    def compare(self) -> Markdown:
        """What the overrides changed, beside the profile's own run, and what of it noise alone would give; of the tables that both
        have left so far."""
        return Markdown(comparison.told(self.workspace, self.world.whose))

    def manifest(self) -> dict[str, Any]:
        """What is stable about this run."""
        p, made, d_sae = self.profile, self.profile.finetune, int(self.sae_features.self_tests()["d_sae"].max())
        fetched = saes.commit_of(self.world.store.folder, p.sae)
        how: dict[str, Any] = dict(method=None if made.finetuned else made.method, lora_rank=None)
        how |= dict(lora_rank=made.lora_rank, lora_start=made.lora_start) if made.lora else {}
        run: dict[str, Any] = dict(profile=p.name, profile_hash=p.digest, seed=p.seed, threads=p.threads, device=self.device)
        run |= dict(overrides=self.world.overrides) if self.world.overrides else {}
        return run | dict(
            libraries=library_versions(),
            model=dict(base=named(p.model.base), revision=p.model.revision, dtype=p.model.dtype, key=self.world.base_key)
            | (dict(notice=p.model.notice) if p.model.notice else {}),
            finetune=dict(finetuned=named(made.finetuned), finetuned_revision=made.finetuned_revision) | how,
            sae=dict(release=named(p.sae.release), id=p.sae.sae_id, revision=p.sae.revision, d_sae=d_sae) | fetched,
            data=dict(maths=named(p.data.maths), maths_revision=p.data.maths_revision)
            | dict(general=named(p.data.general), general_revision=p.data.general_revision)
            | corpora.left_out(p.data, made.target == "minerva")
            | (installed.fingerprint(p.data.general == corpora.FORMAL) if p.data.general in corpora.INSTALLED else {}),
        )


def named(source: str | None) -> str | None:
    """What a manifest calls a source: a folder by its own name, wherever it lies, since hashes say what is in it."""
    return Path(source).name if source and Path(source).is_dir() else source


def parameters_of(cells: list[str]) -> set[str]:
    """The names that a notebook's parameters were given under: in the cell that papermill added, and in the last cell that was
    run of those that set a parameter. Whatever else a notebook defines is none of anybody's business."""
    given, own = set[str](), set[str]()
    for cell in cells:
        try:
            targets = [target for node in ast.parse(cell).body if isinstance(node, ast.Assign) for target in node.targets]
        except SyntaxError:
            continue
        names = {target.id for target in targets if isinstance(target, ast.Name)}
        if cell.startswith(INJECTED):
            given |= names
        elif names & set(PARAMETERS):
            own = names
    return given | own
