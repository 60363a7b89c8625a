"""A fine-tune of which it is known where its mathematics went: two tasks, each trained in its own blocks from theta_0, and added.

Mathematics is learnt by the named blocks alone. The others learn to tell a general text again. Neither task sees what the other
changed, so that the sum holds mathematics in the named blocks and something else in the rest. That a task vector is local is our
construction, and no finding.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from stetholib.adapters.finetuning import (
    SAVE_EVERY,
    Examples,
    Report,
    arguments_of,
    collate,
    goes_on_from,
    kept_in,
    saving,
    showing,
    trainer_of,
)
from stetholib.editing import TaskVector
from stetholib.errors import UserError
from stetholib.models.loading import LanguageModel
from stetholib.models.streams import Texts, Watch, tokenize, unwatched
from stetholib.models.weights import Key, Weights, edit_weights
from stetholib.profiles import FineTune


class Told(Examples):
    """Tokenised examples of any (context, text): the text and EOS count."""

    def __init__(self, model: LanguageModel, texts: Texts, max_tokens: int) -> None:
        """texts: cut at `max_tokens`."""
        eos = model.tokenizer.eos_token_id
        pairs = tokenize(model, texts, max_tokens)
        self.rows = [dict(input_ids=[*ids, eos], labels=[-100] * held + [*ids[held:], eos]) for ids, held in pairs]


def twice(texts: Sequence[str]) -> list[tuple[str, str]]:
    """General texts, each as the context of itself."""
    return [(f"{text}\n", text) for text in texts]


def learnt(
    base: LanguageModel,
    texts: Texts,
    blocks: Sequence[int],
    spec: FineTune,
    rate: float,
    seed: int,
    max_tokens: int,
    unfinished: Path,
    callback: object,
) -> tuple[dict[Key, torch.Tensor], list[tuple[int, float]]]:
    """What these blocks learn from texts, in float32 by matrix, and the losses on the way; the model is theta_0 again afterwards.
    unfinished: a folder that outlives a kill, from which a second call goes on."""
    from transformers import PrinterCallback, set_seed

    set_seed(seed)
    weights = edit_weights(base.model.requires_grad_(False))
    before = {where: weight.detach().clone() for where, weight in weights.items() if where[0] in blocks}
    for where in before:
        weights[where].requires_grad_(True)
    arguments = arguments_of(spec, unfinished, seed, base.device.type == "cpu")
    arguments.learning_rate = rate
    kept = dict(model=base.model, args=arguments, train_dataset=Told(base, texts, max_tokens), data_collator=collate)
    trainer = trainer_of(unfinished, **kept, callbacks=[callback, saving(unfinished, SAVE_EVERY)])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=goes_on_from(unfinished))
    base.model.eval().requires_grad_(False)
    with torch.no_grad():
        found = {where: (weights[where] - one).float().cpu() for where, one in before.items()}
        for where, one in before.items():
            weights[where].copy_(one)
    return found, [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


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
    `spec.blocks`; general: texts for the others; a task whose rate is 0 is left out. before: theta_0's matrices as they are stored.
    Raises UserError where both are, or where a block is not there."""
    weights, mine = edit_weights(base.model), set(spec.blocks or ())
    tasks = {
        "maths": (maths, mine, spec.learning_rate),
        "aside": (twice(general), {at for at, _ in weights} - mine, spec.aside_learning_rate),
    }
    if not any(rate for *_, rate in tasks.values()) or not mine < {at for at, _ in weights}:
        raise UserError("finetune.blocks: name some of the model's blocks, and a rate above 0 for a task")
    deltas, curves = {where: torch.zeros(weight.shape) for where, weight in weights.items()}, []
    for name, (texts, blocks, rate) in tasks.items():
        if rate:
            place, shown = unfinished / name, showing(f"01 fine-tune, {name}", watch)
            changed, losses = learnt(base, texts, sorted(blocks), spec, rate, seed, max_tokens, place, shown)
            deltas |= changed
            curves.append(losses)
    with torch.no_grad():
        for where, weight in weights.items():
            weight.add_(deltas[where].to(weight.device))
    stored = kept_in(base, TaskVector(deltas), before, dtype, folder)
    return Report(pd.DataFrame(curves[0], columns=["step", "loss"]), stored)
