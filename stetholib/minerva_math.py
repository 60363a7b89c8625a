"""Step 05. What does each edited model score, subject by subject?

lm-evaluation-harness asks, extracts and scores; its `minerva_math` tasks are included unchanged and only pointed at
local files. Ours is the model object that answers, and a record of every answer: each is on disk within seconds and
is never asked again. A task of the harness of one's own can take the place of Minerva Math.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from stetholib.errors import UserError
from stetholib.models import LanguageModel

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
STOP = "Problem:"
INVALID = "[invalidanswer]"
UNREADABLE = (INVALID, "[invalid]")  # what Minerva Math, and the harness's filters, say where they find no answer


def prompt(problem: str) -> str:
    """A problem as the harness asks it (`minerva_math.utils.doc_to_text`)."""
    return f"Problem:\n{problem}\n\nSolution:"


def target(solution: str, style: str = "minerva") -> str:
    """A solution as a model should complete the prompt; `minerva` ends with the sentence `exact_match` looks for."""
    if style == "plain":
        return f" {solution}"
    return f" {solution}\nFinal Answer: The final answer is ${boxed_answer(solution)}$. I hope it is correct."


def boxed_answer(solution: str) -> str:
    r"""What stands in the last `\boxed{...}` or `\fbox{...}` (or after `\boxed `) of a solution, braces balanced."""
    openings = list(re.finditer(r"\\(?:boxed|fbox)\s*", solution))
    if not openings:
        raise UserError(f"no \\boxed answer in the solution {solution[:60]!r}")
    rest = solution[openings[-1].end() :]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for index, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:index]
    raise UserError(f"an unclosed \\boxed answer in the solution {solution[:60]!r}")


def problem_id(subject: str, problem: str) -> str:
    """A hash of subject and problem: the same in every variant, run and world."""
    return sha256(f"{subject}\n{problem}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    """One answer as the model gave it; `stopped_by` is `stop`, `eos` or `length`."""

    problem_id: str
    prompt_tokens: int
    completion: str
    completion_tokens: int
    stopped_by: str


def plan(tokenizer: Any, prompts: Mapping[str, str], batch_size: int) -> list[list[str]]:
    """Problem ids in the batches that they are always answered in, whoever asks and whatever is known: longest first.

    Padding touches the last bits of an answer, so the batches are fixed. Among prompts of about the same length, those
    that open alike share a batch: their answers tend to end together.
    """
    lengths = {name: len(tokenizer(text).input_ids) for name, text in prompts.items()}
    order = sorted(prompts, key=lambda name: (-(lengths[name] // 8), prompts[name]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def check_context(model: LanguageModel, prompts: Mapping[str, str], max_new_tokens: int) -> None:
    """Refuse prompts that leave no room in the model's context for the answer."""
    longest = max(len(model.tokenizer(text).input_ids) for text in prompts.values())
    if model.context is not None and longest + max_new_tokens > model.context:
        raise UserError(
            f"evaluation: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {model.context}; "
            "lower evaluation.num_fewshot or evaluation.max_new_tokens"
        )


def answer_all(
    model: LanguageModel,
    prompts: Mapping[str, str],
    batches: Sequence[Sequence[str]],
    max_new_tokens: int,
    keep: Callable[[list[Answer]], None],
    stops: Sequence[str] = (STOP,),
) -> None:
    """Answer these batches greedily and hand each to `keep` as soon as it is done.

    prompts: by problem id. Batches are padded on the left. Generation ends at a stop string, at EOS or at the limit.
    """
    tokenizer = model.tokenizer
    enders = last_signs(tokenizer, stops)
    for names in batches:
        encoded = tokenizer([prompts[name] for name in names], return_tensors="pt", padding=True).to(model.device)
        _assert_one_bos(encoded.input_ids, tokenizer)
        with torch.no_grad():
            output = model.model.generate(
                **{k: v for k, v in encoded.items() if k in ("input_ids", "attention_mask")},
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stopping_criteria=[stop_rows(tokenizer, encoded.input_ids.shape[1], enders, stops)],
                pad_token_id=tokenizer.pad_token_id,
            )
        new, lengths = output[:, encoded.input_ids.shape[1] :].tolist(), encoded.attention_mask.sum(1).tolist()
        keep([_answer(*row, model, stops) for row in zip(names, lengths, new, strict=True)])


