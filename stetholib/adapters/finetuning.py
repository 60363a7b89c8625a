"""The fine-tune behind the task vector: transformers' Trainer, full or LoRA, on worked solutions.

Loss counts on solutions only. Embeddings, norms and everything else outside the seven matrices of each block stay
frozen, so that theta_0 + tau is the fine-tuned model itself. Training goes on from its last whole checkpoint.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from stetholib.data.prompts import prompt, target
from stetholib.editing import Lazy, TaskVector, rounded, survival
from stetholib.models.loading import LanguageModel
from stetholib.models.streams import Watch, tokenize, unwatched
from stetholib.models.weights import Weights, edit_weights, weight_names
from stetholib.profiles import FineTune
from stetholib.store.files import atomic, file_hash

SAVE_EVERY = 300.0  # seconds
WHOLE = "whole.json"
ORDERS = "order-*.json"


class Examples(torch.utils.data.Dataset):
    """Tokenised examples; labels are -100 on the prompt."""

    def __init__(self, model: LanguageModel, rows: Sequence[Mapping[str, str]], style: str, max_tokens: int) -> None:
        """style: `minerva` ends targets with the harness's sentence, `plain` does not; EOS follows either way."""
        pairs = tokenize(model, [(prompt(row["problem"]), target(row["solution"], style)) for row in rows], max_tokens)
        eos = model.tokenizer.eos_token_id
        self.rows = [dict(input_ids=[*ids, eos], labels=[-100] * held + [*ids[held:], eos]) for ids, held in pairs]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad to the longest on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    pad = lambda name, fill: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])  # noqa: E731
    lengths = torch.tensor([len(row["input_ids"]) for row in rows]).unsqueeze(1)
    mask = (torch.arange(width).unsqueeze(0) < lengths).long()
    return dict(input_ids=pad("input_ids", 0), labels=pad("labels", -100), attention_mask=mask)


def trainable(base: LanguageModel, spec: FineTune) -> Any:
    """The model with gradients on the seven matrices of each block only, or on LoRA factors beside them."""
    model = base.model.requires_grad_(False)
    if spec.method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = [name.removesuffix(".weight") for name in weight_names(dict(model.named_parameters())).values()]
        return get_peft_model(model, LoraConfig(r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules=targets))
    for weight in edit_weights(model).values():
        weight.requires_grad_(True)
    return model


@dataclass(frozen=True)
class FineTuned:
    """A fine-tune: its exact change in float32 before it is stored, and its loss curve (step, loss in nats a token)."""

    exact: TaskVector
    curve: pd.DataFrame


