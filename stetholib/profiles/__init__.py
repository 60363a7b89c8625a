"""What to run: a profile is data, read from the YAML file of its name beside this module and checked against `schema`.

The code never asks which profile it serves. A file whose name begins with `_` is no profile: several of them extend it."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from stetholib.errors import UserError
from stetholib.profiles.schema import Data, FineTune, Profile, Sae

FOLDER = Path(__file__).parent


class ProfileError(UserError):
    """A user's mistake in a profile; its message is one line."""


def available() -> list[str]:
    """Names of the profiles that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def load(name: str, overrides: dict[str, Any] | None = None) -> Profile:
    """Read a profile by name, or from a YAML file's path; overrides: dotted keys, e.g. `{"selection.score_share": 0.05}`."""
    values = read(name)
    for dotted, value in (overrides or {}).items():
        _override(values, dotted, value)
    return _build(Profile, values, where=Path(name).stem if name.endswith((".yaml", ".yml")) else name)


def read(name: str) -> dict[str, Any]:
    """A profile's keys as its file gives them, unchecked; what it `extends` gives those that it leaves out."""
    own = name.endswith((".yaml", ".yml"))
    if not (Path(name).is_file() if own else name in available()):
        raise ProfileError(f"unknown profile {name!r}{nearest(name, available())}; there are: {', '.join(available())}")
    return _read(Path(name) if own else FOLDER / f"{name}.yaml")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path.name} is not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"{path.name}: a profile is a mapping of keys, this file holds {type(values).__name__}")
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if base not in available() and not (path.parent == FOLDER and (FOLDER / f"{base}.yaml").is_file()):
        known = ", ".join(available())
        raise ProfileError(f"{path.name}: extends {base!r}, which does not ship with the package; there are: {known}")
    if missing := [name for name in ("name", "title") if name not in values]:
        raise ProfileError(
            f"{path.name}: missing key {missing[0]!r}; a profile that extends another has a name and title of its own"
        )
    whole = _read(FOLDER / f"{base}.yaml") | {"published_rung": False}  # which a profile says for itself and never inherits
    for section, given in values.items():
        inner = isinstance(given, dict) and isinstance(whole.get(section), dict)
        whole[section] = whole[section] | given if inner else given
    return whole


def _override(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one dotted key of a nested mapping; that the key exists is checked with all the others."""
    *sections, last = dotted.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            raise ProfileError(f"overrides: unknown section {section!r}{nearest(section, list(values))}")
        values = values[section]
    if last not in values:
        raise ProfileError(f"overrides: unknown key {dotted!r}{nearest(last, list(values))}")
    values[last] = value


def _build(kind: type, values: dict[str, Any], where: str) -> Any:
    """A checked dataclass from a mapping."""
    names = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := [name for name in values if name not in names]:
        raise ProfileError(f"profile {where}: unknown key {unknown[0]!r}{nearest(unknown[0], names)}")
    if missing := [name for name in names if name not in values]:
        raise ProfileError(f"profile {where}: missing key {missing[0]!r}; {kind.__name__} needs it")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], values[name], names[name].metadata, f"{where}.{name}") for name in names})


def _value(kind: Any, value: Any, limits: Any, where: str) -> Any:
    """One checked value; numbers are held to their range and strings to their choices."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ProfileError(f"profile {where}: expected a section of keys, got {value!r}")
        return _build(kind, value, where)
    if isinstance(kind, types.UnionType):
        return None if value is None else _value(typing.get_args(kind)[0], value, limits, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise ProfileError(f"profile {where}: expected a list, got {value!r}")
        return tuple(_value(typing.get_args(kind)[0], item, limits, where) for item in value)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict) or not all(isinstance(n, int) and n > 0 for n in value.values()):
            raise ProfileError(f"profile {where}: expected a mapping of names to positive whole numbers, got {value!r}")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProfileError(f"profile {where}: expected {kind.__name__}, got {value!r}")
    low, high, choices = limits.get("low"), limits.get("high"), limits.get("choices")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value != value or (low is not None and value < low) or (high is not None and value > high):
            allowed = f"between {low:g} and {high:g}" if high is not None else f"{low:g} or more"
            raise ProfileError(f"profile {where}: {value!r} is out of range, it must be {allowed}")
    if choices and value not in choices:
        raise ProfileError(f"profile {where}: {value!r}{nearest(value, choices)}; it must be one of {', '.join(choices)}")
    return value


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """` (did you mean ...?)` where one of the names is close, else nothing."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