def last_signs(tokenizer: Any, stops: Sequence[str]) -> set[int]:
    """The tokens that hold the last sign of a stop string; only after one of these can a stop string be complete."""
    signs = {stop[-1] for stop in stops} | {"\N{REPLACEMENT CHARACTER}"}  # which stands for a part of a longer sign
    ids = sorted(tokenizer.get_vocab().values())
    return {
        index for index, text in zip(ids, tokenizer.batch_decode([[index] for index in ids]), strict=True) if signs & set(text)
    }


def stop_rows(tokenizer: Any, prompt_width: int, enders: set[int], stops: Sequence[str] = (STOP,)) -> Callable[..., torch.Tensor]:
    """A stopping criterion that ends each row of a batch on its own as soon as its new text holds a stop string.

    Only rows whose last token is one of `enders` are decoded, so it costs next to nothing.
    """
    longest = max(map(len, stops))

    def done(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        last = input_ids[:, -1].tolist()
        recent = input_ids[:, prompt_width:][:, -longest:]
        return torch.tensor(
            [
                token in enders and _first_stop(tokenizer.decode(row, skip_special_tokens=True), stops) is not None
                for token, row in zip(last, recent, strict=True)
            ],
            device=input_ids.device,
        )

    return done


def _first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins; None without one."""
    return min((found for stop in stops if (found := text.find(stop)) >= 0), default=None)


def _assert_one_bos(ids: torch.Tensor, tokenizer: Any) -> None:
    """Every prompt opens with BOS exactly once; a doubled one quietly costs accuracy."""
    counts = (ids == tokenizer.bos_token_id).sum(1)
    if int(counts.min()) != 1 or int(counts.max()) != 1:
        raise UserError(f"minerva_math: each prompt must hold {tokenizer.bos_token} exactly once, found {int(counts.max())}")


def _answer(name: str, prompt_tokens: int, tokens: list[int], model: LanguageModel, stops: Sequence[str] = (STOP,)) -> Answer:
    eos = model.model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    ended = next((i for i, token in enumerate(tokens) if token in ends), None)
    body = tokens if ended is None else tokens[:ended]
    text = model.tokenizer.decode(body, skip_special_tokens=True)
    if (cut := _first_stop(text, stops)) is not None:
        body, reason = _until_stop(body, model.tokenizer, stops), "stop"
    else:
        reason = "length" if ended is None else "eos"
    return Answer(name, prompt_tokens, text[:cut], len(body), reason)


def _until_stop(tokens: list[int], tokenizer: Any, stops: Sequence[str]) -> list[int]:
    """The tokens up to the one that completes a stop string; batched generation pads on after it."""
    for end in range(1, len(tokens)):
        if _first_stop(tokenizer.decode(tokens[:end], skip_special_tokens=True), stops) is not None:
            return tokens[:end]
    return tokens


def check_subjects(subjects: Sequence[str], task: str) -> None:
    """Refuse subjects that Minerva Math does not have, unless a task of one's own asks them."""
    if task == MINERVA and (odd := sorted(set(subjects) - set(SUBTASKS))):
        known = ", ".join(SUBTASKS)
        raise UserError(f"data.test_problems: {MINERVA} has no subject {odd[0]!r}; it has {known}; else give evaluation.task")


def task_files(task: str) -> list[Path]:
    """The files of a task of one's own: its YAML file, with those beside it that it may include or call."""
    beside = [file for end in ("*.yaml", "*.yml", "*.py") for file in Path(task).parent.glob(end)]
    return sorted(beside) if Path(task).is_file() else []


def write_tasks(folder: Path, rows: Sequence[Mapping[str, str]], num_fewshot: int, task: str = MINERVA) -> list[str]:
    """Point the harness's tasks at local problems: one YAML and one JSON-lines file a subject; returns task names.

    task: `minerva_math`, or the YAML file of a task of one's own, which every subject then uses.
    """
    import lm_eval

    home = Path(lm_eval.__file__).parent / "tasks" / MINERVA
    if task != MINERVA and not Path(task).is_file():
        raise UserError(f"evaluation.task: there is no file {task}; give {MINERVA}, or the path of a task's YAML file")
    names = []
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)  # nobody checks what lies there
    for subject in sorted({row["subject"] for row in rows}):
        data = folder / f"{subject}.jsonl"
        chosen = [{k: v for k, v in row.items() if k != "subject"} for row in rows if row["subject"] == subject]
        data.write_text("".join(json.dumps(row, default=str) + "\n" for row in chosen), encoding="utf-8")
        config = dict(
            include=str(home / f"{SUBTASKS[subject]}.yaml" if task == MINERVA else Path(task).resolve()),
            task=f"stetholib_{subject}",
            dataset_path="json",
            dataset_name=None,
            dataset_kwargs=dict(data_files=dict(test=str(data)), cache_dir=str(folder / "cache")),
            training_split=None,
            num_fewshot=num_fewshot,
        )
        (folder / f"{subject}.yaml").write_text(json.dumps(config), encoding="utf-8")
        names.append(config["task"])
    return names


