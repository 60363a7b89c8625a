from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stetholib.adapters import finetuning
from stetholib.data.mini import problems
from stetholib.data.prompts import prompt, target
from stetholib.editing import TaskVector, rounded, survival, survival_shares
from stetholib.models import loading, weights
from stetholib.profiles import load

ROWS = problems.generate("train", dict.fromkeys(problems.SUBJECTS, 15), 0)
SPEC = replace(load("smoke").finetune, epochs=2.0, lora_rank=2)


def test_loss_counts_on_the_solution_and_eos_only(toy):
    row = finetuning.Examples(toy, ROWS[:1], "minerva", 256)[0]
    held = row["labels"].count(-100)
    assert row["input_ids"][held:] == row["labels"][held:] and row["labels"][-1] == toy.tokenizer.eos_token_id
    assert toy.tokenizer.decode(row["input_ids"][1:held]).endswith("\n\nSolution:")
    assert toy.tokenizer.decode(row["labels"][held:-1]).endswith("I hope it is correct.")


def test_without_a_bos_a_fine_tune_sees_the_opening_that_is_asked(bare):
    row, asked = finetuning.Examples(bare, ROWS[:1], "minerva", 256)[0], prompt(ROWS[0]["problem"])
    assert bare.tokenizer.decode(row["input_ids"][:-1]) == asked + target(ROWS[0]["solution"])
    assert row["input_ids"][: (held := row["labels"].count(-100))] == bare.tokenizer(asked).input_ids[:held] and held > 5


def test_batches_are_padded_on_the_right_and_the_pad_is_masked(toy):
    rows = finetuning.Examples(toy, ROWS[:4], "plain", 256)
    batch = finetuning.collate([rows[i] for i in range(4)])
    for row, ids, labels, mask in zip(rows.rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        n = len(row["input_ids"])
        assert ids[:n].tolist() == row["input_ids"] and mask.sum() == n and (labels[n:] == -100).all()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_fine_tune_moves_the_seven_matrices_and_nothing_else(toy, tmp_path, method):
    before = {name: p.clone() for name, p in toy.model.named_parameters()}
    made = finetuning.finetune(toy, ROWS, replace(SPEC, method=method, learning_rate=0.02), tmp_path, seed=0, max_tokens=256)
    assert made.curve["loss"].iloc[-3:].mean() < made.curve["loss"].iloc[:3].mean()
    after = dict(toy.model.named_parameters())
    assert list(after) == list(before) and not any(p.requires_grad for p in after.values())
    edited = set(weights.weight_names(before).values())
    assert {name for name, p in after.items() if not torch.equal(p, before[name])} == edited
    vector = TaskVector.between(before, after)
    for where, delta in vector.deltas.items():
        assert torch.allclose(made.exact.deltas[where], delta, atol=1e-6)
        assert method == "full" or torch.linalg.matrix_rank(made.exact.deltas[where], atol=1e-5) <= 2


def test_lora_in_bfloat16_is_rounded_once_and_what_is_left_of_it_is_told(toy, tmp_path):
    toy.model.to(torch.bfloat16)
    before = {where: w.detach().clone() for where, w in weights.edit_weights(toy.model).items()}
    spec = replace(SPEC, method="lora", learning_rate=0.002, epochs=1.0)
    made = finetuning.finetune(toy, ROWS, spec, tmp_path, seed=0, max_tokens=256)
    stored = survival(made.exact, rounded(before, made.exact, torch.bfloat16)).set_index(["layer", "matrix"])
    for where, weight in weights.edit_weights(toy.model).items():
        assert weight.dtype == torch.bfloat16 and made.exact.deltas[where].dtype == torch.float32
        assert torch.equal(weight, (before[where].float() + made.exact.deltas[where]).bfloat16())
        assert stored.loc[where, "unmoved"] == int((weight == before[where]).sum())
    shares = survival_shares(stored)
    assert 0.05 < shares["unmoved"] < 1 and 0 < shares["cosine"] < 0.999


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_fine_tune_goes_on_and_ends_with_the_same_bytes_and_losses(tokens, tmp_path, method):
    from transformers import TrainerCallback

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                raise Killed

    def run(folder, callbacks=(), save_every=0.0):
        spec = replace(SPEC, method=method, learning_rate=0.01)
        model = loading.LanguageModel(fresh(tokens), tokens)
        made = finetuning.finetune(model, ROWS, spec, tmp_path / folder, 3, 256, callbacks, save_every)
        return made.curve.to_csv(), weights.weight_hash(model.model)

    whole = run("whole", save_every=1e9)
    assert not list((tmp_path / "whole").glob("checkpoint-*"))
    with pytest.raises(Killed):
        run("killed", [Kill()])
    last = finetuning.last_whole(tmp_path / "killed")
    assert last.endswith("checkpoint-8")
    assert run("killed") == whole
    order = tmp_path / "killed" / "order-0.json"
    drawn = order.read_text()
    order.write_text(drawn.replace("[", "[0, ", 1))  # an altered order of examples: from the start, with the order drawn again
    assert finetuning.last_whole(tmp_path / "killed") is None
    assert run("killed") == whole and order.read_text() == drawn
    kept = [Path(finetuning.last_whole(tmp_path / "killed"))]
    (kept[0] / "trainer_state.json").write_text("{}")  # a damaged checkpoint is not gone on from
    kept.append(Path(finetuning.last_whole(tmp_path / "killed")))
    (kept[1] / "trainer_state.json").unlink()
    assert kept[0] != kept[1] and finetuning.last_whole(tmp_path / "killed") is None


def test_the_same_seed_gives_the_same_bytes(tokens, tmp_path):
    hashes = []
    for name in ("a", "b"):
        model = loading.LanguageModel(fresh(tokens), tokens)
        finetuning.finetune(model, ROWS[:32], SPEC, tmp_path / name, seed=3, max_tokens=256)
        hashes.append(weights.weight_hash(model.model))
    assert hashes[0] == hashes[1]


def fresh(tokens):
    from transformers import Gemma3ForCausalLM

    from stetholib.data.mini import base

    torch.manual_seed(0)
    return Gemma3ForCausalLM(base.config(layers=1, hidden=16, vocab_size=len(tokens)))
