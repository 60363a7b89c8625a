"""The fine-tune behind the task vector: transformers' Trainer, full or LoRA, on worked solutions.

Loss counts on solutions only. Embeddings, norms and everything else outside the seven matrices of each block stay
frozen, so that theta_0 + tau is the fine-tuned model itself. Training goes on from its last whole checkpoint. Where a LoRA's
readers read from is mostly where its A began, so A as training started from it is kept beside the model.
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
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from stetholib.editing import Lazy, TaskVector, rounded, survival
from stetholib.errors import UserError
from stetholib.models.loading import LanguageModel
from stetholib.models.streams import Texts, Watch, tokenize, unwatched
from stetholib.models.weights import WEIGHTS, Weights, edit_weights, weight_names
from stetholib.profiles import FineTune
from stetholib.store.files import atomic, file_hash

SAVE_EVERY = 300.0  # seconds
WHOLE = "whole.json"
START = "lora_start"  # the folder of A as initialised, [lora_rank, d_in] under the name of the weight that it reads for
BESIDE = ("order-*.json", f"{START}/{WEIGHTS}")  # files that a checkpoint stands on and does not hold
SCALING = 2  # alpha over rank
RESIDUAL = ("pissa", "olora")  # starts that move a part of each weight out of the base, into B A
EVA_BATCHES = 200


class Examples(torch.utils.data.Dataset):
    """Tokenised examples of (context, text): the text and EOS count, labels are -100 on the context."""

    def __init__(self, model: LanguageModel, texts: Texts, max_tokens: int) -> None:
        """texts: cut at `max_tokens`."""
        pairs, eos = tokenize(model, texts, max_tokens), model.tokenizer.eos_token_id
        self.rows = [dict(input_ids=[*ids, eos], labels=[-100] * held + [*ids[held:], eos]) for ids, held in pairs]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def collate(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad to the longest on the right."""
    masked = [dict(row, attention_mask=[1] * len(row["input_ids"])) for row in rows]
    fills = dict(input_ids=0, labels=-100, attention_mask=0)
    return {name: pad_sequence([torch.tensor(row[name]) for row in masked], True, fill) for name, fill in fills.items()}


def trainable(base: LanguageModel, spec: FineTune, examples: Examples) -> Any:
    """The model with gradients on the seven matrices of each block only, or on LoRA factors beside them, which begin as
    `lora_start` says. Raises UserError where `eva` finds no directions for that rank."""
    model = base.model.requires_grad_(False)
    if spec.method == "lora":
        from peft import EvaConfig, LoraConfig, get_peft_model

        eva, names = spec.lora_start == "eva", weight_names(dict(model.named_parameters()))
        how: Any = True if spec.lora_start == "kaiming" else spec.lora_start
        config = LoraConfig(
            r=spec.lora_rank,
            lora_alpha=SCALING * spec.lora_rank,
            target_modules=[name.removesuffix(".weight") for name in names.values()],
            init_lora_weights=how,
            eva_config=EvaConfig(rho=1.0) if eva else None,  # the same rank everywhere
        )
        adapted = get_peft_model(model, config, low_cpu_mem_usage=eva)
        if eva:
            _begin_on_activations(adapted, spec, examples)
        return adapted
    for weight in edit_weights(model).values():
        weight.requires_grad_(True)
    return model


def _begin_on_activations(model: Any, spec: FineTune, examples: Examples) -> None:
    """EVA (arXiv 2410.07170): A begins on the principal directions of what each matrix reads where a solution is."""
    from peft import initialize_lora_eva_weights

    left, width = iter(range(EVA_BATCHES)), min(a.shape[1] for _, a in lora_factors(model).values())
    if spec.lora_rank > width:
        raise UserError(f"finetune.lora_rank: {spec.lora_rank} is above the width {width}, where eva has no direction; lower it")

    def forward(model: Any, batch: Mapping[str, torch.Tensor]) -> None:
        if next(left, None) is None:  # peft would go on for ever
            raise UserError(
                f"finetune.lora_start: eva finds no steady {spec.lora_rank} directions in {EVA_BATCHES} batches; "
                "lower finetune.lora_rank, or take another start"
            )
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1)

    loader = torch.utils.data.DataLoader(examples, spec.batch_size * spec.gradient_accumulation, collate_fn=collate)
    initialize_lora_eva_weights(model, loader, forward_fn=forward, show_progress_bar=False)


@dataclass(frozen=True)
class FineTuned:
    """A fine-tune: its exact change in float32 before it is stored, and its loss curve (step, loss in nats a token)."""

    exact: TaskVector
    curve: pd.DataFrame


def finetune(
    base: LanguageModel,
    texts: Texts,
    spec: FineTune,
    unfinished: Path,
    seed: int,
    max_tokens: int,
    callbacks: Sequence[Any] = (),
    save_every: float = SAVE_EVERY,
) -> FineTuned:
    """Fine-tune `base` in place: afterwards its model is theta_1, in its own dtype, LoRA factors merged.

    texts: (prompt, gold solution); unfinished: a folder that outlives a kill. A second call goes on from what was saved there, at
    most `save_every` seconds and a twentieth of the run ago, and its result is the same, byte for byte.
    """
    from transformers import set_seed

    set_seed(seed)
    lora, weights, examples = spec.method == "lora", edit_weights(base.model), Examples(base, texts, max_tokens)
    moved = weights if not lora or spec.lora_start in RESIDUAL else {}
    before = {where: weight.detach().to("cpu", copy=True) for where, weight in moved.items()}
    model = trainable(base, spec, examples)
    taken = lora_deltas(model) if lora and before else None
    curve = trained(model, examples, spec, unfinished, seed, [*callbacks, saving(unfinished, save_every)])
    if lora:
        exact = lora_deltas(model) - taken if taken else lora_deltas(model)
        model.unload()
        with torch.no_grad():  # in float32 and rounded once, which peft's own merge into bfloat16 is not
            for where, delta in exact.deltas.items():
                whole = before.get(where, weights[where]).to(base.device)
                weights[where].copy_(whole.float() + delta.to(base.device))
    else:
        exact = TaskVector(Lazy(before, lambda where: weights[where].detach().cpu().float() - before[where].float()))
    return FineTuned(exact, curve)