def load_tasks(folder: Path, names: Sequence[str], task: str = MINERVA) -> dict[str, Any]:
    """The harness's task objects; raises where Minerva's lost its stop string, or one's own cannot be used here."""
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager

    disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(list(names))
    for name, one in loaded["tasks"].items():
        if task != MINERVA:
            _check_own(task, one.config)
            continue
        if (until := one.config.generation_kwargs.get("until")) != [STOP]:
            raise UserError(f"minerva_math: task {name} stops at {until}, not at {[STOP]}; update write_tasks")
        one.config.process_results = remembering(one.config.process_results)
        one.config.doc_to_target = gold
    return loaded


def _check_own(task: str, config: Any) -> None:
    """A task of one's own must generate greedily until a stop string, and give `exact_match`."""
    metrics = [metric.get("metric") for metric in config.metric_list or []]
    if config.output_type != "generate_until" or "exact_match" not in metrics:
        raise UserError(f"evaluation.task {task}: it must have output_type generate_until and the metric exact_match")
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


_VERDICTS: dict[tuple[str, str], dict[str, int]] = {}
_SAME: dict[tuple[str, str], bool] = {}


def remembering(process_results: Callable[..., dict[str, int]]) -> Callable[..., dict[str, int]]:
    """The harness's scorer, which gives the same pair of strings its verdict without computing it again.

    A comparison by sympy costs up to 30 ms, and variants share most of their answers. Each task holds its own copy
    of the harness's module, so its `is_equiv` is wrapped there.
    """
    module = process_results.__globals__
    compare = module["is_equiv"]

    def same(one: str, other: str) -> bool:
        if (one, other) not in _SAME:
            _SAME[one, other] = compare(one, other)
        return _SAME[one, other]

    def verdict(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, int]:
        pair = (doc["solution"], results[0])
        if pair not in _VERDICTS:
            _VERDICTS[pair] = process_results(doc, results)
        return dict(_VERDICTS[pair])

    module["is_equiv"] = same
    return verdict


