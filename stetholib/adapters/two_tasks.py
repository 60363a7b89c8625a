"""A fine-tune of which it is known where its mathematics went: two tasks, each trained in its own blocks from theta_0, and added.

Mathematics is learnt by the named blocks alone. The others learn to tell a general text again. Neither task sees what the other
changed, so that the sum holds mathematics in the named blocks and something else in the rest. That a task vector is local is our
construction, and no finding.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from stetholib.adapters.finetuning import SAVE_EVERY, Examples, Report, kept_in, saving, showing, trained
from stetholib.editing import TaskVector
from stetholib.errors import UserError
from stetholib.models.loading import LanguageModel
from stetholib.models.streams import Texts, Watch, unwatched
from stetholib.models.weights import Key, Weights, edit_weights
from stetholib.profiles import FineTune


def learnt(
    base: LanguageModel, examples: Examples, blocks: set[int], spec: FineTune, seed: int, unfinished: Path, callback: object
) -> tuple[dict[Key, torch.Tensor], pd.DataFrame]:
    """What these blocks learn from examples, in float32 by matrix, and the losses on the way; the model is theta_0 again
    afterwards. unfinished: a folder that outlives a kill, from which a second call goes on."""
    from transformers import set_seed

    set_seed(seed)
    weights = edit_weights(base.model.requires_grad_(False))
    before = {where: weight.detach().clone() for where, weight in weights.items() if where[0] in blocks}
    for where in before:
        weights[where].requires_grad_(True)
    curve = trained(base.model, examples, spec, unfinished, seed, [callback, saving(unfinished, SAVE_EVERY)])
    with torch.no_grad():
        found = {where: (weights[where] - one).float().cpu() for where, one in before.items()}
        for where, one in before.items():
            weights[where].copy_(one)
    return found, curve


def two_tasks(
    base: LanguageModel,
    before: Weights,
    maths: Texts,
    general: Sequence[str],
    spec: FineTune,
    dtype: str,
    seed: int,
    max_tokens: int,
    *,
    folder: Path,
    unfinished: Path,
    watch: Watch = unwatched,
) -> Report:
    """theta_1 = theta_0 and what both tasks changed, saved in `folder` in `dtype`. maths: (prompt, gold solution), for
    `spec.blocks`; general: texts for the others, each as the context of itself; a task whose rate is 0 is left out. before:
    theta_0's matrices as they are stored. Raises UserError where both are, or where a block is not there."""
    weights, mine = edit_weights(base.model), set(spec.blocks or ())
    tasks = {
        "maths": (maths, mine, spec.learning_rate),
        "aside": ([(f"{text}\n", text) for text in general], {at for at, _ in weights} - mine, spec.aside_learning_rate),
    }
    if not any(rate for *_, rate in tasks.values()) or not mine < {at for at, _ in weights}:
        raise UserError("finetune.blocks: name some of the model's blocks, and a rate above 0 for a task")
    deltas, curves = {where: torch.zeros(weight.shape) for where, weight in weights.items()}, []
    for name, (texts, blocks, rate) in tasks.items():
        if rate:
            place, shown = unfinished / name, showing(f"01 fine-tune, {name}", watch)
            examples, at_rate = Examples(base, texts, max_tokens), replace(spec, learning_rate=rate)
            changed, curve = learnt(base, examples, blocks, at_rate, seed, place, shown)
            deltas |= changed
            curves.append(curve)
    with torch.no_grad():
        for where, weight in weights.items():
            weight.add_(deltas[where].to(weight.device))
    stored = kept_in(base, TaskVector(deltas), before, dtype, folder)
    return Report(curves[0], stored)
