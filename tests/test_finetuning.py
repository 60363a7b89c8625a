from dataclasses import replace

import pytest
import torch

from stetholib import finetuning, models
from stetholib.mini import problems
from stetholib.profiles import load
from stetholib.task_vectors import TaskVector

ROWS = problems.generate("train", dict.fromkeys(problems.SUBJECTS, 15), 0)
SPEC = replace(load("smoke").finetune, epochs=2.0, lora_rank=2)


def test_loss_counts_on_the_solution_and_eos_only(toy):
    row = finetuning.Examples(toy, ROWS[:1], "minerva", 256)[0]
    held = row["labels"].count(-100)
    assert row["input_ids"][held:] == row["labels"][held:] and row["labels"][-1] == toy.tokenizer.eos_token_id
    assert toy.tokenizer.decode(row["input_ids"][1:held]).endswith("\n\nSolution:")
    assert toy.tokenizer.decode(row["labels"][held:-1]).endswith("I hope it is correct.")


def test_batches_are_padded_on_the_right_and_the_pad_is_masked(toy):
    rows = finetuning.Examples(toy, ROWS[:4], "plain", 256)
    batch = finetuning.collate([rows[i] for i in range(4)])
    for row, ids, labels, mask in zip(rows.rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        n = len(row["input_ids"])
        assert ids[:n].tolist() == row["input_ids"] and mask.sum() == n and (labels[n:] == -100).all()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_fine_tune_moves_the_seven_matrices_and_nothing_else(toy, tmp_path, method):
    before = {name: p.clone() for name, p in toy.model.named_parameters()}
    curve = finetuning.finetune(toy, ROWS, replace(SPEC, method=method, learning_rate=0.02), tmp_path, seed=0, max_tokens=256)
    tuned = models.load(tmp_path)
    assert curve["loss"].iloc[-3:].mean() < curve["loss"].iloc[:3].mean()
    edited = set(models.weight_names(before).values())
    changed = {name for name, p in tuned.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == edited
    vector = TaskVector.between(before, dict(tuned.model.named_parameters()))
    if method == "lora":
        assert all(torch.linalg.matrix_rank(delta, atol=1e-5) <= 2 for delta in vector.deltas.values())


def test_the_same_seed_gives_the_same_bytes(tokens, tmp_path):
    from transformers import Gemma3ForCausalLM

    from stetholib.mini import base

    hashes = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(base.config(layers=1, hidden=16, vocab_size=len(tokens)))
        finetuning.finetune(models.LanguageModel(model, tokens), ROWS[:32], SPEC, tmp_path / name, seed=3, max_tokens=256)
        hashes.append(models.weight_hash(models.load(tmp_path / name).model))
    assert hashes[0] == hashes[1]
