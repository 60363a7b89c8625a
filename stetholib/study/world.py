"""A world: one profile on one device, with its base model, its texts and its seeds. Everything that steps share."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, cached_property
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from IPython.display import Markdown

from stetholib.adapters import harness
from stetholib.commands.environment import LIBRARIES
from stetholib.data import corpora, hub
from stetholib.data.prompts import problem_id, prompt, target
from stetholib.data.source import Source
from stetholib.editing import weights
from stetholib.models.loading import LanguageModel, check_room, load
from stetholib.models.weights import Checkpoint, Weights, weight_names
from stetholib.profiles import Profile, ProfileError, signed
from stetholib.profiles import load as load_profile
from stetholib.store.artefacts import Store
from stetholib.store.code import code_of
from stetholib.store.files import digest_of, file_hash
from stetholib.store.tables import Workspace
from stetholib.store.values import Input, hashed


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that results depend on, without local tags."""
    return {library: version(library).split("+")[0] for library in LIBRARIES}


class World:
    """theta_0, texts and seeds of a profile; one model on a GPU at a time."""

    def __init__(self, profile: Profile, device: str, workspace: Workspace, overrides: Mapping[str, Any]) -> None:
        """workspace: where its store lies; overrides: what the profile was opened with, for headings."""
        self.profile, self.device, self.workspace, self.overrides = profile, device, workspace, dict(overrides)
        self.store = Store(workspace.store, [device, profile.threads, library_versions()])
        self._problems: dict[str, list[corpora.Row]] = {}
        torch.set_num_threads(profile.threads)
        torch.use_deterministic_algorithms(True, warn_only=device != "cpu")

    @classmethod
    def open(
        cls, name: str, overrides: Mapping[str, Any] | None = None, device: str = "cpu", root: Path | None = None
    ) -> "World":
        """A profile by name, with single keys overridden; an overridden world keeps its files apart, in the same store."""
        if device not in ("cpu", "cuda"):
            raise ProfileError(f"unknown device {device!r}; it is cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ProfileError("device cuda: PyTorch sees no CUDA GPU on this machine; use DEVICE=cpu")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        profile = load_profile(name, overrides)
        harness.check_task(profile.data.subjects, profile.evaluation.task)
        workspace = Workspace.of(profile.name, profile.digest, overrides or {}, root)
        return cls(profile, device, workspace, overrides or {})

    @property
    def whose(self) -> str:
        """Whose numbers these are, as figures sign it: the profile's title, and every override."""
        return signed(self.profile.title, self.overrides)

    def seed(self, purpose: str) -> int:
        """A seed of its own for each use of chance, derived from the profile's."""
        return int(digest_of(self.profile.seed, purpose), 16) % 2**31

    @cached_property
    def base_folder(self) -> Path:
        """Where the base model's files are."""
        return self.folder_of(self.profile.model.base, self.profile.model.revision)

    def folder_of(self, name: str, revision: str | None) -> Path:
        """A model's files: shipped, in a folder, fetched from the Hub, or an untrained toy made for the tests."""
        if name != "toy":
            return Source.of(name, revision).folder()
        from stetholib.data.mini import base  # here, so that what needs no model starts without transformers

        return self.store.made(base.toy).folder

    @cached_property
    def base_key(self) -> str:
        """Identity of the base model: its name and revision, and the bytes of its files, whatever is said of it."""
        model = {name: value for name, value in asdict(self.profile.model).items() if name != "notice"}
        return digest_of(model, hub.files_key(self.base_folder, *hub.MODEL_FILES))

    @cached_property
    def base(self) -> LanguageModel:
        """theta_0 with its tokenizer."""
        loaded = load(self.base_folder, self.profile.model.dtype, self.device, self.profile.model.attention)
        check_room(loaded, self.profile.data.max_tokens)
        return loaded

    @cached_property
    def model(self) -> Input[LanguageModel]:
        """theta_0 as an input of stages."""
        return Input.of(hashed([self.base_key, code_of(load)]), lambda: self.base)

    @cached_property
    def checkpoint(self) -> Input[Checkpoint]:
        """theta_0's tensors on disk as an input of stages."""
        return Input.of(self.base_key, lambda: Checkpoint(self.base_folder))

    @cached_property
    def weights(self) -> Input[Weights]:
        """theta_0's seven matrices of each layer, as they are stored, as an input of stages."""
        return self.store.derived(weights, self.checkpoint)

    def other(self, identity: str, folder: Callable[[], Path], dtype: str | None = None) -> Input[LanguageModel]:
        """Another model as an input of stages; the base model waits in main memory, since two may not fit on a GPU."""
        how = (dtype or self.profile.model.dtype, self.profile.model.attention)
        return Input(hashed([identity, *how, code_of(load)]), lambda: self._aside(folder(), *how))

    @contextmanager
    def _aside(self, folder: Path, dtype: str, attention: str) -> Iterator[LanguageModel]:
        base: LanguageModel | None = vars(self).get("base")
        if base:
            base.model.to("cpu")
        other = load(folder, dtype, self.device, attention)
        try:
            yield other
        finally:
            other.model.to("meta")  # frees the memory even if a caller keeps a reference
            if base:
                base.model.to(self.device)

    @cached_property
    def _names(self) -> dict[tuple[int, str], str]:
        return weight_names(Checkpoint(self.base_folder))

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return 1 + max(layer for layer, _ in self._names)

    @cached_property
    def width(self) -> int:
        """d_model."""
        return Checkpoint(self.base_folder).shape(self._names[0, "q"])[1]

    def problems(self, split: str) -> list[corpora.Row]:
        """Problems of a split; the test split is read by step 05 and after only."""
        if split not in self._problems:  # every key that holds them asks again
            boxed = self.profile.finetune.target == "minerva"
            self._problems[split] = corpora.problems(self.profile.data, split, self.seed("problems"), boxed)
        return list(self._problems[split])

    def per_subject(self, split: str, count: int) -> list[corpora.Row]:
        """The first `count` problems of each subject; the rows are shuffled, so that is a random subset."""
        rows = self.problems(split)
        return [row for subject in self.profile.data.subjects for row in [r for r in rows if r["subject"] == subject][:count]]

    def solved(self, rows: Sequence[corpora.Row]) -> list[tuple[str, str]]:
        """(prompt, gold solution) of problems, as a fine-tune sees them."""
        return [(prompt(row["problem"]), target(row["solution"], self.profile.finetune.target)) for row in rows]

    def tasks_on(self, rows: Sequence[corpora.Row]) -> Input[harness.Tasks]:
        """The harness's tasks on some problems, as an input of stages."""
        p = self.profile.evaluation
        files = [f"{file.name} {file_hash(file)}" for file in harness.task_files(p.task)]
        return self.store.derived(harness.Tasks, rows, p.num_fewshot, p.task, files)

    def asked(self, tasks: Input[harness.Tasks]) -> harness.Asked:
        """What is asked: the test's prompts, with its shots and its chat template, and its stop strings."""
        chat = self.model if self.profile.evaluation.chat_template else None
        return self.store.made(harness.asked, tasks, chat).value

    def solved_as_tested(self, rows: Sequence[corpora.Row]) -> list[tuple[str, str]]:
        """(prompt, gold solution) of problems, each asked as the test asks."""
        ids = [problem_id(row["subject"], row["problem"]) for row in rows]
        # no prompt shows its solution, and the harness wants a boxed one, which not every training problem has
        prompts = self.asked(self.tasks_on([{**row, "solution": r"$\boxed{0}$"} for row in rows])).prompts
        return [(prompts[name], gold) for name, (_, gold) in zip(ids, self.solved(rows), strict=True)]

    def general(self, split: str, key: str, purpose: str = "general") -> list[str]:
        """General documents of a split, as many as this key of the profile wants."""
        return corpora.general(self.profile.data, split, attrgetter(key)(self.profile), self.seed(purpose), key=key)


class Step:
    """What the six steps have in common: a world, and a heading that says whose numbers these are."""

    def __init__(self, world: World) -> None:
        """world: what all steps share."""
        self._world, self._profile, self._store = world, world.profile, world.store

    def heading(self) -> Markdown:
        """Whose numbers these are, and every override."""
        p, changed = self._profile, self._world.overrides
        said = "".join(f"; `{key}` = {value!r}" for key, value in changed.items())
        tweaked = f" **Overridden**{said.replace(';', ':', 1)}." if changed else ""
        notice = f" Weights: {p.model.notice}." if p.model.notice else ""
        whose = f"Numbers below are **ours, {p.title}** (profile `{p.name}`, seed {p.seed}), unless they say *Paper*."
        return Markdown(whose + notice + tweaked)
