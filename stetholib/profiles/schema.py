"""Every key of a profile, with its range or its choices."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

Bound = float | None


def key(
    low: Bound = None, high: Bound = None, choices: tuple[str, ...] = (), name: bool = False, own: bool = False, later: Any = ...
) -> Any:
    """A profile's key with its closed range, or its choices; name: whether it is one, which files and folders may bear; own: whether
    a function in a file of one's own, `mine.py:function`, may take a choice's place; later: of a key that came later, what was
    done before, so that a profile that asks as it always did keeps its hash."""
    return field(metadata={"low": low, "high": high, "choices": choices, "name": name, "own": own, "later": later})


@dataclass(frozen=True)
class Model:
    """Which model. `base` is `mini` (shipped), `toy` (untrained), a folder, or a Hub id; `notice` is what its licence, or its
    weights' history, wants to be said wherever its numbers are shown."""

    base: str = key()
    revision: str | None = key()
    dtype: str = key(choices=("float32", "bfloat16"))
    attention: str = key(choices=("eager", "sdpa"))
    notice: str | None = key()


@dataclass(frozen=True)
class Data:
    """Which texts. `maths` and `general` are `generated`, data sets of the Hub, or folders laid out like them; `general` may be
    `installed` too, the prose in the documentation of installed packages, or `installed_formal`, its code and formulas. Counts are
    problems a subject; the subjects are those of `test_problems`."""

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
    """Where the task vector comes from: a second checkpoint (`finetuned`), or a fine-tune made in step 01. Where `blocks` are named,
    these alone learn mathematics; the others learn a second task apart from it, general text told twice, and both changes are
    added, so that it is known which layers of the vector are mathematics."""

    finetuned: str | None = key()
    finetuned_revision: str | None = key()
    method: str = key(choices=("full", "lora"))
    lora_rank: int = key(1)
    lora_start: str = key(choices=("kaiming", "gaussian", "pissa", "olora", "eva"), later="kaiming")
    target: str = key(choices=("minerva", "plain"))
    epochs: float = key(0.0)
    learning_rate: float = key(0.0)
    batch_size: int = key(1)
    gradient_accumulation: int = key(1)
    gradient_checkpointing: bool = key()
    blocks: tuple[int, ...] | None = key(0, later=None)
    aside_documents: int = key(1, later=1)
    aside_learning_rate: float = key(0.0, later=0.0)

    @property
    def lora(self) -> str:
        """The LoRA that is made here, as tables call it; empty where none is."""
        start = "" if self.lora_start == "kaiming" else f", started by {self.lora_start}"
        return "" if self.finetuned or self.method != "lora" else f"LoRA of rank {self.lora_rank}{start}"


@dataclass(frozen=True)
class Sae:
    """Which SAEs: trained on the spot (`release: train`), a SAELens release, or a folder; `sae_id` holds `{layer}`. A decoder that
    stays frozen at random is a control: only the encoder learns (arXiv 2602.14111)."""

    release: str = key()
    sae_id: str | None = key()
    revision: str | None = key()
    seed: int = key(0)
    d_sae: int = key(2)
    k: int = key(1)
    training_tokens: int = key(1)
    batch_size: int = key(1)
    learning_rate: float = key(0.0)
    warm_up: float = key(0.0, 1.0, later=0.0)
    frozen_decoder: bool = key(later=False)


@dataclass(frozen=True)
class Features:
    """How features are heard: the specificity, which may be a function of one's own (`mine.py:function`, which is code that will
    run), and the guard rails around it."""

    specificity: str = key(choices=("cohen_d", "firing_log_ratio", "auroc"), own=True)
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
    greedy: bool = key()
    thorough: bool = key(later=False)
    small_step: float = key(0.0, 1.0)
    batch_tokens: int = key(1)


@dataclass(frozen=True)
class OwnEdit:
    """An edit of one's own, which stands as `own` beside the others from step 04 on: which vector, into which layers (null: the
    stethoscope's), how much of it. With the values that profiles ship with there is none."""

    layers: tuple[int, ...] | None = key(0, later=None)
    alpha: float = key(-10.0, 10.0, later=1.0)
    vector: str = key(choices=("raw", "projected", "projected_rescaled", "raw_shrunk"), later="raw")

    @property
    def wanted(self) -> bool:
        """Whether anything was asked for."""
        return self != OwnEdit(None, 1.0, "raw")


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

    name: str = key(name=True)
    title: str = key()
    published_rung: bool = key()
    seed: int = key(0)
    threads: int = key(1, 1024)
    model: Model = key()
    data: Data = key()
    finetune: FineTune = key()
    sae: Sae = key()
    features: Features = key()
    projection: Projection = key()
    selection: Selection = key()
    edit: OwnEdit = key()
    evaluation: Evaluation = key()
    significance: Significance = key()

    @property
    def digest(self) -> str:
        """A short hash of every value but what is said of the weights: two profiles with one digest run the same experiment."""
        values = dataclasses.asdict(self)
        del values["model"]["notice"]
        sections = {name: part for name, part in vars(self).items() if dataclasses.is_dataclass(part)}
        for section, part in sections.items():
            for one in dataclasses.fields(part):
                if getattr(part, one.name) == one.metadata["later"]:
                    del values[section][one.name]
        values = {section: value for section, value in values.items() if value != {}}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