def trained(
    model: Any, examples: Examples, spec: FineTune, unfinished: Path, seed: int, callbacks: Sequence[Any]
) -> pd.DataFrame:
    """Train a model in place from where `unfinished` left it, and freeze it: columns step and loss, in nats a token. Where it is
    a LoRA, its A as training starts is written beside the checkpoints."""
    from transformers import PrinterCallback

    how = dict(args=arguments_of(spec, unfinished, seed, model.device.type == "cpu"), callbacks=callbacks)
    trainer = trainer_of(unfinished, model=model, train_dataset=examples, data_collator=collate, **how)
    trainer.remove_callback(PrinterCallback)
    last, start = goes_on_from(unfinished), unfinished / START / WEIGHTS
    if spec.method == "lora" and not start.is_file():  # where training goes on, it is there
        a = {name: one.cpu().contiguous() for name, (_, one) in lora_factors(model).items()}
        atomic(start, lambda draft: save_file(a, draft))
    trainer.train(resume_from_checkpoint=last)
    model.eval().requires_grad_(False)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return pd.DataFrame(losses, columns=["step", "loss"])


def trainer_of(unfinished: Path, **arguments: Any) -> Any:
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
            return Kept(self.args.train_batch_size * self.args.gradient_accumulation_steps, self.train_dataset)

    return Resumable(**arguments)


def arguments_of(spec: FineTune, unfinished: Path, seed: int, cpu: bool) -> Any:
    """What a Trainer is told of a fine-tune; it prints nothing, and saves when `saving` says so."""
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


def lora_factors(model: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    """Copies of B [d_out, lora_rank] and A [lora_rank, d_in] as they are now, in float32, by the name of the weight beside them."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, part in model.get_base_model().named_modules():
        if isinstance(part, LoraLayer):
            sides = (getattr(part, side)["default"].weight for side in ("lora_B", "lora_A"))
            found[f"{name}.weight"] = tuple(side.detach().float().clone() for side in sides)
    return found


def lora_deltas(model: Any) -> TaskVector:
    """B A, scaled, of every adapted matrix as its factors are now, in float32: what LoRA adds before any rounding."""
    factors = lora_factors(model)
    names = weight_names(factors)
    return TaskVector(Lazy(names, lambda where: (factors[names[where]][0] @ factors[names[where]][1] * SCALING).cpu()))


def saving(unfinished: Path, every: float) -> Any:
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
            hashes |= {f"../{path.relative_to(unfinished)}": file_hash(path) for path in _beside(unfinished)}
            atomic(folder / WHOLE, lambda draft: draft.write_text(json.dumps(hashes), encoding="utf-8"))

    return Saving()


def _beside(unfinished: Path) -> list[Path]:
    return [path for pattern in BESIDE for path in sorted(unfinished.glob(pattern))]


def goes_on_from(unfinished: Path) -> str | None:
    """The last whole checkpoint, the only one that is kept; what else there is cannot be relied on.
    Orders of examples, and the A of a LoRA, that it does not vouch for are drawn again, and are the same."""
    found = last_whole(unfinished)
    known = json.loads(Path(found, WHOLE).read_text(encoding="utf-8")) if found else {}
    for checkpoint in unfinished.glob("checkpoint-*"):
        if str(checkpoint) != found:
            shutil.rmtree(checkpoint)
    for path in _beside(unfinished):
        if f"../{path.relative_to(unfinished)}" not in known:
            path.unlink()
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


def kept_in(base: LanguageModel, exact: TaskVector, before: Weights, dtype: str, folder: Path) -> pd.DataFrame:
    """Save a model that was tuned in place, with its tokenizer, in `dtype`: how much of the exact change is left there, of `survival`."""
    kept = getattr(torch, dtype)
    stored = survival(exact, rounded(before, exact, kept))
    base.model.to(kept).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return stored


def finetuned(
    base: LanguageModel,
    before: Weights,
    texts: Texts,
    spec: FineTune,
    dtype: str,
    seed: int,
    max_tokens: int,
    *,
    folder: Path,
    unfinished: Path,
    watch: Watch = unwatched,
) -> Report:
    """theta_1, saved in `folder` in `dtype`, with the A that a LoRA began with, and how much of the exact change is left there.
    base: theta_0, which is trained in place; before: its weights as they are stored; texts: (prompt, gold solution)."""
    tuned = finetune(base, texts, spec, unfinished, seed, max_tokens, [showing("01 fine-tune", watch)])
    stored = kept_in(base, tuned.exact, before, dtype, folder)
    if spec.method == "lora":
        atomic(folder / START / WEIGHTS, lambda draft: shutil.copy(unfinished / START / WEIGHTS, draft))  # beside no weights
    return Report(tuned.curve, stored)


def showing(label: str, watch: Watch) -> Any:
    """A transformers callback that reports steps."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps = iter(watch(range(state.max_steps), label))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            next(self.steps, None)

    return Progress()
