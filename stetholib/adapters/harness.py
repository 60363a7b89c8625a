"""lm-evaluation-harness behind one door: its tasks on local problems, its prompts, and its verdicts on our answers.

Its `minerva_math` tasks, or a task of one's own, are included unchanged and only pointed at local files."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import pandas as pd

from stetholib.data.prompts import INVALID, STOP, problem_id
from stetholib.errors import UserError
from stetholib.minerva_math import records as scored
from stetholib.models.answering import Answer
from stetholib.models.loading import LanguageModel, opens_with_bos

SUBTASKS = {
    "algebra": "minerva_math_algebra",
    "counting_and_probability": "minerva_math_counting_and_prob",
    "geometry": "minerva_math_geometry",
    "intermediate_algebra": "minerva_math_intermediate_algebra",
    "number_theory": "minerva_math_num_theory",
    "prealgebra": "minerva_math_prealgebra",
    "precalculus": "minerva_math_precalc",
}
MINERVA = "minerva_math"
UNREADABLE = (INVALID, "[invalid]")  # what Minerva Math, and the harness's filters, say where they find no answer


def check_task(subjects: Sequence[str], task: str) -> str:
    """Refuse subjects that Minerva Math does not have, and a task of one's own that is not there; says which task it is."""
    if task == MINERVA and (odd := sorted(set(subjects) - set(SUBTASKS))):
        known = ", ".join(SUBTASKS)
        raise UserError(f"data.test_problems: {MINERVA} has no subject {odd[0]!r}; it has {known}; else give evaluation.task")
    if task != MINERVA and not Path(task).is_file():
        raise UserError(f"evaluation.task: there is no file {task}; give {MINERVA}, or the path of a task's YAML file")
    return task


@contextmanager
def _reading(task: str) -> Iterator[None]:
    """Turn whatever the harness meets in a task of one's own into one line that names its file."""
    try:
        yield
    except Exception as error:
        if task == MINERVA or isinstance(error, UserError):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if isinstance(error, KeyError):  # of a name that was written here, and not by the user
            said = "it does not hold one task, or is no YAML"
        raise UserError(f"evaluation.task {task}: the harness cannot use it ({said}); give the YAML file of one task") from None


def task_files(task: str) -> list[Path]:
    """The files of a task of one's own: its YAML file, with those beside it that it may include or call."""
    beside = [file for end in ("*.yaml", "*.yml", "*.py") for file in Path(task).parent.glob(end)]
    return sorted(beside) if Path(task).is_file() else []


def write_tasks(folder: Path, rows: Sequence[Mapping[str, str]], num_fewshot: int, task: str = MINERVA) -> list[str]:
    """Point the harness's tasks at local problems: one YAML and one JSON-lines file a subject; returns task names.
    task: `minerva_math`, or the YAML file of a task of one's own, which every subject then uses."""
    import lm_eval

    home = Path(lm_eval.__file__).parent / "tasks" / MINERVA
    check_task((), task)
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)  # nobody checks what lies there
    for subject in sorted({row["subject"] for row in rows}):
        data = folder / f"{subject}.jsonl"
        chosen = [{k: v for k, v in row.items() if k != "subject"} for row in rows if row["subject"] == subject]
        data.write_text("".join(json.dumps(row, default=str) + "\n" for row in chosen), encoding="utf-8")
        config = dict(
            include=str(home / f"{SUBTASKS[subject]}.yaml" if task == MINERVA else Path(task).resolve()),
            task=(name := f"stetholib_{subject}"),
            dataset_path="json",
            dataset_name=None,
            dataset_kwargs=dict(data_files=dict(test=str(data)), cache_dir=str(folder / "cache")),
            training_split=None,
            num_fewshot=num_fewshot,
        )
        (folder / f"{subject}.yaml").write_text(json.dumps(config), encoding="utf-8")
        names.append(name)
    return names


def load_tasks(folder: Path, names: Sequence[str], task: str = MINERVA) -> dict[str, Any]:
    """The harness's task objects; raises where Minerva's lost its stop string, or one's own cannot be used here."""
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager

    disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    remember = cache(remembering)  # the tasks of one load have one scorer
    with _reading(task):
        loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(names))
    for name, one in loaded["tasks"].items():
        if task != MINERVA:
            _check_own(task, one.config)
            continue
        if (until := one.config.generation_kwargs.get("until")) != [STOP]:
            raise UserError(f"minerva_math: task {name} stops at {until}, not at {[STOP]}; update write_tasks")
        one.config.process_results = remember(one.config.process_results)
        one.config.doc_to_target = gold
    return loaded


def _check_own(task: str, config: Any) -> None:
    """A task of one's own must generate greedily until a stop string, and give `exact_match`."""
    metrics = [metric.get("metric") for metric in config.metric_list or []]
    if config.output_type != "generate_until" or "exact_match" not in metrics:
        raise UserError(f"evaluation.task {task}: it must have output_type generate_until and the metric exact_match")
    if config.test_split != "test":
        raise UserError(f"evaluation.task {task}: it must have test_split: test, which is where the test problems are put")
    until = config.generation_kwargs.get("until")
    listed = isinstance(until, list) and bool(until) and all(isinstance(stop, str) and stop for stop in until)
    if not listed or config.generation_kwargs.get("do_sample"):
        raise UserError(f"evaluation.task {task}: generation_kwargs must have `until`, a list of strings, and no sampling")


