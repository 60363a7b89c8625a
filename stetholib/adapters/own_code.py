"""A specificity of one's own: a function in a Python file, which runs as the user and is read only where a profile names it."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stetholib.errors import UserError
from stetholib.models.sums import DRAWN, Moments
from stetholib.store.files import file_hash


def file_of(kind: str) -> Path | None:
    """The file of a specificity that is `mine.py:function`, seen from the folder that one works in or from the one above it, as
    notebooks are; None for a definition that ships. Raises UserError where there is none."""
    name, colon, _ = kind.rpartition(":")
    if not colon:
        return None
    if not (found := [path for path in (Path(name), Path("..") / name) if path.is_file()]):
        raise UserError(f"features.specificity: there is no file {name} here; give its path, as in mine.py:function")
    return found[0]


def specificity(kind: str) -> str:
    """The definition's name, one of one's own made known under its function, its file's name and its hash, so that what stands on
    it is made anew when the file changes. Raises UserError for a file or a function that cannot be used."""
    path = file_of(kind)
    return kind if path is None else _loaded(path, kind.rpartition(":")[2], file_hash(path)[:12])


@cache
def _loaded(path: Path, function: str, known: str) -> str:
    name, module = f"{path.name}:{function} {known}", _module(path)
    own = getattr(module, function, None)
    if not callable(own):
        raise UserError(f"features.specificity: {path.name} defines no function {function}")

    def checked(m: Moments) -> torch.Tensor:
        try:
            found = own(m)
        except Exception as error:  # whatever a user's function raises
            raise UserError(f"features.specificity: {path.name}:{function} failed: {type(error).__name__}: {error}") from None
        if not isinstance(found, torch.Tensor) or found.shape != m.mean_maths.shape or not bool(found.isfinite().all()):
            wanted = f"finite numbers of shape {tuple(m.mean_maths.shape)}"
            raise UserError(
                f"features.specificity: {path.name}:{function} must return a tensor of {wanted}, one a draw and feature"
            )
        return found

    DRAWN[name] = checked
    return name


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"features.specificity: {path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is wrong with a user's file
        raise UserError(f"features.specificity: {path.name} does not run: {type(error).__name__}: {error}") from None
    return module
