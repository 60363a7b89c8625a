from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from stetholib import editing
from stetholib.adapters import finetuning
from stetholib.data.mini import problems
from stetholib.data.prompts import prompt, target
from stetholib.editing import TaskVector, rounded, survival, survival_shares
from stetholib.errors import UserError
from stetholib.models import loading, weights
from stetholib.models.weights import Checkpoint
from stetholib.profiles import load
from stetholib.profiles.schema import FineTune

ROWS = problems.generate("train", dict.fromkeys(problems.SUBJECTS, 15), 0)
TEXTS = [(prompt(row["problem"]), target(row["solution"])) for row in ROWS]
SPEC = replace(load("smoke").finetune, epochs=2.0, lora_rank=2)
STARTS = FineTune.__dataclass_fields__["lora_start"].metadata["choices"]


def test_loss_counts_on_the_solution_and_eos_only(toy):
    row = finetuning.Examples(toy, TEXTS[:1], 256)[0]
    held = row["labels"].count(-100)
    assert row["input_ids"][held:] == row["labels"][held:] and row["labels"][-1] == toy.tokenizer.eos_token_id
    assert toy.tokenizer.decode(row["input_ids"][1:held]).endswith("\n\nSolution:")
    assert toy.tokenizer.decode(row["labels"][held:-1]).endswith("I hope it is correct.")


def test_without_a_bos_a_fine_tune_sees_the_opening_that_is_asked(bare):
    row, asked = finetuning.Examples(bare, TEXTS[:1], 256)[0], prompt(ROWS[0]["problem"])
    assert bare.tokenizer.decode(row["input_ids"][:-1]) == asked + target(ROWS[0]["solution"])
    assert row["input_ids"][: (held := row["labels"].count(-100))] == bare.tokenizer(asked).input_ids[:held] and held > 5


