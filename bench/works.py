"""The works: each measures ours and the peer in turn, compares what they give, and returns rows of the table."""

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bench import ours, peers
from bench.features import Heard
from bench.inputs import MAX_NEW_TOKENS, SMALLER, Plan, Two, fabricated, miniature, rows, true_shaped
from bench.peers import HARNESS, MERGEKIT
from bench.timing import ROOT, Pair, alternating, peak, process, row, share
from stetholib import profiles
from stetholib.adapters import harness
from stetholib.editing import Edit, edited
from stetholib.models import loading
from stetholib.models.loading import LanguageModel
from stetholib.models.sums import CONTRASTS
from stetholib.models.weights import Checkpoint

Rows = list[dict[str, Any]]
Verdicts = Sequence[dict[str, dict[str, int]]]
SHOTS, SHOT_TOKENS = 3, 64
EOS_SCALE = 4.0  # ends some answers early and others not at all
VARIANTS = 12


def answer(plan: Plan) -> Rows:
    """The miniature's answers without examples, both sides over one loaded model."""
    model = loading.load(miniature(plan).base)
    tasks = harness.Tasks(rows(plan.count(512, 16)), 0, harness.MINERVA)
    asked = harness.asked(tasks, None)
    pair, peer, _ = _answers(model, asked.prompts, asked.stops, MAX_NEW_TOKENS, plan.runs, peers.BATCHES)
    return [pair.row("answer", peer, share(*_same(pair.our_results[0], pair.their_results[0])))]


