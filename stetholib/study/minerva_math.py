"""Wiring of step 05: variants, their answers and records. The test split is first read here."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock

from stetholib import (
    editing,
    layer_selection,
    minerva_math,
    models,
    profiles,
    subspace_projection,
    task_vectors,
    texts,
)
from stetholib.editing import Edit, edited
from stetholib.models import LanguageModel
from stetholib.study.layer_selection import SelectionSteps
from stetholib.study.stages import library_versions, wiring
from stetholib.study.subspace_projection import ProjectionSteps
from stetholib.workspace import (
    Artefact,
    append_json,
    atomic,
    digest_of,
    file_hash,
    held,
    json_lines,
    progress,
    read_json_lines,
    source_hash,
)

NEEDED = ("base", "full", "scalpel", "stethoscope", "stethoscope_matched", "random_1")


@dataclass(frozen=True)
class Variant:
    """An edited model that answers the test: which vector, into which layers. `finetuned` loads theta_1 itself."""

    name: str
    vector: str = "raw"
    layers: tuple[int, ...] = ()
    alpha: float = 1.0


class AnswerSteps(SelectionSteps):
    """Adds everything that the test split says."""

    def variants(self) -> dict[str, Variant]:
        """The edited models that answer the test, in the profile's order."""
        every, chosen = tuple(range(self.layers)), self.chosen_layers()
        drawn = layer_selection.sampled_sets(self.layers, self.selected_count, 3, self._seed("random variants"))
        known = [
            Variant("base"),
            Variant("finetuned", "finetuned"),
            Variant("full", "raw", every),
            Variant("scalpel", "projected", every),
            Variant("scalpel_rescaled", "projected_rescaled", every),
            Variant("raw_shrunk", "raw_shrunk", every),
            *(
                Variant(name, "raw", chosen[name][1])
                for name in ("stethoscope", "stethoscope_matched", "least_specific", "largest_norm")
            ),
            *(Variant(f"random_{i + 1}", "raw", layers) for i, layers in enumerate(drawn)),
        ]
        by_name = {variant.name: variant for variant in known}
        for name in self.profile.evaluation.variants:
            if name not in by_name:
                raise profiles.ProfileError(
                    f"profile {self.profile.name}.evaluation.variants: unknown variant {name!r}; there are: {', '.join(by_name)}"
                )
        if absent := [name for name in NEEDED if name not in self.profile.evaluation.variants]:
            raise profiles.ProfileError(
                f"profile {self.profile.name}.evaluation.variants: {absent[0]} is not there; the ledger of claims needs {', '.join(NEEDED)}"
            )
        return {name: by_name[name] for name in self.profile.evaluation.variants}

    def _variant_key(self, variant: Variant) -> str:
        """Identity of an edited model: two variants with one key are the same model."""
        if not variant.layers and variant.vector != "finetuned":
            return digest_of(self.base_key, "base")
        made = [self.finetuned().key, variant.vector, variant.layers, variant.alpha]
        if variant.vector not in ("raw", "finetuned"):
            p = self.profile
            made += [
                self._heard_key,
                asdict(p.projection),
                source_hash([subspace_projection, *wiring(ProjectionSteps)]),
            ]
        return digest_of(self.base_key, made, source_hash([editing, task_vectors]))

    @contextmanager
    def edited_model(self, variant: Variant) -> Any:
        """The model of a variant; the base model is itself again afterwards."""
        if variant.vector == "finetuned":
            with self.instead_of_base(self.finetuned().folder) as model:
                yield model
            return
        edit = Edit(self.vector(variant.vector) if variant.layers else self.task_vector, variant.layers, alpha=variant.alpha)
        with edited(self.base.model, edit):
            yield self.base

    @cached_property
    def test_problems(self) -> list[texts.Row]:
        """The test split. First read in step 05."""
        return self.problems("test")

    @cached_property
    def _asked_key(self) -> str:
        """Identity of the test: every row of every problem, and the task that asks and scores it."""
        task = self.profile.evaluation.task
        said = [(file.name, file_hash(file)) for file in minerva_math.task_files(task)] or task
        return digest_of([dict(row) for row in self.test_problems], said)

    @property
    def _tasks(self) -> Any:
        """The harness's tasks on the local test problems."""
        return self._asked[0]

    @cached_property
    def _asked(self) -> tuple[Any, dict[str, str]]:
        """Tasks and prompts, made under one lock: the harness keeps what it reads in a folder that another process clears."""
        p = self.profile.evaluation
        key = digest_of(self._asked_key, p.num_fewshot, version("lm-eval"))
        folder = self.workspace.runs / "tasks" / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            names = minerva_math.write_tasks(folder, self.test_problems, p.num_fewshot, p.task)
            loaded = minerva_math.load_tasks(folder, names, p.task)
            prompts = minerva_math.prompts_of(loaded, self.base.tokenizer if p.chat_template else None)
        minerva_math.check_context(self.base, prompts, p.max_new_tokens)
        return loaded, prompts

    @property
    def _prompts(self) -> dict[str, str]:
        return self._asked[1]

    @cached_property
    def _batches(self) -> list[list[str]]:
        return minerva_math.plan(self.base.tokenizer, self._prompts, self.profile.evaluation.batch_size)

    @cached_property
    def _plan_key(self) -> str:
        """Identity of every prompt and of the batches that they are answered in."""
        return digest_of([[(name, self._prompts[name]) for name in batch] for batch in self._batches])

    def answers(self, variant: Variant, rank: int = 0, world: int = 1) -> dict[str, minerva_math.Answer]:
        """Every answer of a variant, by problem id; each was asked once and is on disk.

        rank, world: answer only every `world`-th batch, beginning with the `rank`-th, into a file of this rank's own.
        """
        p = self.profile.evaluation
        asked = {
            name: value for name, value in asdict(p).items() if name not in ("variants", "general_documents", "noise_problems")
        }
        params = [asked, self._stops, self.device, self.profile.threads]
        code = source_hash([minerva_math, models])
        key = digest_of(self._variant_key(variant), params, self._plan_key, library_versions(), code)
        files = sorted(self.workspace.store.glob(f"answers-{key}*.jsonl"))
        known = {row["problem_id"]: minerva_math.Answer(**row) for path in files for row in read_json_lines(path)}
        missing = [batch for batch in self._batches[rank::world] if not known.keys() >= set(batch)]
        if missing:
            path = self.workspace.store / f"answers-{key}{f'.{rank}' if rank else ''}.jsonl"

            def keep(batch: list[minerva_math.Answer]) -> None:
                new = [answer for answer in batch if answer.problem_id not in known]
                append_json(path, [asdict(answer) for answer in new])
                known.update({answer.problem_id: answer for answer in new})

            busy = f"{path.name} is being written by another process; end it, or wait for it"
            with held(path.with_suffix(".lock"), busy), self.edited_model(variant) as model:
                watched = progress(missing, f"05 {variant.name}")
                minerva_math.answer_all(model, self._prompts, watched, p.max_new_tokens, keep, self._stops)
        return known

    @property
    def _stops(self) -> tuple[str, ...]:
        return minerva_math.stops_of(self._tasks)

    def _answered(self, model: LanguageModel, batch_size: int) -> list[minerva_math.Answer]:
        """Answers to the few problems that repetitions are measured on; not kept."""
        p, found = self.profile.evaluation, []
        some = dict(sorted(self._prompts.items())[: p.noise_problems])
        batches = minerva_math.plan(model.tokenizer, some, batch_size)
        minerva_math.answer_all(model, some, batches, p.max_new_tokens, found.extend, self._stops)
        return found

    def records(self, variant: Variant) -> Artefact:
        """Scored records of one variant; also written as the contract's JSON lines."""
        upstream = [self._variant_key(variant), self._asked_key]
        make = partial(self._make_records, variant)
        found = self._stage("records", [variant.name, asdict(self.profile.evaluation)], upstream, [minerva_math, models], make)
        path = self.workspace.records / f"{variant.name}.jsonl"
        content = (found.folder / "records.jsonl").read_bytes()
        if not path.is_file() or path.read_bytes() != content:
            atomic(path, lambda draft: draft.write_bytes(content))
        return found

    def _make_records(self, variant: Variant, folder: Path) -> Artefact:
        answers = self.answers(variant)
        verdicts, errors = minerva_math.score(self._tasks, answers, task=self.profile.evaluation.task)
        rows = minerva_math.records(variant.name, self.test_problems, answers, verdicts)
        (folder / "records.jsonl").write_text(json_lines(rows), encoding="utf-8")
        return Artefact(tables={"records": pd.DataFrame(rows)}, values={"harness_stderr": errors})

    def all_records(self) -> pd.DataFrame:
        """Records of every variant, one row an answer."""
        return pd.concat([self.records(v).tables["records"] for v in self.variants().values()], ignore_index=True)

    def general_loss(self, variant: Variant) -> float:
        """Loss on held-out general text, nats a token."""
        p = self.profile
        params = [p.evaluation.general_documents, p.selection.batch_tokens, self.data_key, p.seed]
        make = partial(self._make_general_loss, variant)
        return self._stage("general_loss", params, [self._variant_key(variant)], [models, *self._text_code], make).values["loss"]

    def _make_general_loss(self, variant: Variant, folder: Path) -> Artefact:
        p = self.profile
        documents = texts.general(p.data, "test", p.evaluation.general_documents, self._seed("general"))
        pairs = models.tokenize(self.base, [("", text) for text in documents], p.data.max_tokens)
        with self.edited_model(variant) as model:
            return Artefact(
                values={"loss": models.mean_loss(model.model, models.batches(pairs, p.selection.batch_tokens, self.device))}
            )

    def minerva_math(self) -> pd.DataFrame:
        """Step 05's table, written and returned."""
        losses = {name: self.general_loss(variant) for name, variant in self.variants().items()}
        table = minerva_math.measure(self.all_records(), losses)
        self.workspace.table("05_minerva_math", table)
        return table

    def token_limits(self, names: Sequence[str], points: int = 12) -> pd.DataFrame:
        """Accuracy of some variants had the token limit been lower, from the answers on record."""
        limit = self.profile.evaluation.max_new_tokens
        limits = sorted({max(1, round(limit * step / points)) for step in range(1, points + 1)})
        records = pd.concat([self.records(self.variants()[name]).tables["records"] for name in names], ignore_index=True)
        length = lambda text: len(self.base.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
        needed = [
            minerva_math.tokens_to_answer(*row, length) for row in zip(records["completion"], records["extracted"], strict=True)
        ]
        return minerva_math.accuracy_by_limit(records, needed, limits)

    def checks(self) -> dict[str, Any]:
        """What C8 and C9 rest on: a repetition compared bit by bit, and what an edited model costs to run."""
        stethoscope = self.variants()["stethoscope"]
        params = [self.profile.evaluation.noise_problems, asdict(self.profile.evaluation), self.profile.seed]
        modules = [minerva_math, models, editing]
        upstream = [self._variant_key(stethoscope), self._asked_key, *self._feature_keys]
        return self._stage("checks", params, upstream, modules).values

    def _make_checks(self, folder: Path) -> Artefact:
        """Answers twice, scores twice, weights before and after; parameters and FLOPs of base and edited model."""
        variant = self.variants()["stethoscope"]
        before, runs, costs = models.weight_hash(self.base.model), [], []
        for _ in range(2):
            with self.edited_model(variant) as model:
                runs.append(self._answered(model, self.profile.evaluation.batch_size))
                costs.append(running_cost(model))
        again = self.plain_scores("corpus")
        return Artefact(
            values=dict(
                answered_twice=len(runs[0]),
                identical_answers=sum(a == b for a, b in zip(*runs, strict=True)),
                identical_scores=again == self.scores("corpus").score.tolist(),
                weights_restored=before == models.weight_hash(self.base.model),
                base_cost=running_cost(self.base),
                edited_cost=costs[0],
            )
        )

    def noise(self) -> pd.DataFrame:
        """The noise floor: how many of the base model's verdicts flip with another batch size, and in bfloat16.

        The latter only where the profile computes in float32.
        """
        p = self.profile.evaluation
        return self._stage("noise", asdict(p), [self.base_key, self._asked_key], [minerva_math, models]).tables["noise"]

    def _make_noise(self, folder: Path) -> Artefact:
        p = self.profile.evaluation
        verdict = lambda table: table.drop_duplicates("problem_id").set_index("problem_id")["exact_match"]  # noqa: E731
        kept = verdict(self.records(self.variants()["base"]).tables["records"])
        rows, ours = [], self.profile.model.dtype
        changes = [("batch size", ours, max(1, p.batch_size // 8)), ("bfloat16", "bfloat16", p.batch_size)]
        for what, dtype, batch_size in changes if ours != "bfloat16" else changes[:1]:
            with self.instead_of_base(self.base_folder, dtype) as model:
                found = {answer.problem_id: answer for answer in self._answered(model, batch_size)}
            verdicts, _ = minerva_math.score(self._tasks, found, some=True, task=p.task)
            again = verdict(verdicts)
            flips = int((kept[again.index] != again).sum())
            rows.append(dict(change=what, problems=len(found), flips=flips, share=flips / len(found)))
        return Artefact(tables={"noise": pd.DataFrame(rows)})


def running_cost(model: LanguageModel) -> dict[str, int]:
    """Parameters of a model and FLOPs of one forward pass over 32 tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.full((1, 32), model.tokenizer.bos_token_id, device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(input_ids=ids, use_cache=False)
    return dict(parameters=sum(p.numel() for p in model.model.parameters()), flops=counter.get_total_flops())
