"""What every step's wiring stands on: a profile, a workspace, cached stages, the base model and the texts.

A stage is a method `_make_<name>` that turns what came before into an `Artefact`; it is keyed by its parameters, its
upstream artefacts, the code it runs (the wiring up to its step, and the modules it names) and the libraries'
versions. Any notebook can therefore be opened first.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from stetholib import (
    figures,
    hub,
    minerva_math,
    models,
    profiles,
    texts,
)
from stetholib.environment import LIBRARIES
from stetholib.models import Checkpoint, LanguageModel
from stetholib.workspace import INDEX, Artefact, Workspace, digest_of, source_hash

PARAMETERS = ("profile", "device", "overrides")


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on, without local tags."""
    return {library: version(library).split("+")[0] for library in LIBRARIES}


class Stages:
    """One profile on one device, with everything that its six steps make."""

    def __init__(self, profile: profiles.Profile, device: str = "cpu", root: Path | None = None) -> None:
        """device: `cpu` or `cuda`; root: where `runs/` and `figures/` lie."""
        self.profile, self.device = profile, device
        self.workspace = Workspace(profile.name, root)
        self._memo: dict[str, Artefact] = {}
        torch.set_num_threads(profile.threads)
        torch.use_deterministic_algorithms(True, warn_only=device != "cpu")

    @classmethod
    def open(
        cls, name: str = "mini", overrides: dict[str, Any] | None = None, device: str = "cpu", root: Path | None = None
    ) -> "Study":
        """Open a profile by name, with single keys overridden; overridden runs keep their files apart."""
        if device not in ("cpu", "cuda"):
            raise profiles.ProfileError(f"unknown device {device!r}; it is cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise profiles.ProfileError("device cuda: PyTorch sees no CUDA GPU on this machine; use DEVICE=cpu")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        profile = profiles.load(name, overrides)
        minerva_math.check_subjects(profile.data.subjects, profile.evaluation.task)
        study = cls(profile, device, root)
        if overrides:
            study.workspace = Workspace(f"{profile.name}-{profile.digest}", root)
            study.workspace.store = Workspace(profile.name, root).store
        return study

    @classmethod
    def for_notebook(cls, namespace: dict[str, Any]) -> "Study":
        """Open the study that a notebook's `parameters` cell asks for; refuses a parameter that does not exist.

        Call it right after that cell. Papermill only warns about unknown names and then ignores them.
        """
        plain = (str, int, float, bool, list, dict, tuple, type(None))
        names = {name for name, value in namespace.items() if isinstance(value, plain) and name[0].islower()}
        if unknown := sorted(names - set(PARAMETERS)):
            raise profiles.ProfileError(
                f"unknown notebook parameter {unknown[0]!r}{profiles.nearest(unknown[0], PARAMETERS)}; there are: {', '.join(PARAMETERS)}"
            )
        return cls.open(namespace["profile"], namespace["overrides"], namespace["device"])

    def figure(self, stem: str, figure: Any) -> None:
        """Write a figure as PNG and SVG into `figures/<profile>/`, with whose numbers it shows."""
        figures.labelled(figure, self.profile.title)
        for kind in ("png", "svg"):
            self.workspace.file(f"{stem}.{kind}", partial(figures.save, figure))

    def _stage(
        self,
        name: str,
        params: Any,
        upstream: Sequence[str] = (),
        modules: Sequence[Any] = (),
        make: Callable[[Path], Artefact] | None = None,
    ) -> Artefact:
        """The artefact of `_make_<name>`, from this process, from the store, or made now."""
        method = getattr(type(self), f"_make_{name}")
        params = asdict(params) if hasattr(params, "__dataclass_fields__") else params
        where = [library_versions(), self.device, self.profile.threads]
        owner = next(kind for kind in type(self).__mro__ if method.__name__ in vars(kind))
        code = source_hash([*modules, *wiring(owner)])
        key = digest_of(name, params, list(upstream), code, where)
        if key not in self._memo:
            self._memo[key] = self.workspace.cached(name, key, make or partial(method, self))
        return self._memo[key]

    def _seed(self, purpose: str) -> int:
        """A seed of its own for each use of chance, derived from the profile's."""
        return int(digest_of(self.profile.seed, purpose), 16) % 2**31

    @cached_property
    def base_folder(self) -> Path:
        """Where the base model's files are."""
        return self._folder(self.profile.model.base, self.profile.model.revision)

    def _folder(self, name: str, revision: str | None) -> Path:
        if name == "mini":
            from stetholib.mini import base

            return base.FOLDER
        if name == "toy":
            return self._stage("toy", name).folder
        if Path(name).is_dir():
            return Path(name)
        return hub.snapshot(name, revision)

    def _make_toy(self, folder: Path) -> Artefact:
        """An untrained model of the real architecture, for the tests."""
        from transformers import Gemma3ForCausalLM

        from stetholib.mini import base, tokenizer

        torch.manual_seed(0)
        tokens = tokenizer.build()
        Gemma3ForCausalLM(base.config(layers=3, hidden=32, vocab_size=len(tokens))).save_pretrained(folder)
        tokens.save_pretrained(folder)
        return Artefact()

    @cached_property
    def base_key(self) -> str:
        """Identity of the base model: its name and revision, and the bytes of its files."""
        return digest_of(asdict(self.profile.model), files_key(self.base_folder, *hub.MODEL_FILES))

    @cached_property
    def data_key(self) -> str:
        """Identity of the texts: where they are from and how they are split and cut, and the bytes of local ones.

        How many problems of the test, or of those that features are heard on, is the matter of who reads them.
        """
        data, target = self.profile.data, self.profile.finetune.target
        counts = ("test_problems", "feature_problems", "general_documents")
        said = {name: value for name, value in asdict(data).items() if name not in counts} | {"subjects": data.subjects}
        return digest_of(said, target, [files_key(Path(place), "**/*.parquet") for place in (data.maths, data.general)])

    @cached_property
    def base(self) -> LanguageModel:
        """theta_0 with its tokenizer."""
        loaded = self._load(self.base_folder)
        room, longest = loaded.context, self.profile.data.max_tokens
        if room is not None and longest > room:
            raise profiles.ProfileError(f"data.max_tokens is {longest}, the model's context is {room}; lower data.max_tokens")
        return loaded

    def _load(self, folder: Path, dtype: str | None = None) -> LanguageModel:
        p = self.profile.model
        return models.load(folder, dtype or p.dtype, self.device, p.attention)

    @contextmanager
    def instead_of_base(self, folder: Path, dtype: str | None = None) -> Iterator[LanguageModel]:
        """Another model on the device; the base model waits in main memory, since two may not fit on a GPU."""
        base: LanguageModel | None = vars(self).get("base")
        if base:
            base.model.to("cpu")
        other = self._load(folder, dtype)
        try:
            yield other
        finally:
            other.model.to("meta")  # whoever still holds it, its memory is free
            if base:
                base.model.to(self.device)

    @cached_property
    def layers(self) -> int:
        """How many blocks the model has."""
        return 1 + max(layer for layer, _ in models.weight_names(Checkpoint(self.base_folder)))

    def problems(self, split: str) -> list[texts.Row]:
        """Problems of a split; the test split is read by step 05 and after only."""
        boxed = self.profile.finetune.target == "minerva"
        return texts.problems(self.profile.data, split, self._seed("problems"), boxed)

    def _per_subject(self, rows: Sequence[texts.Row], count: int) -> list[texts.Row]:
        """The first `count` problems of each subject; the rows are shuffled, so that is a random subset."""
        return [row for subject in self.profile.data.subjects for row in [r for r in rows if r["subject"] == subject][:count]]


def wiring(kind: type) -> list[ModuleType]:
    """The modules that a step's wiring stands on: its own and those of the steps before it."""
    return [sys.modules[base.__module__] for base in kind.__mro__ if base is not object]


def files_key(folder: Path, *patterns: str) -> list[str]:
    """Names and hashes of a folder's files. Raises HubError where one of the Hub's cache was altered."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.name != INDEX}
    return [f"{path.name} {hub.checked_hash(path)}" for path in sorted(paths)]
