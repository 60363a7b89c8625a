"""Step 05 wired to a world: variants, their answers and records. The test split is first read here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from stetholib import layer_sets, minerva_math
from stetholib.adapters import harness
from stetholib.claims import NUMBER_THEORY
from stetholib.data import corpora
from stetholib.data.prompts import problem_id
from stetholib.editing import Edit, TaskVector, edited
from stetholib.minerva_math import Variant
from stetholib.models.answering import Answer, Limits, answer_all, answer_some, planned
from stetholib.models.loading import LanguageModel
from stetholib.models.streams import text_loss
from stetholib.store.code import code_of
from stetholib.store.files import held
from stetholib.store.progress import progress
from stetholib.store.values import Input, hashed
from stetholib.study.layer_selection import LayerSelection, own_edit
from stetholib.study.subspace_projection import SubspaceProjection
from stetholib.study.task_vectors import TaskVectors
from stetholib.study.world import Step, World


class MinervaMath(Step):
    """Everything that the test split says."""

    def __init__(self, world: World, task_vectors: TaskVectors, scalpel: SubspaceProjection, stethoscope: LayerSelection) -> None:
        """task_vectors: theta_1; scalpel: the vectors that edits inject; stethoscope: into which layers."""
        super().__init__(world)
        self._vectors, self._scalpel, self._stethoscope = task_vectors, scalpel, stethoscope

    @property
    def headline_subject(self) -> str:
        """The subject of the paper's headline, or the first one where a data set of one's own lacks it."""
        subjects = self._profile.data.subjects
        return NUMBER_THEORY if NUMBER_THEORY in subjects else subjects[0]

    @cached_property
    def _variants(self) -> dict[str, Variant]:
        chosen = {name: layers for name, (_, layers) in self._stethoscope.chosen().items()}
        seed = self._world.seed("random variants")
        drawn = layer_sets.sampled_sets(self._scalpel.layers, self._stethoscope.selected_count, 3, seed)
        wanted, shrunk = self._profile.evaluation.variants, self._stethoscope.shrunk
        found = minerva_math.variants(self._world.layers, self._scalpel.layers, chosen, drawn, wanted, shrunk)
        return found | ({own.name: own} if (own := own_edit(self._stethoscope)) else {})

    def variants(self) -> dict[str, Variant]:
        """The edited models that answer the test, in the profile's order."""
        return dict(self._variants)

    def edited_model(self, variant: Variant) -> Input[LanguageModel]:
        """The model of a variant as an input of stages; the base model is itself again afterwards."""
        if variant.vector == "finetuned":
            return self._world.other(self._vectors.identity, lambda: self._vectors.folder)
        if not variant.layers:
            return self._world.model
        vector = self._scalpel.vector_of(variant.vector)
        made_of = [self._world.model, vector, variant.layers, variant.alpha, code_of(edited)]
        return Input(hashed(made_of), lambda: self._edited(vector, variant))

    @contextmanager
    def _edited(self, vector: Input[TaskVector], variant: Variant) -> Iterator[LanguageModel]:
        with vector.opened() as tau, edited(self._world.base.model, Edit(tau, variant.layers, alpha=variant.alpha)):
            yield self._world.base

    @cached_property
    def _problems(self) -> list[corpora.Row]:
        """The test split. First read in step 05."""
        return self._world.problems("test")

    def families(self) -> dict[str, str] | None:
        """Each test problem's family, by problem id; None where the rows have none, as MATH's."""
        rows = self._problems
        known = all("family" in row for row in rows)
        return {problem_id(row["subject"], row["problem"]): row["family"] for row in rows} if known else None

    @cached_property
    def _tasks(self) -> Input[harness.Tasks]:
        return self._world.tasks_on(self._problems)

    @cached_property
    def _asked(self) -> harness.Asked:
        return self._world.asked(self._tasks)

    @cached_property
    def _chunks(self) -> list[list[str]]:
        limit = self._profile.evaluation.max_new_tokens
        return self._store.made(planned, self._world.model, self._asked.prompts, limit).value

    def _limits(self, slots: int | None = None) -> Limits:
        p = self._profile.evaluation
        return Limits(p.max_new_tokens, slots or p.batch_size, self._asked.stops)

    @cached_property
    def _plan(self) -> str:
        """Who the prompts are, each in the chunk that it is answered in: hashed once for all variants."""
        return hashed([[(name, self._asked.prompts[name]) for name in chunk] for chunk in self._chunks])

    def answers(self, variant: Variant, rank: int = 0, world: int = 1) -> dict[str, Answer]:
        """Every answer of a variant, by problem id; each was asked once and is on disk. rank, world: answer only every `world`-th
        chunk, beginning with the `rank`-th, into a file of this rank's own."""
        part = f".{rank}" if rank else ""
        ledger = self._store.ledger("answers", answer_all, *self._answering(variant), part=part, parts="*")
        known = {row["problem_id"]: Answer(**row) for row in ledger.rows}
        missing = [chunk for chunk in self._chunks[rank::world] if not known.keys() >= set(chunk)]
        if not missing:
            return known

        def keep(chunk: list[Answer]) -> None:
            new = [answer for answer in chunk if answer.problem_id not in known]
            ledger.append([asdict(answer) for answer in new])
            known.update({answer.problem_id: answer for answer in new})

        busy = f"{ledger.path.name} is being written by another process; end it, or wait for it"
        with held(ledger.path.with_suffix(".lock"), busy), self.edited_model(variant).opened() as model:
            watched = progress(missing, f"05 {variant.name}")
            answer_all(model, self._asked.prompts, watched, self._limits(), keep)
        return known

    def _answering(self, variant: Variant) -> tuple[Any, ...]:
        """What the answers of a variant depend on."""
        return self.edited_model(variant), self._plan, self._limits()

    def _records(self, variant: Variant) -> pd.DataFrame:
        answers = Input.of(self._store.key(answer_all, *self._answering(variant)), lambda: self.answers(variant))
        return self._store.made(harness.records, variant.name, self._problems, answers, self._tasks).value

    def records(self, names: Sequence[str] | None = None) -> pd.DataFrame:
        """Scored records of some variants, or of all: one row an answer."""
        wanted = self._variants if names is None else names
        return pd.concat([self._records(self._variants[name]) for name in wanted], ignore_index=True)

    def general_loss(self, variant: Variant) -> float:
        """Loss on held-out general text, nats a token."""
        p, documents = self._profile, self._world.general("test", "evaluation.general_documents")
        sizes = (p.data.max_tokens, p.selection.batch_tokens)
        return self._store.made(text_loss, self.edited_model(variant), documents, *sizes).value

    def table(self) -> pd.DataFrame:
        """Step 05's table."""
        losses = {name: self.general_loss(variant) for name, variant in self._variants.items()}
        return minerva_math.measure(self.records(), losses)

    def token_limits(self, names: Sequence[str]) -> pd.DataFrame:
        """Accuracy of some variants had the token limit been lower, from the answers on record."""
        inputs = (self.records(names), self._world.model, self._profile.evaluation.max_new_tokens)
        return self._store.made(minerva_math.token_limits, *inputs).value

    def _some(self) -> dict[str, str]:
        """Prompts of the few problems that repetitions are measured on."""
        return dict(sorted(self._asked.prompts.items())[: self._profile.evaluation.noise_problems])

    def checks(self) -> dict[str, Any]:
        """What C8 and C9 rest on: a repetition compared bit by bit, and what an edited model costs to run."""
        inputs = (self._world.model, self._vectors.tau, self._variants["stethoscope"].layers, self._some(), self._limits())
        found = self._store.made(minerva_math.repetition, *inputs).value
        again, scores = self._stethoscope.plain_scores("corpus"), self._stethoscope.scores("corpus").score.tolist()
        return found | dict(identical_scores=np.array_equal(again, scores, equal_nan=True))

    def noise(self) -> pd.DataFrame:
        """The noise floor: how many of the base model's verdicts flip with another batch size, and in bfloat16. The latter only
        where the profile computes in float32."""
        p, ours, world, rows = self._profile.evaluation, self._profile.model.dtype, self._world, []
        kept = self._records(self._variants["base"])
        changes = [("batch size", ours, max(1, p.batch_size // 8)), ("bfloat16", "bfloat16", p.batch_size)]
        for what, dtype, batch_size in changes if ours != "bfloat16" else changes[:1]:
            other = world.other(world.base_key, lambda: world.base_folder, dtype)
            found = self._store.made(answer_some, other, self._some(), self._limits(batch_size))
            rows.append(minerva_math.flips(kept, self._store.made(harness.verdicts, self._tasks, found).value, what))
        return pd.DataFrame(rows)


def example(step: MinervaMath) -> dict[str, str]:
    """One problem as it is asked, its gold solution, and the completions of the base and with the whole vector."""
    found, answers = minerva_math.example_pair(step.records(["base", "full"]))
    gold = {problem_id(row["subject"], row["problem"]): row["solution"] for row in step._world.problems("test")}
    asked = {"What is asked": step._asked.prompts[found], "The gold solution": gold[found]}
    return asked | {f"The answer of {name}": answers[key] for key, name in (("base", "the base"), ("full", "the whole vector"))}