def recorded_model(answers: Mapping[str, Answer]) -> Any:
    """A model object for the harness that answers from the record, by the prompt's problem."""
    from lm_eval.api.model import LM

    class Recorded(LM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [answers[_id_of(request)].completion for request in requests]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError("minerva_math asks for generations only")

        loglikelihood_rolling = loglikelihood

    return Recorded()


def _id_of(request: Any) -> str:
    return problem_id(request.task_name.removeprefix("stetholib_"), request.doc["problem"])


def prompts_of(loaded: Mapping[str, Any], chat: Any = None) -> dict[str, str]:
    """Every prompt exactly as the harness builds it, few-shot examples included, by problem id.

    chat: a tokenizer whose chat template wraps the prompts, examples as turns; its BOS is left to the tokenizer.
    """
    found, asked = {}, {}
    if chat is not None:
        asked = dict(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=partial(_chat, chat))
    for task in loaded["tasks"].values():
        task.build_all_requests(rank=0, world_size=1, **asked)
        found |= {_id_of(request): request.args[0] for request in task.instances}
    return found


def _chat(tokenizer: Any, turns: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    asked = dict(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
    return tokenizer.apply_chat_template(turns, tokenize=False, **asked).removeprefix(tokenizer.bos_token)


def score(
    loaded: Mapping[str, Any], answers: Mapping[str, Answer], some: bool = False, task: str = MINERVA
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Let the harness score recorded answers: verdicts by problem, and its own standard error by subject.

    some: score only the problems that were answered; otherwise a missing answer is an error.
    """
    from lm_eval.evaluator import evaluate

    samples = None
    if some:
        subject = lambda name: name.removeprefix("stetholib_")  # noqa: E731
        samples = {
            name: [i for i, doc in enumerate(task.eval_docs) if problem_id(subject(name), doc["problem"]) in answers]
            for name, task in loaded["tasks"].items()
        }
        # without a chosen document the harness would take a task's every document
        loaded = {**loaded, "tasks": {name: task for name, task in loaded["tasks"].items() if samples[name]}}
    result = evaluate(recorded_model(answers), loaded, samples=samples, bootstrap_iters=1, log_samples=True)
    rows, errors = [], {}
    for name, samples in result["samples"].items():
        subject, first = name.removeprefix("stetholib_"), samples[0]["filter"]  # a task may read answers in several ways
        error = result["results"][name][f"exact_match_stderr,{first}"]
        errors[subject] = float("nan" if error == "N/A" else error)
        for sample in samples:
            if sample["filter"] == first:
                rows.append(
                    dict(
                        problem_id=problem_id(subject, sample["doc"]["problem"]),
                        extracted=_extracted(sample, task),
                        exact_match=int(sample["exact_match"]),
                        math_verify=sample.get("math_verify"),
                    )
                )
    return pd.DataFrame(rows), errors


def _extracted(sample: Mapping[str, Any], task: str) -> str:
    """The answer that was found in a completion, as the task normalises it; `INVALID` where there is none."""
    from lm_eval.tasks.minerva_math import utils

    if task == MINERVA:
        return utils.normalize_final_answer(utils.get_unnormalized_answer(sample["resps"][0][0]))
    found = str(sample["filtered_resps"][0])
    return INVALID if found in UNREADABLE else found


def records(
    variant: str, rows: Sequence[Mapping[str, str]], answers: Mapping[str, Answer], verdicts: pd.DataFrame
) -> list[dict[str, Any]]:
    """The contract's records of one variant, in the order of the test set."""
    by_id = verdicts.drop_duplicates("problem_id").set_index("problem_id").to_dict("index")
    found = []
    for row in rows:
        name = problem_id(row["subject"], row["problem"])
        about = dict(variant=variant, subject=row["subject"], level=row.get("level", "-"))
        found.append(about | asdict(answers[name]) | by_id[name])
    return found


def tokens_to_answer(completion: str, extracted: str, count: Callable[[str], int]) -> int | None:
    """How many new tokens it took until the harness could read an answer; None where it never could.

    That is where Minerva's closing sentence ends; an answer read without it is taken to need the whole completion.
    """
    before, sentence, _ = completion.partition("I hope it is correct.")
    return None if extracted == INVALID else count(before + sentence)


def accuracy_by_limit(all_records: pd.DataFrame, needed: Sequence[int | None], limits: Sequence[int]) -> pd.DataFrame:
    """Accuracy had the token limit been lower: columns variant, limit, accuracy.

    Greedy answers under a lower limit are the same answers cut short, so nothing has to be asked again. needed: of
    each record, `tokens_to_answer`.
    """
    tokens = pd.Series(needed, index=all_records.index, dtype=float)
    parts = []
    for limit in limits:
        right = (all_records["exact_match"] == 1) & (tokens <= limit)
        parts.append(right.groupby(all_records["variant"]).mean().rename("accuracy").reset_index().assign(limit=limit))
    return pd.concat(parts, ignore_index=True)


def measure(all_records: pd.DataFrame, general_loss: Mapping[str, float]) -> pd.DataFrame:
    """The table of step 05: one row a variant and subject, and `all`; general_loss in nats a token, by variant."""
    rows = []
    for (variant, subject), part in _groups(all_records):
        n, correct = len(part), int(part["exact_match"].sum())
        readable = part["extracted"] != INVALID
        accuracy = correct / n
        rows.append(
            dict(
                variant=variant,
                subject=subject,
                n=n,
                correct=correct,
                accuracy=accuracy,
                stderr=(accuracy * (1 - accuracy) / (n - 1)) ** 0.5 if n > 1 else float("nan"),
                math_verify=part["math_verify"].mean(),
                extractable=readable.mean(),
                truncated=(part["stopped_by"] == "length").mean(),
                accuracy_given_extractable=part.loc[readable, "exact_match"].mean() if readable.any() else float("nan"),
                mean_tokens=part["completion_tokens"].mean(),
                general_loss=general_loss[variant],
            )
        )
    return pd.DataFrame(rows)


def _groups(all_records: pd.DataFrame) -> Iterable[tuple[tuple[str, str], pd.DataFrame]]:
    for variant, part in all_records.groupby("variant", sort=True):
        yield (variant, "all"), part
        for subject, rows in part.groupby("subject", sort=True):
            yield (variant, subject), rows
