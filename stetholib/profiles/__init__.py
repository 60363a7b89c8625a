"""What to run: a profile is data, read from the YAML file of its name beside this module and checked on the way in.

A profile says which model, which SAEs, which texts, and how much of everything. The code is the same on every rung
of the ladder and never asks which profile it serves. Every field has a range or a list of choices; an unknown key,
a missing one and a value out of range are each refused with one line that says what, where and how to mend it.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stetholib.errors import UserError

FOLDER = Path(__file__).parent


class ProfileError(UserError):
    """A user's mistake in a profile; its message is one line."""


def key(low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A profile's key with its closed range, or its choices."""
    return field(metadata={"low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Model:
    """Which model. `base` is `mini` (shipped), `toy` (untrained), a folder, or a Hub id."""

    base: str = key()
    revision: str | None = key()
    dtype: str = key(choices=("float32", "bfloat16"))
    attention: str = key(choices=("eager", "sdpa"))


@dataclass(frozen=True)
class Data:
    """Which texts. `maths` and `general` are `generated`, data sets of the Hub, or folders laid out like them.

    Counts are problems a subject; the subjects are those of `test_problems`.
    """

    maths: str = key()
    maths_revision: str | None = key()
    general: str = key()
    general_config: str | None = key()
    general_revision: str | None = key()
    train_problems: int = key(1)
    validation_problems: int = key(1)
    test_problems: dict[str, int] = key()
    feature_problems: int = key(2)
    general_documents: int = key(2)
    max_tokens: int = key(16)

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects' names, in alphabetical order."""
        return tuple(sorted(self.test_problems))


@dataclass(frozen=True)
class FineTune:
    """Where the task vector comes from: a second checkpoint (`finetuned`), or a fine-tune made in step 01."""

    finetuned: str | None = key()
    finetuned_revision: str | None = key()
    method: str = key(choices=("full", "lora"))
    lora_rank: int = key(1)
    target: str = key(choices=("minerva", "plain"))
    epochs: float = key(0.0)
    learning_rate: float = key(0.0)
    batch_size: int = key(1)
    gradient_accumulation: int = key(1)
    gradient_checkpointing: bool = key()


@dataclass(frozen=True)
class Sae:
    """Which SAEs: trained on the spot (`release: train`), a SAELens release, or a folder; `sae_id` holds `{layer}`."""

    release: str = key()
    sae_id: str | None = key()
    revision: str | None = key()
    seed: int = key(0)
    d_sae: int = key(2)
    k: int = key(1)
    training_tokens: int = key(1)
    batch_size: int = key(1)
    learning_rate: float = key(0.0)


@dataclass(frozen=True)
class Features:
    """How features are heard: the specificity and the guard rails around it."""

    specificity: str = key(choices=("cohen_d", "firing_log_ratio", "auroc"))
    minimum_firing: float = key(0.0, 1.0)
    matched_minimum: int = key(1)
    memory_gib: float = key(0.001)


@dataclass(frozen=True)
class Projection:
    """The scalpel: its rank, as a share of the width, and the grid of ranks it is compared over."""

    rank_share: float = key(0.0, 1.0)
    rank_shares: tuple[float, ...] = key(0.0, 1.0)
    random_draws: int = key(2)
    gradient_problems: int = key(1)
    gradient_tokens: int = key(16)


@dataclass(frozen=True)
class Selection:
    """The stethoscope: the layer score, how many layers, and the budget of every control."""

    layer_share: float = key(0.0, 1.0)
    score_share: float = key(0.0, 1.0)
    score_minimum: int = key(1)
    permutations: int = key(1)
    resamples: int = key(1)
    loss_problems: int = key(1)
    random_sets: int = key(1)
    random_energy_sets: int = key(0)
    greedy: bool = key()
    small_step: float = key(0.0, 1.0)
    batch_tokens: int = key(1)


@dataclass(frozen=True)
class Evaluation:
    """How the test is asked. `task` is `minerva_math`, or the YAML file of a task of the harness of one's own."""

    task: str = key()
    num_fewshot: int = key(0, 4)
    max_new_tokens: int = key(1)
    batch_size: int = key(1)
    chat_template: bool = key()
    variants: tuple[str, ...] = key()
    general_documents: int = key(1)
    noise_problems: int = key(1)


@dataclass(frozen=True)
class Significance:
    """Margins and budgets of the statistics, fixed before any result."""

    level: float = key(0.0, 0.5)
    margin: float = key(0.0, 1.0)
    margin_subject: float = key(0.0, 1.0)
    bootstrap: int = key(100)


@dataclass(frozen=True)
class Profile:
    """Everything a run depends on, besides the code."""

    name: str = key()
    title: str = key()
    published_rung: bool = key()
    seed: int = key(0)
    threads: int = key(1)
    model: Model = key()
    data: Data = key()
    finetune: FineTune = key()
    sae: Sae = key()
    features: Features = key()
    projection: Projection = key()
    selection: Selection = key()
    evaluation: Evaluation = key()
    significance: Significance = key()

    @property
    def digest(self) -> str:
        """A short hash of every value: two profiles with one digest run the same experiment."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def available() -> list[str]:
    """Names of the profiles that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str, overrides: dict[str, Any] | None = None) -> Profile:
    """Read a profile by name, or from a YAML file's path, with single keys overridden.

    overrides: dotted keys and their values, e.g. `{"selection.score_share": 0.05}`.
    """
    values = read(name)
    for dotted, value in (overrides or {}).items():
        _override(values, dotted, value)
    return _build(Profile, values, where=Path(name).stem if name.endswith((".yaml", ".yml")) else name)


def read(name: str) -> dict[str, Any]:
    """A profile's keys as its file gives them, unchecked; what it `extends` gives those that it leaves out."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ProfileError(f"unknown profile {name!r}{nearest(name, available())}; there are: {', '.join(available())}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path.name} is not a readable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"{path.name}: a profile is a mapping of keys, this file holds {type(values).__name__}")
    if "extends" not in values:
        return values
    if values["extends"] not in available():
        known = ", ".join(available())
        raise ProfileError(
            f"{path.name}: extends {values['extends']!r}, which does not ship with the package; there are: {known}"
        )
    if missing := [name for name in ("name", "title") if name not in values]:
        raise ProfileError(
            f"{path.name}: missing key {missing[0]!r}; a profile that extends another has a name and title of its own"
        )
    whole = read(values.pop("extends")) | {"published_rung": False}
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
    for name in values:
        if name not in names:
            raise ProfileError(f"profile {where}: unknown key {name!r}{nearest(name, list(names))}")
    missing = [name for name in names if name not in values]
    if missing:
        raise ProfileError(f"profile {where}: missing key {missing[0]!r}; {kind.__name__} needs it")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], values[name], names[name].metadata, f"{where}.{name}") for name in names})


def _value(kind: Any, value: Any, limits: Any, where: str) -> Any:
    """One checked value; numbers are held to their range and strings to their choices."""
    if dataclasses.is_dataclass(kind):
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
            raise ProfileError(f"profile {where}: {value!r} is out of range, it must be {_range(low, high)}")
    if choices and value not in choices:
        raise ProfileError(f"profile {where}: {value!r}{nearest(value, choices)}; it must be one of {', '.join(choices)}")
    return value


def _range(low: float | None, high: float | None) -> str:
    return f"between {low:g} and {high:g}" if high is not None else f"{low:g} or more"


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """` (did you mean ...?)` where one of the names is close, else nothing."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