def test_batches_are_padded_on_the_right_and_the_pad_is_masked(toy):
    rows = finetuning.Examples(toy, [(prompt(row["problem"]), target(row["solution"], "plain")) for row in ROWS[:4]], 256)
    batch = finetuning.collate([rows[i] for i in range(4)])
    for row, ids, labels, mask in zip(rows.rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        n = len(row["input_ids"])
        assert ids[:n].tolist() == row["input_ids"] and mask.sum() == n and (labels[n:] == -100).all()


def by(method, **given):
    """A fine-tune by `full`, by `lora`, or by a LoRA that starts in another way."""
    lora = {} if method == "full" else dict(method="lora", lora_start=method if method in STARTS else "kaiming")
    return replace(SPEC, **lora, **given)


@pytest.mark.parametrize("method", ["full", "lora", "pissa", "olora"])
def test_a_fine_tune_moves_the_seven_matrices_and_nothing_else(toy, tmp_path, method):
    before = {name: p.clone() for name, p in toy.model.named_parameters()}
    made = finetuning.finetune(toy, TEXTS, by(method, learning_rate=0.02), tmp_path, seed=0, max_tokens=256)
    assert made.curve["loss"].iloc[-3:].mean() < made.curve["loss"].iloc[:3].mean()
    after = dict(toy.model.named_parameters())
    assert list(after) == list(before) and not any(p.requires_grad for p in after.values())
    edited = set(weights.weight_names(before).values())
    assert {name for name, p in after.items() if not torch.equal(p, before[name])} == edited
    vector = TaskVector.between(before, after)
    for where, delta in vector.deltas.items():
        assert torch.allclose(made.exact.deltas[where], delta, atol=1e-6)
        rank = {"full": 32, "lora": 2}.get(method, 4)  # B A less what the start took out
        assert torch.linalg.matrix_rank(made.exact.deltas[where], atol=1e-5) <= rank


def test_lora_in_bfloat16_is_rounded_once_and_what_is_left_of_it_is_told(toy, tmp_path):
    toy.model.to(torch.bfloat16)
    before = {where: w.detach().clone() for where, w in weights.edit_weights(toy.model).items()}
    spec = replace(SPEC, method="lora", learning_rate=0.002, epochs=1.0)
    made = finetuning.finetune(toy, TEXTS, spec, tmp_path, seed=0, max_tokens=256)
    stored = survival(made.exact, rounded(before, made.exact, torch.bfloat16)).set_index(["layer", "matrix"])
    for where, weight in weights.edit_weights(toy.model).items():
        assert weight.dtype == torch.bfloat16 and made.exact.deltas[where].dtype == torch.float32
        assert torch.equal(weight, (before[where].float() + made.exact.deltas[where]).bfloat16())
        assert stored.loc[where, "unmoved"] == int((weight == before[where]).sum())
    shares = survival_shares(stored)
    assert 0.05 < shares["unmoved"] < 1 and 0 < shares["cosine"] < 0.999


def started(folder):
    """The A that a fine-tune in this folder keeps, by layer and matrix."""
    return dict(editing.weights(Checkpoint(folder / finetuning.START)).items())


class Seen(TrainerCallback):
    """A callback that copies each A as the first step finds it."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.a = {name: a.clone() for name, (_, a) in finetuning.lora_factors(model).items()}


@pytest.mark.parametrize("start", STARTS)
def test_the_a_that_is_kept_is_the_one_that_training_starts_from(toy, tmp_path, start):
    seen = Seen()
    finetuning.finetune(toy, TEXTS, by(start, epochs=0.5), tmp_path, 0, 256, [seen])
    kept, after = started(tmp_path), weights.edit_weights(toy.model)
    assert len(kept) == 14 and all(torch.equal(a, kept[where]) for where, a in editing.weights(seen.a).items())
    assert all(a.shape == (2, after[where].shape[1]) for where, a in kept.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", STARTS)
def test_a_lora_that_is_not_trained_is_no_change_wherever_it_starts_and_the_base_is_as_it_was(toy, tmp_path, start, dtype):
    toy.model.to(dtype)
    before = weights.weight_hash(toy.model)
    made = finetuning.finetune(toy, TEXTS, by(start, learning_rate=0.0, epochs=0.5), tmp_path, 0, 256)
    assert made.exact.energy() == 0 and weights.weight_hash(toy.model) == before


def test_eva_starts_where_each_matrix_reads_and_refuses_a_rank_that_is_not_there(toy, tokens, tmp_path, monkeypatch):
    spec = by("eva", learning_rate=0.0)
    finetuning.finetune(toy, TEXTS, spec, tmp_path / "a", 0, 256)
    kept, examples = started(tmp_path / "a"), finetuning.Examples(toy, TEXTS, 256)
    batch, read = finetuning.collate(examples.rows), []
    hook = toy.model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda part, given, out: read.append(given[0]))
    toy.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hook.remove()
    states = read[0][batch["labels"] != -100]
    best = torch.linalg.svd((states - states.mean(0)).double(), full_matrices=False).Vh[:2]
    cosines = torch.linalg.svdvals(best @ torch.linalg.qr(kept[1, "gate"].double().T)[0])
    assert torch.equal(kept[1, "gate"], kept[1, "up"]) and cosines.min() > 0.9
    with pytest.raises(UserError, match="lora_rank: 33 is above the width 32"):
        finetuning.finetune(toy, TEXTS, replace(spec, lora_rank=33), tmp_path / "b", 0, 256)
    monkeypatch.setattr(finetuning, "EVA_BATCHES", 1)
    other = loading.LanguageModel(fresh(tokens), tokens)  # the toy has factors beside its weights now
    with pytest.raises(UserError, match="eva finds no steady 2 directions in 1 batches"):
        finetuning.finetune(other, TEXTS, spec, tmp_path / "c", 0, 256)


@pytest.mark.parametrize("method", ["full", "lora", "pissa", "eva"])
def test_a_killed_fine_tune_goes_on_and_ends_with_the_same_bytes_and_losses(tokens, tmp_path, method):
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                raise Killed

    def run(folder, callbacks=(), save_every=0.0):
        model = loading.LanguageModel(fresh(tokens), tokens)
        made = finetuning.finetune(model, TEXTS, by(method, learning_rate=0.01), tmp_path / folder, 3, 256, callbacks, save_every)
        return made.curve.to_csv(), weights.weight_hash(model.model), kept(folder)

    def kept(folder):
        path = tmp_path / folder / finetuning.START / weights.WEIGHTS
        return path.read_bytes() if path.exists() else b""

    whole = run("whole", save_every=1e9)
    assert not list((tmp_path / "whole").glob("checkpoint-*"))
    with pytest.raises(Killed):
        run("killed", [Kill()])
    last = finetuning.last_whole(tmp_path / "killed")
    assert last.endswith("checkpoint-8") and kept("killed") == whole[2] and bool(whole[2]) == (method != "full")
    assert run("killed") == whole
    if method != "full":  # beside another A than training started from, no checkpoint is gone on from
        (tmp_path / "killed" / finetuning.START / weights.WEIGHTS).write_bytes(b"another")
        assert finetuning.last_whole(tmp_path / "killed") is None
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
        finetuning.finetune(model, TEXTS[:32], SPEC, tmp_path / name, seed=3, max_tokens=256)
        hashes.append(weights.weight_hash(model.model))
    assert hashes[0] == hashes[1]


def fresh(tokens):
    from transformers import Gemma3ForCausalLM

    from stetholib.data.mini import base

    torch.manual_seed(0)
    return Gemma3ForCausalLM(base.config(layers=1, hidden=16, vocab_size=len(tokens)))