def answer_fewshot(plan: Plan) -> Rows:
    """Answers with examples at Gemma 3 270M's shapes. The peer asked with another batch size tells what rounding alone does.
    Three of Minerva's examples are as long in the fabricated vocabulary as four are in Gemma's, some 700 tokens, and four
    problems joined are as long as one of MATH's, some 90."""
    folder = fabricated(plan, SMALLER)
    model = speaking(loading.load(folder, attention=profiles.load("gemma-3-270m").model.attention))
    count = plan.count(24, 6)
    short = rows(4 * count)
    long = [one | {"problem": " ".join(row["problem"] for row in short[at::count])} for at, one in enumerate(short[:count])]
    asked = harness.asked(harness.Tasks(long, SHOTS, harness.MINERVA), None)
    batches = (count, count // 2)
    pair, peer, best = _answers(model, asked.prompts, asked.stops, SHOT_TOKENS, plan.runs, batches)
    other = next(size for size in batches if size != best)
    again = peers.completions(model, asked.prompts, asked.stops, SHOT_TOKENS, other)
    same, of = _same(pair.our_results[0], pair.their_results[0])
    itself = sum(again[name] == said for name, said in pair.their_results[0].items())
    return [pair.row("answer_fewshot", peer, f"{same} of {of} (peer with itself {itself} of {of})")]


def speaking(model: LanguageModel) -> LanguageModel:
    """A fabricated model whose answers are text and end at different lengths; random weights repeat one token for ever.
    Rows of the output matrix are the embedding's, shifted by one, so that what would repeat a token says the next one; rows
    that no token has are zero, and EOS has a longer one."""
    rows_of = model.model.get_input_embeddings().weight
    head = rows_of.detach().roll(1, 0)
    head[len(model.tokenizer) :] = 0
    end = model.tokenizer.eos_token_id
    head[end] = EOS_SCALE * rows_of[end]
    model.model.config.tie_word_embeddings = False
    model.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    return model


def _answers(
    model: LanguageModel, prompts: Mapping[str, str], stops: tuple[str, ...], limit: int, runs: int, batches: tuple[int, ...]
) -> tuple[Pair, str, int]:
    """Both sides' answers, how the peer is called, and its best batch size."""
    best = peers.best_batch(model, prompts, stops, limit, batches)
    pair = alternating(
        lambda run: ours.answered(model, prompts, stops, limit, ours.SLOTS),
        lambda run: peers.completions(model, prompts, stops, limit, best),
        runs,
    )
    return pair, f"{HARNESS}, hf model, batch {best}", best


def _same(answers: Mapping[str, Any], completions: Mapping[str, str]) -> tuple[int, int]:
    """How many completions are equal, and of how many."""
    return sum(answers[name].completion == said for name, said in completions.items()), len(completions)


def export(plan: Plan) -> Rows:
    """A third of the layers of Gemma 3 1B's shapes, edited and written to disk, each side in a process of its own."""
    two, made = true_shaped(plan), _clean(plan.folder("export"))
    layers, recipe = two.third(), made / "recipe.yaml"
    recipe.write_text(two.recipe(layers), encoding="utf-8")
    pair = alternating(
        lambda run: ours.run_export(two, layers, made / "ours"),
        lambda run: peers.merge(recipe, made / "theirs"),
        plan.runs,
        lambda side: _without(made / side),
    )
    equal = _equal_tensors(two, made / "ours", made / "theirs")
    shutil.rmtree(made)
    memory = row("export_memory", f"{MERGEKIT}, peak MiB of the process", pair.our_results, pair.their_results, "-")
    return [pair.row("export", f"{MERGEKIT}, task_arithmetic, process start included", equal), memory]


def _clean(folder: Path) -> Path:
    """A folder that is there and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _without(folder: Path) -> None:
    """Remove an earlier result, and let the disk finish what it still has to write."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def _equal_tensors(two: Two, one: Path, other: Path) -> str:
    """Whether two exports hold the same tensors; else how many are, and whether the others are within one step of bfloat16
    and ours are nearer to float64."""
    mine, theirs = Checkpoint(one), Checkpoint(other)
    if {*mine} != {*theirs}:
        return "no"
    odd = [name for name in mine if mine.dtype(name) != theirs.dtype(name) or not torch.equal(mine[name], theirs[name])]
    if not odd:
        return "yes"
    base, finetuned = Checkpoint(two.base), Checkpoint(two.finetuned)
    near = all(_nearer(mine[name], theirs[name], base[name].double(), finetuned[name].double()) for name in odd)
    return f"{len(mine) - len(odd)} of {len(mine)}" + ", the others within one step of bfloat16, ours nearer to float64" * near


def _nearer(mine: Tensor, theirs: Tensor, base: Tensor, finetuned: Tensor) -> bool:
    """Whether two bfloat16 tensors differ by one step at most, and the first is at least as near to the sum in float64."""
    if mine.dtype != torch.bfloat16 or theirs.dtype != torch.bfloat16:
        return False
    steps = (mine.view(torch.int16).int() - theirs.view(torch.int16).int()).abs()
    exact = base + (finetuned - base)
    return bool((steps <= 1).all() and ((mine.double() - exact).abs() <= (theirs.double() - exact).abs()).all())


def recipe(plan: Plan) -> Rows:
    """`stetholib export` of the smoke profile's stethoscope, and mergekit on the recipe.yaml that lies in the folder.
    What the variant stands on is computed before the timing."""
    made = _clean(plan.folder("recipe"))
    command = [sys.executable, "-m", "stetholib", "export", "--profile", "smoke", "--variant", "stethoscope"]
    export = lambda run: process([*command, "--into", made / "ours"], ours.LOG)  # noqa: E731
    export(0)
    merge = lambda run: peers.merge(made / "ours" / "recipe.yaml", made / "theirs")  # noqa: E731
    pair = alternating(export, merge, plan.runs, lambda side: _without(made / "theirs"))
    said = yaml.safe_load((made / "ours" / "recipe.yaml").read_text(encoding="utf-8"))
    equal = _equal_tensors(Two(*(Path(one["model"]) for one in said["models"])), made / "ours", made / "theirs")
    return [pair.row("recipe", f"{MERGEKIT} on the exported recipe.yaml", equal)]


def edit(plan: Plan) -> Rows:
    """One more edit of a model in memory and its undoing, its vector in memory too as in a sweep of edits, against another merge
    that is loaded."""
    from transformers import AutoModelForCausalLM

    two, made = true_shaped(plan), _clean(plan.folder("edit"))
    layers, model = two.third(), loading.load(two.base, "bfloat16").model
    loaded: dict[str, Any] = {}
    (made / "recipe.yaml").write_text(two.recipe(layers), encoding="utf-8")
    change = Edit(two.vector().restrict(layers).in_memory(), layers)

    def ours_once(run: int) -> None:
        with edited(model, change):
            pass

    def theirs_once(run: int) -> None:
        loaded.clear()
        peers.merge(made / "recipe.yaml", made / "theirs")
        loaded["model"] = AutoModelForCausalLM.from_pretrained(made / "theirs", dtype=torch.bfloat16)

    pair = alternating(ours_once, theirs_once, plan.runs, lambda side: _without(made / side))
    theirs, base = dict(loaded["model"].named_parameters()), Checkpoint(two.base)
    with edited(model, change):
        same = [torch.equal(weight, theirs[name]) for name, weight in model.named_parameters()]
    undone = all(torch.equal(weight, base[name]) for name, weight in model.named_parameters())
    loaded.clear()
    shutil.rmtree(made)
    return [
        pair.row(
            "edit",
            f"{MERGEKIT}, loaded by transformers; our vector is in memory",
            share(sum(same), len(same)) if undone else "no",
        )
    ]


def lm_eval(plan: Plan) -> Rows:
    """An exported edit of the miniature asked by the harness from a shell, against our records of the same edit."""
    two, made = miniature(plan), _clean(plan.folder("lm_eval"))
    names, best = _asked(two, plan.count(512, 14), made)
    ours.write(two, two.third(), made / "model")
    pair = alternating(
        lambda run: ours.run_answer(two, [two.third()], made / "rows.json", made / "ours.json")[0],
        lambda run: peers.ask(made / "model", made / "tasks", names, best, made / "theirs"),
        plan.runs,
        lambda side: _without(made / side),
    )
    equal = _same_verdicts(pair.our_results[:1], pair.their_results[:1])
    return [pair.row("lm_eval", f"{HARNESS} --model hf from a shell, batch {best}", equal)]


def sweep(plan: Plan) -> Rows:
    """Twelve edits of the miniature, merged and asked by the peers one by one. One of them is measured in each run, another one
    each time, and counted as often as there are edits."""
    two, made, count = miniature(plan), _clean(plan.folder("sweep")), plan.count(VARIANTS, 2)
    edits = layer_sets(len(two.vector().layers), len(two.third()), count)
    names, best = _asked(two, plan.count(105, 14), made)

    def theirs_once(run: int) -> dict[str, dict[str, int]]:
        recipe = made / "recipe.yaml"
        recipe.write_text(two.recipe(edits[run % count]), encoding="utf-8")
        peers.merge(recipe, made / "theirs" / "model")
        return peers.ask(made / "theirs" / "model", made / "tasks", names, best, made / "theirs" / "said")

    pair = alternating(
        lambda run: ours.run_answer(two, edits, made / "rows.json", made / "ours.json"),
        theirs_once,
        plan.runs,
        lambda side: _without(made / side),
    )
    equal = _same_verdicts([pair.our_results[run][run % count] for run in range(plan.runs)], pair.their_results)
    peer = f"{MERGEKIT} and {HARNESS} --model hf from a shell, batch {best}; one of {count} measured, times {count}"
    return [row("sweep", peer, pair.ours, [count * seconds for seconds in pair.theirs], equal)]


def layer_sets(layers: int, size: int, count: int) -> list[tuple[int, ...]]:
    """Random sets of layers, the same each time."""
    drawn = random.Random(0)
    return [tuple(sorted(drawn.sample(range(layers), size))) for _ in range(count)]


def _asked(two: Two, problems: int, made: Path) -> tuple[list[str], int]:
    """Write problems for both sides into `made`; returns the names of the harness's tasks and its best batch size."""
    asked = rows(problems)
    (made / "rows.json").write_text(json.dumps(asked), encoding="utf-8")
    names, prompts = harness.write_tasks(made / "tasks", asked, 0), harness.asked(harness.Tasks(asked, 0, harness.MINERVA), None)
    return names, peers.best_batch(loading.load(two.base), prompts.prompts, prompts.stops, MAX_NEW_TOKENS)


def _same_verdicts(mine: Verdicts, theirs: Verdicts) -> str:
    """Whether every verdict of both metrics is equal."""
    pairs = [(one[name], said) for one, other in zip(mine, theirs, strict=True) for name, said in other.items()]
    return share(sum(one == other for one, other in pairs), sum(map(len, mine)))


def features(plan: Plan) -> Rows:
    """Sums of every layer's features: one pass over the texts, or one a layer. The memory is what each adds to what was held."""
    heard = Heard(plan.count(980, 14))
    found: dict[str, Any] = {}
    instruments = heard.instruments(range(heard.layers), 512)
    dictionaries = {layer: one.encode for layer, (one, _) in instruments.items()}
    saes = {layer: other.encode for layer, (_, other) in instruments.items()}

    def theirs_once() -> None:
        for layer, encode in saes.items():
            found["theirs"] |= heard.sums({layer: encode})

    pair = alternating(
        lambda run: peak(lambda: found.update(ours=heard.sums(dictionaries))),
        lambda run: peak(theirs_once),
        plan.runs,
        lambda side: found.update({side: {}}),
    )
    close = [
        torch.allclose(getattr(one.value(contrast), part), getattr(found["theirs"][layer].value(contrast), part), 1e-4, 1e-4)
        for layer, one in found["ours"].items()
        for contrast in CONTRASTS
        for part in ("weight", "total", "squares", "fires")
    ]
    peer = f"sae-lens {version('sae-lens')}, a pass a layer"
    memory = row("features_memory", f"{peer}, MiB added", pair.our_results, pair.their_results, "-")
    return [pair.row("features", peer, share(sum(close), len(close))), memory]


def reproduce(plan: Plan) -> Rows:
    """`make reproduce PROFILE=smoke` in a clone, cold and again. There is no peer."""
    clone = _clean(plan.home / "clone")
    for part in ("stetholib", "notebooks"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    home, figures = ["env", f"STETHOLIB_HOME={clone}", f"PYTHONPATH={clone}"], clone / "figures" / "smoke"
    found: list[tuple[dict[str, Any], dict[str, bytes]]] = []
    for work in ("reproduce", "reproduce_again"):
        started = time.perf_counter()
        process([*home, sys.executable, "-m", "stetholib", "reproduce", "--profile", "smoke"], ours.LOG, clone)
        seconds = time.perf_counter() - started
        made = {path.name: path.read_bytes() for path in figures.iterdir()}
        equal = "-" if not found else "yes" if made == found[-1][1] else "no"
        found.append((dict(work=work, peer="none", ours=seconds, theirs=None, ratio=None, equal=equal), made))
    return [said for said, _ in found]


WORKS: dict[str, Callable[[Plan], Rows]] = {
    work.__name__: work for work in (answer, answer_fewshot, export, lm_eval, recipe, edit, sweep, features, reproduce)
}