def stops_of(loaded: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop strings of the tasks, which come from one file."""
    return tuple(next(iter(loaded["tasks"].values())).config.generation_kwargs["until"])


def gold(doc: Mapping[str, str]) -> str:
    """The harness's `doc_to_target`, as a function: its template would be compiled anew for every document."""
    return doc["solution"] if "few_shot" in doc else doc["answer"]


def remembering(process_results: FunctionType) -> Callable[..., dict[str, int]]:
    """The harness's scorer, which compares a pair of strings once: sympy takes up to 30 ms, and variants share most answers.
    The harness's module stays as it is: its scorer's code runs with names of its own, where `is_equiv` remembers."""
    names = process_results.__globals__
    scorer = FunctionType(process_results.__code__, names | {"is_equiv": cache(names["is_equiv"])})
    memory: dict[tuple[str, str], dict[str, int]] = {}  # verdicts by solution and completion

    def verdict(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, int]:
        pair = (doc["solution"], results[0])
        if pair not in memory:
            memory[pair] = scorer(doc, results)
        return dict(memory[pair])

    return verdict


def recorded_model(answers: Mapping[str, Answer]) -> Any:
    """A model object for the harness that answers from the record, by the prompt's problem."""
    from lm_eval.api.model import LM

    class Recorded(LM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [answers[_id_of(request.task_name, request.doc)].completion for request in requests]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError("minerva_math asks for generations only")

        loglikelihood_rolling = loglikelihood

    return Recorded()


def _id_of(name: str, doc: Mapping[str, str]) -> str:
    return problem_id(name.removeprefix("stetholib_"), doc["problem"])


def prompts_of(loaded: Mapping[str, Any], chat: Any = None) -> dict[str, str]:
    """Every prompt exactly as the harness builds it, few-shot examples included, by problem id.
    chat: a tokenizer whose chat template wraps the prompts, examples as turns; a BOS that the tokenizer adds is left to it."""
    found: dict[str, str] = {}
    asked: dict[str, Any] = {}
    if chat is not None:
        asked = dict(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=partial(_chat, chat))
    for task in loaded["tasks"].values():
        task.build_all_requests(rank=0, world_size=1, **asked)
        found |= {_id_of(request.task_name, request.doc): request.args[0] for request in task.instances}
    return found


def _chat(tokenizer: Any, turns: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    asked = dict(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
    text = tokenizer.apply_chat_template(turns, tokenize=False, **asked)
    return text.removeprefix(tokenizer.bos_token) if opens_with_bos(tokenizer) else text


def score(
    loaded: Mapping[str, Any], answers: Mapping[str, Answer], some: bool = False, task: str = MINERVA
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Let the harness score recorded answers: verdicts by problem, and its own standard error by subject.
    some: score only the problems that were answered; otherwise a missing answer is an error."""
    from lm_eval.evaluator import evaluate

    samples = None
    if some:
        samples = {
            name: [i for i, doc in enumerate(one.eval_docs) if _id_of(name, doc) in answers]
            for name, one in loaded["tasks"].items()
        }
        # without a chosen document the harness would take a task's every document
        loaded = {**loaded, "tasks": {name: one for name, one in loaded["tasks"].items() if samples[name]}}
    result = evaluate(recorded_model(answers), loaded, samples=samples, bootstrap_iters=1, log_samples=True)
    rows, errors = [], {}
    for name, samples in result["samples"].items():
        first = samples[0]["filter"]  # a task may read answers in several ways
        error = result["results"][name][f"exact_match_stderr,{first}"]
        errors[name.removeprefix("stetholib_")] = float("nan" if error == "N/A" else error)
        for sample in samples:
            if sample["filter"] == first:
                one = dict(problem_id=_id_of(name, sample["doc"]), extracted=_extracted(sample, task))
                rows.append(one | dict(exact_match=int(sample["exact_match"]), math_verify=sample.get("math_verify")))
    return pd.DataFrame(rows), errors


def _extracted(sample: Mapping[str, Any], task: str) -> str:
    """The answer that was found in a completion, as the task normalises it; `INVALID` where there is none."""
    from lm_eval.tasks.minerva_math import utils

    if task == MINERVA:
        return utils.normalize_final_answer(utils.get_unnormalized_answer(sample["resps"][0][0]))
    found = str(sample["filtered_resps"][0])
    return INVALID if found in UNREADABLE else found


@dataclass(frozen=True)
class Asked:
    """What a task asks: every prompt exactly as the harness builds it, by problem id, and its stop strings."""

    prompts: Mapping[str, str]
    stops: tuple[str, ...]


class Tasks:
    """The harness's tasks on local problems, with the folder that they read from, which goes when they go."""

    def __init__(self, rows: Sequence[Mapping[str, str]], num_fewshot: int, task: str, files: Sequence[str] = ()) -> None:
        """task: `minerva_math`, or the YAML file of a task of one's own; files: names and hashes of that and of what lies beside
        it, for whoever keeps what is made of it."""
        self._folder = TemporaryDirectory(prefix="stetholib-tasks-")
        folder = Path(self._folder.name)
        self.loaded = load_tasks(folder, write_tasks(folder, rows, num_fewshot, task), task)
        self.task = task


def asked(tasks: Tasks, chat: LanguageModel | None) -> Asked:
    """Every prompt and the stop strings; chat: the model whose chat template wraps the prompts, if any."""
    with _reading(tasks.task):
        return Asked(prompts_of(tasks.loaded, chat.tokenizer if chat else None), stops_of(tasks.loaded))


def verdicts(tasks: Tasks, answers: Sequence[Answer]) -> pd.DataFrame:
    """The harness's verdicts on answers to some of the problems."""
    return score(tasks.loaded, {answer.problem_id: answer for answer in answers}, some=True, task=tasks.task)[0]


def records(variant: str, rows: Sequence[Mapping[str, str]], answers: Mapping[str, Answer], tasks: Tasks) -> pd.DataFrame:
    """The contract's records of one variant, in the order of the test set, with the harness's verdicts."""
    found, _ = score(tasks.loaded, answers, task=tasks.task)
    return pd.DataFrame(scored(variant, rows, answers, found))
