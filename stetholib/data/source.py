"""Where what a profile names is: shipped with the package, in a folder of one's own, or on the Hub. Decided here only."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stetholib.data import hub
from stetholib.data.mini import MODELS
from stetholib.errors import UserError

# what needs no files of anyone's, by kind: it ships with the package, is made by it or lies beside it
SHIPPED = {"model": (*MODELS, "toy"), "dataset": ("generated", "installed", "installed_formal"), "sae": ("train",)}
HUB_ID = re.compile(r"(?!.*(--|\.\.))(?=.{1,96}$)(\w|\w[\w.-]*\w)(/(\w|\w[\w.-]*\w))?(?<!\.git)", re.ASCII)


@dataclass(frozen=True)
class Source:
    """A model, a data set or SAEs, by the name that a profile gives."""

    name: str
    revision: str | None
    kind: Literal["model", "dataset", "sae"]
    where: Literal["shipped", "folder", "hub"]

    @classmethod
    def of(cls, name: str, revision: str | None = None, kind: Literal["model", "dataset", "sae"] = "model") -> "Source":
        """Decide by the name: what ships comes first, then a folder that is there, then the Hub (or a release, for SAEs).
        Raises UserError for a name that is none of these."""
        if name in SHIPPED[kind]:
            return cls(name, revision, kind, "shipped")
        if name and Path(name).is_dir():
            return cls(name, revision, kind, "folder")
        if Path(name).is_file():
            raise UserError(f"{kind} {name}: this is a file; give the folder that it lies in")
        if not HUB_ID.fullmatch(name):
            raise UserError(
                f"{kind} {name}: there is no such folder here, and it is not a name on the Hub (owner/name, no URL); mend it"
            )
        return cls(name, revision, kind, "hub")

    @property
    def hub_kind(self) -> str:
        """What the Hub calls it; there SAEs are models."""
        return "dataset" if self.kind == "dataset" else "model"

    def folder(self, patterns: Sequence[str] = hub.MODEL_FILES) -> Path:
        """The folder with the files that match, fetched where they are on the Hub and not in the cache yet."""
        if self.where == "hub":
            return hub.snapshot(self.name, self.revision, patterns, self.hub_kind)
        if self.where == "folder":
            return Path(self.name)
        if self.name not in MODELS:
            raise ValueError(f"{self.name} is made, not read: it has no folder")
        return MODELS[self.name]

    def file(self, name: str) -> Path:
        """One file, fetched alone where it is on the Hub; in a folder it may be missing."""
        return hub.file(self.name, name, self.revision) if self.where == "hub" else self.folder() / name

    def bytes_to_fetch(self, patterns: Sequence[str] = hub.MODEL_FILES) -> tuple[int, int]:
        """(bytes still to be fetched, bytes in all) of the files that match; nothing is fetched to tell.
        Raises HubError where the Hub is needed and does not answer, or keeps a model from this token."""
        if self.where != "hub":
            return 0, 0 if self.where == "shipped" and self.name not in MODELS else _bytes(self.folder(), patterns)
        with hub.explained(self.name, self.revision, self.hub_kind):
            if (cached := hub.cached_folder(self.name, self.revision, patterns, self.hub_kind)) is not None:
                return 0, _bytes(cached, patterns)
            hub.check_network(self.name)
            if self.kind == "model":
                hub.file_size(self.name, "config.json", self.revision)  # raises where this token may not have it
            return hub.to_fetch(self.name, self.revision, patterns, self.hub_kind)


def _bytes(folder: Path, patterns: Sequence[str]) -> int:
    files = {path for pattern in patterns for path in folder.glob(pattern)}
    return sum(path.stat().st_size for path in files if path.is_file())
