"""The fine-tune behind the task vector: transformers' Trainer, full or LoRA, on worked solutions.

Loss counts on solutions only. Embeddings, norms and everything else outside the seven matrices of each block stay
frozen, so that theta_0 + tau is the fine-tuned model itself.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from stetholib.minerva_math import prompt, target
from stetholib.models import LanguageModel, edit_weights, tokenize
from stetholib.profiles import FineTune

LORA_TARGETS = [f"{matrix}_proj" for matrix in ("q", "k", "v", "o", "gate", "up", "down")]


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


def trainable(base: LanguageModel, spec: FineTune) -> torch.nn.Module:
    """The model with gradients on the seven matrices of each block only, or on LoRA factors beside them."""
    model = base.model.requires_grad_(False)
    if spec.method == "lora":
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules=LORA_TARGETS))
    for weight in edit_weights(model).values():
        weight.requires_grad_(True)
    return model


def finetune(
    base: LanguageModel,
    rows: Sequence[Mapping[str, str]],
    spec: FineTune,
    folder: Path,
    seed: int,
    max_tokens: int,
    callbacks: Sequence[Any] = (),
) -> pd.DataFrame:
    """Fine-tune `base` in place and save it in `folder`; returns the loss curve (columns step, loss in nats a token).

    LoRA is merged into the weights before saving, so that either method leaves a plain checkpoint.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

    set_seed(seed)
    model = trainable(base, spec)
    examples = Examples(base, rows, spec.target, max_tokens)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        num_train_epochs=spec.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",
        logging_steps=0.05,
        save_strategy="no",
        report_to=[],
        seed=seed,
        data_seed=seed,
        use_cpu=base.device.type == "cpu",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    merged = model.merge_and_unload() if spec.method == "lora" else model
    merged.eval().requires_grad_(False).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    curve = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return pd.DataFrame(curve, columns=["step", "loss"])
