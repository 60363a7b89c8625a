"""What to run: a profile is data, read from the YAML file of its name beside this module and checked against `schema`.

The code never asks which profile it serves. A file whose name begins with `_` is no profile: several of them extend it."""

import dataclasses
import difflib
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from stetholib.errors import UserError
from stetholib.profiles.schema import Data, FineTune, Profile, Sae
from stetholib.store.files import repository

FOLDER = Path(__file__).parent
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
POWER = re.compile(r"([+-]?\d{1,20})(\.\d*)?[eE]([+-]?\d{1,4})")
OWN = re.compile(r".+\.py:[A-Za-z_]\w*")  # a function in a file of one's own
COMMITTED = ("seeds", "seeds-organism")  # folders of figures/ that are no profile's
LARGEST = 2**63 - 1
# of PyYAML beside its own, for a value that is not what its tag says, or a file that is nested without end
UNREADABLE = (yaml.YAMLError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ProfileError(UserError):
    """A user's mistake in a profile; its message is one line."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that is given twice, where it would let the last one win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """The mapping; raises YAMLError where a key stands twice in it."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1} gives the key {_shown(key.value)} again; keep one of them")
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def available() -> list[str]:
    """Names of the profiles that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def load(name: str, overrides: typing.Mapping[Any, Any] | None = None) -> Profile:
    """Read a profile by name, or from a YAML file's path; overrides: dotted keys, e.g. `{"selection.score_share": 0.05}`."""
    path = _place(name)
    values, where = _read(path), f"profile {path.stem}"
    if not isinstance(overrides or {}, typing.Mapping):
        raise ProfileError(f"overrides: expected a mapping of dotted keys to values, got {_shown(overrides)}")
    for dotted, value in (overrides or {}).items():
        _override(values, str(dotted), value)
    profile: Profile = _build(Profile, values, where)
    committed, elsewhere = profile.name.lower() in (*available(), *COMMITTED), path.resolve() != FOLDER / f"{profile.name}.yaml"
    if committed and elsewhere and repository().resolve() == FOLDER.parents[1]:
        told = f"{profile.name!r} would write over the figures that come with the repository; give another name"
        raise ProfileError(f"{where}.name: {told}")
    if profile.sae.release == "train" and profile.sae.k > profile.sae.d_sae:
        raise ProfileError(f"{where}.sae.k: {profile.sae.k} is above d_sae, {profile.sae.d_sae}; lower it")
    if profile.finetune.blocks and (profile.finetune.finetuned or profile.finetune.method != "full"):
        raise ProfileError(f"{where}.finetune.blocks: they learn in a full fine-tune made here; set method to full")
    return profile


def check_name(name: Any, where: str) -> str:
    """A name that may become a file's or a folder's; raises ProfileError for any other, a path among them."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ProfileError(
            f"{where}: {_shown(name)} is no name; give letters, digits, '.', '_' and '-', at most 64, a letter or digit first"
        )
    return name


def read(name: str) -> dict[str, Any]:
    """A profile's keys as its file gives them, unchecked; what it `extends` gives those that it leaves out."""
    return _read(_place(name))


def _place(name: str) -> Path:
    if not isinstance(name, str):
        raise ProfileError(f"profile: expected a shipped profile's name or a YAML file, got {_shown(name)}")
    own = name.endswith((".yaml", ".yml"))
    if not (Path(name).is_file() if own else name in available()):
        raise ProfileError(f"unknown profile {_shown(name)}{nearest(name, available())}; there are: {', '.join(available())}")
    return Path(name) if own else FOLDER / f"{name}.yaml"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UNREADABLE as error:
        raise ProfileError(f"{path.name} is not a readable YAML file: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"{path.name}: a profile is a mapping of keys, this file holds {type(values).__name__}")
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if base not in available() and not (path.parent == FOLDER and (FOLDER / f"{base}.yaml").is_file()):
        known = ", ".join(available())
        raise ProfileError(f"{path.name}: extends {_shown(base)}, which does not ship with the package; there are: {known}")
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
            raise ProfileError(f"overrides: unknown section {_shown(section)}{nearest(section, map(str, values))}")
        values = values[section]
    if last not in values:
        raise ProfileError(f"overrides: unknown key {_shown(dotted)}{nearest(last, map(str, values))}")
    values[last] = value


def _build(kind: type, values: dict[Any, Any], where: str) -> Any:
    """A checked dataclass from a mapping."""
    names = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := [name for name in values if name not in names]:
        near = nearest(unknown[0], names) if isinstance(unknown[0], str) else ""
        raise ProfileError(f"{where}: unknown key {_shown(unknown[0])}{near}")
    if missing := [name for name in names if name not in values]:
        raise ProfileError(f"{where}: missing key {missing[0]!r}; {kind.__name__} needs it")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], values[name], names[name].metadata, f"{where}.{name}") for name in names})


def _value(kind: Any, value: Any, limits: Any, where: str) -> Any:
    """One checked value; numbers are held to their range and strings to their choices."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ProfileError(f"{where}: expected a section of keys, got {_shown(value)}")
        return _build(kind, value, where)
    if isinstance(kind, types.UnionType):
        return None if value is None else _value(typing.get_args(kind)[0], value, limits, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise ProfileError(f"{where}: expected a list, got {_shown(value)}")
        return tuple(_value(typing.get_args(kind)[0], item, limits, where) for item in value)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict) or not value or not all(type(n) is int and 0 < n <= LARGEST for n in value.values()):
            raise ProfileError(f"{where}: expected a mapping of names to positive whole numbers, got {_shown(value)}")
        return {check_name(name, where): n for name, n in value.items()}
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProfileError(f"{where}: expected {kind.__name__}, got {_shown(value)}{_as_yaml(kind, value)}")
    if isinstance(value, str):
        return _text(value, limits, where)
    low, high = limits.get("low"), limits.get("high")
    if isinstance(value, int | float) and not isinstance(value, bool):
        too_large = value > (LARGEST if high is None else high) or (isinstance(value, float) and not math.isfinite(value))
        if too_large or (low is not None and value < low):
            allowed = f"between {low:g} and {high or LARGEST:g}" if high is not None or too_large else f"{low:g} or more"
            raise ProfileError(f"{where}: {_shown(value)} is out of range, it must be {allowed}")
    return value


def _text(value: str, limits: Any, where: str) -> str:
    """A checked string: one line, a name where it must be one, one of its choices where it has some."""
    if not value.isprintable():
        raise ProfileError(f"{where}: {_shown(value)} must be one line of text, without line breaks or control characters")
    if (choices := limits.get("choices")) and value not in choices and not (limits.get("own") and OWN.fullmatch(value)):
        raise ProfileError(f"{where}: {_shown(value)}{nearest(value, choices)}; it must be one of {', '.join(choices)}")
    return check_name(value, where) if limits.get("name") else value


def _as_yaml(kind: type, value: Any) -> str:
    """How to write a number that YAML reads as text, since it wants a point in it and a sign after the e."""
    found = POWER.fullmatch(value) if kind is float and isinstance(value, str) else None
    return f", which YAML reads as text; write {found[1]}{found[2] or '.0'}e{int(found[3]):+d}" if found else ""


def _shown(value: Any) -> str:
    """A value as a line of an error shows it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def signed(title: str, overrides: typing.Mapping[str, Any]) -> str:
    """What a run is called where its numbers are shown: its profile's title, and every override."""
    return ", ".join([title, *(f"{key.rpartition('.')[2].replace('_', ' ')} = {value}" for key, value in overrides.items())])


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """` (did you mean ...?)` where one of the names is close, else nothing."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