def finetune(
    base: LanguageModel,
    rows: Sequence[Mapping[str, str]],
    spec: FineTune,
    unfinished: Path,
    seed: int,
    max_tokens: int,
    callbacks: Sequence[Any] = (),
    save_every: float = SAVE_EVERY,
) -> FineTuned:
    """Fine-tune `base` in place: afterwards its model is theta_1, in its own dtype, LoRA factors merged.

    unfinished: a folder that outlives a kill. A second call goes on from what was saved there, at most `save_every`
    seconds and a twentieth of the run ago, and its result is the same, byte for byte.
    """
    from transformers import PrinterCallback, set_seed

    set_seed(seed)
    weights = edit_weights(base.model)
    before = {where: weight.detach().cpu().float().clone() for where, weight in weights.items()} if spec.method == "full" else {}
    model = trainable(base, spec)
    trainer = _trainer(
        unfinished,
        model=model,
        args=_arguments(spec, unfinished, seed, base.device.type == "cpu"),
        train_dataset=Examples(base, rows, spec.target, max_tokens),
        data_collator=collate,
        callbacks=[*callbacks, _saving(unfinished, save_every)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_goes_on_from(unfinished))
    if spec.method == "lora":
        exact = lora_deltas(model)
        model.unload()
        with torch.no_grad():  # in float32 and rounded once, which peft's own merge into bfloat16 is not
            for where, delta in exact.deltas.items():
                weights[where].copy_(weights[where].float() + delta.to(base.device))
    else:
        exact = TaskVector(Lazy(before, lambda where: weights[where].detach().cpu().float() - before[where]))
    base.model.eval().requires_grad_(False)
    curve = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return FineTuned(exact, pd.DataFrame(curve, columns=["step", "loss"]))


def _trainer(unfinished: Path, **arguments: Any) -> Any:
    """A Trainer that keeps the order of each epoch's examples on disk, since no checkpoint holds it."""
    from transformers import Trainer
    from transformers.trainer_pt_utils import LengthGroupedSampler

    class Kept(LengthGroupedSampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            path = unfinished / f"order-{self.epoch}.json"
            if not path.is_file():
                order = json.dumps(list(super().__iter__()))
                atomic(path, lambda draft: draft.write_text(order, encoding="utf-8"))
            return iter(json.loads(path.read_text(encoding="utf-8")))

    class Resumable(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Kept:
            rows = self.train_dataset
            return Kept(self.args.train_batch_size * self.args.gradient_accumulation_steps, rows)

    return Resumable(**arguments)


def _arguments(spec: FineTune, unfinished: Path, seed: int, cpu: bool) -> Any:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(unfinished),
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        activation_checkpointing=spec.gradient_checkpointing,
        activation_checkpointing_kwargs=dict(use_reentrant=False),
        learning_rate=spec.learning_rate,
        num_train_epochs=spec.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        logging_steps=0.05,
        save_strategy="no",
        save_total_limit=2,  # the last one counts only once its hashes are written
        report_to=[],
        seed=seed,
        data_seed=seed,
        use_cpu=cpu,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would share each batch and change the result
    return arguments


def lora_deltas(model: torch.nn.Module) -> TaskVector:
    """B A, scaled, of every adapted matrix, in float32: what LoRA adds before any rounding."""
    from peft.tuners.lora import LoraLayer

    names: dict[str, Any] = {f"{name}.weight": part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    layers = {where: names[name] for where, name in weight_names(names).items()}
    return TaskVector(Lazy(layers, lambda where: layers[where].get_delta_weight("default").detach().float().cpu()))


def _saving(unfinished: Path, every: float) -> Any:
    """A callback that saves where a loss was just logged, so that a resumed run logs the same losses."""
    from transformers import TrainerCallback

    class Saving(TrainerCallback):
        last = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = time.monotonic() - self.last >= every and state.global_step < state.max_steps

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = time.monotonic()
            folder = unfinished / f"checkpoint-{state.global_step}"
            hashes = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
            hashes |= {f"../{path.name}": file_hash(path) for path in sorted(unfinished.glob(ORDERS))}
            atomic(folder / WHOLE, lambda draft: draft.write_text(json.dumps(hashes), encoding="utf-8"))

    return Saving()


def _goes_on_from(unfinished: Path) -> str | None:
    """The last whole checkpoint, the only one that is kept; what else there is cannot be relied on.
    Orders of examples that it does not vouch for are drawn again, and are the same."""
    found = last_whole(unfinished)
    known = json.loads(Path(found, WHOLE).read_text(encoding="utf-8")) if found else {}
    for checkpoint in unfinished.glob("checkpoint-*"):
        if str(checkpoint) != found:
            shutil.rmtree(checkpoint)
    for order in unfinished.glob(ORDERS):
        if f"../{order.name}" not in known:
            order.unlink()
    return found


def last_whole(unfinished: Path) -> str | None:
    """The last checkpoint whose files are all there and as they were written; None where there is none."""
    found = sorted(unfinished.glob(f"checkpoint-*/{WHOLE}"), key=lambda path: int(path.parent.name.split("-")[1]))
    for mark in reversed(found):
        with suppress(OSError, ValueError):
            if all(file_hash(mark.parent / name) == known for name, known in json.loads(mark.read_text()).items()):
                return str(mark.parent)
    return None


@dataclass(frozen=True)
class Report:
    """What a fine-tune leaves beside its model: its loss curve, and `survival` of the exact change as it is stored."""

    curve: pd.DataFrame
    stored: pd.DataFrame


def finetuned(
    base: LanguageModel,
    before: Weights,
    rows: Sequence[Mapping[str, str]],
    spec: FineTune,
    dtype: str,
    seed: int,
    max_tokens: int,
    *,
    folder: Path,
    unfinished: Path,
    watch: Watch = unwatched,
) -> Report:
    """theta_1, saved in `folder` in `dtype`, and how much of the exact change is left of it there.
    base: theta_0, which is trained in place; before: its weights as they are stored."""
    tuned = finetune(base, rows, spec, unfinished, seed, max_tokens, [_progress("01 fine-tune", watch)])
    kept = getattr(torch, dtype)
    stored = survival(tuned.exact, rounded(before, tuned.exact, kept))
    base.model.to(kept).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return Report(tuned.curve, stored)


def _progress(label: str, watch: Watch) -> Any:
    """A transformers callback that reports steps."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps = iter(watch(range(state.max_steps), label))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(self.steps, None)

    return Progress()
