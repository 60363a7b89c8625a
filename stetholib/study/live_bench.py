"""The live bench of step 05: any layers, any scale, raw or projected, measured at once on a few problems.

Losses are of validation problems, answers of test problems, both of a fixed few of each subject. What was measured is remembered
by this process and never written: the tables of the run are those of all problems.
"""

import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cached_property
from io import StringIO
from math import ceil
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from statsmodels.stats.proportion import proportion_confint

from stetholib.adapters import harness
from stetholib.data import corpora
from stetholib.data.prompts import problem_id
from stetholib.errors import UserError
from stetholib.minerva_math import Variant
from stetholib.models.answering import Answer, answer_some
from stetholib.models.streams import Batch, DocumentLosses, document_losses
from stetholib.significance import metrics_of
from stetholib.statistics import score_interval
from stetholib.store.progress import libraries_quiet
from stetholib.store.values import Input
from stetholib.study.minerva_math import MinervaMath

T = TypeVar("T")
LOSS_PROBLEMS, ANSWERED = 245, 105  # a second, and three, on the miniature and two cores
Setting = Variant  # which vector, into which layers, at which scale; its name does not count


def balanced(subjects: list[str], wanted: int) -> np.ndarray:
    """Which problems make a fixed few, as a mask: the first ones of each subject, as many of each, about `wanted` in all."""
    each = max(1, wanted // len(set(subjects)))
    return pd.Series(subjects).groupby(subjects).cumcount().to_numpy() < each


class LiveBench:
    """Losses and answers of any setting, each measured once. `title`: whose numbers these are, overrides included; `layers`: the
    model's; `seconds`: how long the last losses, answers and verdicts took."""

    def __init__(self, step: MinervaMath) -> None:
        """step: 05, whose variants are beside every setting, and whose vectors are injected."""
        self._step, self._losses, self._world = step, step._stethoscope._losses, step._world
        self.title, self.layers = self._world.whose, range(self._world.layers)
        self._known: dict[tuple[str, Variant], Any] = {}
        self.seconds: dict[str, float] = {}

    @property
    def variants(self) -> dict[str, Variant]:
        """Settings to begin with: the variants of step 05 that inject the raw vector, or the projected one."""
        return {name: one for name, one in self._step.variants().items() if one.vector in ("raw", "projected")}

    def _checked(self, setting: Setting) -> Variant:
        """The setting as it is remembered. Raises UserError where there is no such edit."""
        blind = sorted(set(setting.layers) - set(self._step._scalpel.layers)) if setting.vector == "projected" else []
        if blind:
            raise UserError(
                f"live bench: layer {blind[0]} has no SAE that is believed, so the scalpel has no directions there; leave the layer "
                "out, or take the raw vector"
            )
        empty = not setting.layers or setting.alpha == 0
        return Variant("live") if empty else replace(setting, name="live", layers=tuple(sorted(setting.layers)))

    def knows(self, what: str, setting: Setting) -> bool:
        """Whether `losses` or `verdicts` of a setting are measured already; of one that is refused, nothing is."""
        try:
            return (what, self._checked(setting)) in self._known
        except UserError:
            return False

    def _once(self, what: str, setting: Variant, measure: Callable[[], T]) -> T:
        if (what, setting) not in self._known:
            started = time.monotonic()
            self._known[what, setting] = measure()
            self.seconds[what] = time.monotonic() - started
        return self._known[what, setting]

    @cached_property
    def _few(self) -> np.ndarray:
        return balanced(self._losses.subjects, LOSS_PROBLEMS)

    @cached_property
    def _pool(self) -> Input[list[Batch]]:
        return self._losses.pool_where(self._few)

    @property
    def loss_problems(self) -> int:
        """How many validation problems the losses are of."""
        return int(self._few.sum())

    def losses(self, setting: Setting) -> DocumentLosses:
        """Losses of the few validation problems under a setting, problem by problem."""
        given = self._checked(setting)

        def measured() -> DocumentLosses:
            with self._step.edited_model(given).opened() as model, self._pool.opened() as batches:
                return document_losses(model.model, batches)

        return self._once("losses", given, measured)

    def loss_table(self, setting: Setting, live: bool = True) -> pd.DataFrame:
        """Solution and closing loss in nats a token of the whole solution: a row each for base, setting and full. live: measure the
        setting now; False: read all three from what step 04 has measured, which holds the raw vector only."""
        full, rows = Variant("full", layers=tuple(self.layers)), {}
        for name, one in (("base", Variant("base")), ("setting", setting), ("full", full)):
            if live and name == "setting":
                found, where = self.losses(one), None
            else:
                found, where = self._losses.of(one.layers, one.alpha), self._few
            rows[name] = {part: found.mean(part, where) for part in ("solution", "closing")}
        return pd.DataFrame.from_dict(rows, orient="index")

    @cached_property
    def _asked(self) -> list[corpora.Row]:
        """The few test problems that are answered."""
        rows = self._step._problems
        return [row for row, few in zip(rows, balanced([row["subject"] for row in rows], ANSWERED), strict=True) if few]

    @cached_property
    def _tasks(self) -> Input[harness.Tasks]:
        return self._world.tasks_on(self._asked)

    @property
    def asked(self) -> list[str]:
        """The ids of the test problems that are answered."""
        return list(dict.fromkeys(problem_id(row["subject"], row["problem"]) for row in self._asked))

    def answers(self, setting: Setting) -> list[Answer]:
        """The answers of the few test problems under a setting."""
        given, prompts = self._checked(setting), self._step._asked.prompts

        def measured() -> list[Answer]:
            with self._step.edited_model(given).opened() as model:
                return answer_some(model, {name: prompts[name] for name in self.asked}, self._step._limits())

        return self._once("answers", given, measured)

    def verdicts(self, setting: Setting) -> pd.DataFrame:
        """The harness's verdicts on those answers by problem id: columns extracted, exact_match, math_verify."""
        answers = self.answers(setting)
        return self._once("verdicts", self._checked(setting), lambda: _by_problem(self._judged(answers)))

    def _judged(self, answers: list[Answer]) -> pd.DataFrame:
        """The harness's verdicts, without the bars that it draws as widgets and on stderr."""
        with libraries_quiet(), redirect_stderr(StringIO()), self._tasks.opened() as tasks:
            return harness.verdicts(tasks, answers)

    def _recorded(self, name: str) -> pd.DataFrame:
        return _by_problem(self._step.records([name]))

    @cached_property
    def _beside(self) -> dict[str, pd.DataFrame]:
        """The records that every setting is shown beside."""
        return {name: self._recorded(name) for name in ("base", "full")}

    def accuracy_table(self, setting: Setting | str) -> pd.DataFrame:
        """Accuracies over all subjects with Wilson's 95 % intervals, and the gain over the base with Tango's: columns metric,
        variant (base, setting, full), n, accuracy, low, high, gain, gain_low, gain_high. setting: of the few problems, answered
        now, the others from the records; the name of a variant: all three from the records, of all problems."""
        if isinstance(setting, str):
            found = self._beside | {"setting": self._recorded(setting)}
        else:
            few = {name: records.loc[self.asked] for name, records in self._beside.items()}
            found = few | {"setting": self.verdicts(setting).loc[self.asked]}
        rows = [
            dict(metric=metric, variant=name) | _compared(found["base"][metric], found[name][metric])
            for metric in metrics_of(found["base"])
            for name in ("base", "setting", "full")
        ]
        return pd.DataFrame(rows)

    @cached_property
    def _paces(self) -> tuple[float, float]:
        """Seconds a token that is read in a batch, and seconds a step of all answers that are under way; two passes measure them."""
        with self._pool.opened() as batches:
            batch, model = batches[0], self._world.base.model
        ids, slots = batch.input_ids, min(len(self.asked), self._step._limits().slots)
        with torch.no_grad():
            times = [time.monotonic()]
            for tokens in (ids, ids[:1, :1].repeat(slots, 1)):
                model(input_ids=tokens, use_cache=False, logits_to_keep=1)
                times.append(time.monotonic())
        return (times[1] - times[0]) / ids.numel(), times[2] - times[1]

    def expected(self, what: str) -> float:
        """About how many seconds `losses` or `verdicts` of another setting take: what the last ones took, or else a guess from two
        passes of the model and the lengths of the base's answers."""
        if what in self.seconds:
            return self.seconds[what] + (self.seconds["answers"] if what == "verdicts" else 0)
        reading, step = self._paces
        if what == "losses":
            with self._pool.opened() as batches:
                return reading * sum(batch.input_ids.numel() for batch in batches)
        known, limits = self._step.answers(self.variants["base"]), self._step._limits()
        base = [known[name] for name in self.asked]
        self._judged(base[:1])  # which takes seconds the first time, and is wanted soon
        rounds, longest = ceil(len(base) / limits.slots), max(one.completion_tokens for one in base)
        return reading * sum(one.prompt_tokens for one in base) + step * longest * rounds


def _by_problem(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows by problem id; of a problem that stands twice in the test, the first."""
    return rows.drop_duplicates("problem_id").set_index("problem_id")


def _compared(base: pd.Series, other: pd.Series) -> dict[str, Any]:
    """An accuracy with its interval, and its paired difference to the base's."""
    before, after = base.to_numpy(int), other.loc[base.index].to_numpy(int)
    n, gained, lost = len(after), int((after > before).sum()), int((after < before).sum())
    low, high = proportion_confint(after.sum(), n, method="wilson")
    ends = score_interval(gained, lost, n, 0.05)
    found = dict(n=n, accuracy=after.mean(), low=low, high=high, gain=(gained - lost) / n)
    return found | dict(gain_low=ends[0], gain_high=ends[1])
