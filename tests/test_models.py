import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stetholib.data import prompts
from stetholib.data.mini import tokenizer
from stetholib.errors import UserError
from stetholib.models import loading, streams, weights
from stetholib.models.weights import ModelError


def test_the_tap_reads_each_blocks_output_and_not_the_final_norm(toy):
    ids = torch.tensor([[2, 30, 31, 32]])
    with torch.no_grad(), streams.residual_stream(toy.model) as taken:
        hidden = toy.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert sorted(taken) == [0, 1]
    assert torch.equal(taken[0], hidden[1])
    assert not torch.allclose(taken[1], hidden[2])
    assert torch.allclose(toy.model.model.norm(taken[1]), hidden[2])


def test_the_tap_is_gone_afterwards(toy):
    with streams.residual_stream(toy.model) as taken:
        pass
    toy.model(input_ids=torch.tensor([[2, 30]]))
    assert not taken and not any(block._forward_hooks for block in weights.decoder_blocks(toy.model))


def test_losses_are_those_of_transformers(toy):
    pairs = streams.tokenize(toy, [("", "There are 12 boxes."), ("", "The train was late.")], 64)
    pool = streams.batches(pairs, 1000, "cpu")
    batch = pool[0]
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    reference = toy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
    assert streams.document_losses(toy.model, pool).mean("total") == pytest.approx(float(reference), rel=1e-5)


def test_only_what_follows_the_context_is_scored(toy):
    pairs = streams.tokenize(toy, [("Problem:\nSolve", " the box.")], 64)
    (ids, held) = pairs[0]
    assert toy.tokenizer.decode(ids[held:]) == " the box."
    batch = streams.batches(pairs, 64, "cpu")[0]
    assert int(batch.scored.sum()) == len(ids) - held


def test_padding_and_batching_do_not_change_a_documents_loss(toy):
    texts = [("", "There are 12 boxes."), ("", "The train was late, and Ada asked what the sum of it is."), ("", "So what?")]
    pairs = streams.tokenize(toy, texts, 64)
    together = streams.document_losses(toy.model, streams.batches(pairs, 1000, "cpu"))
    alone = streams.document_losses(toy.model, streams.batches(pairs, 1, "cpu"))
    assert np.allclose(together.nats("total"), alone.nats("total"), rtol=1e-5) and not together.closing.any()


ROWS = [dict(problem="What is 1 + 2?", solution=r"So $1 + 2 = \boxed{3}$."), dict(problem="What?", solution=r"So $\boxed{12}$.")]


def solved(style="minerva"):
    """Prompts with gold solutions, and their closing sentences."""
    texts = [(prompts.prompt(row["problem"]), prompts.target(row["solution"], style)) for row in ROWS]
    return texts, [prompts.closing(text) for _, text in texts]


def test_the_closing_sentence_is_told_from_the_solution():
    (_, text), end = solved()[0][0], solved()[1][0]
    assert end == "\nFinal Answer: The final answer is $3$. I hope it is correct." and text.endswith(end)
    assert solved("plain")[1] == ["", ""] and text.removesuffix(end) == solved("plain")[0][0][1]


def test_the_tokens_of_the_closing_sentence_are_known(toy):
    texts, ends = solved()
    for batch in streams.pool_of(toy, texts, 256, 1000, ends):
        for row, index in enumerate(batch.documents):
            said = [toy.tokenizer.decode(batch.input_ids[row][batch.closing[row].bool()]), ends[index]]
            assert said[0] == said[1], said
            assert toy.tokenizer.decode(batch.input_ids[row][batch.scored[row].bool()]) == texts[index][1]
    assert not any(batch.closing.any() for batch in streams.pool_of(toy, texts, 256, 1000))
    assert not any(batch.closing.any() for batch in streams.pool_of(toy, texts[:1], 12, 1000, ends[:1])), (
        "the sentence is cut off"
    )


def test_a_problem_whose_prompt_fills_the_limit_has_no_loss_and_stops_nothing(toy):
    texts, ends = solved()
    (batch,) = streams.pool_of(toy, [(texts[0][0] * 9, texts[0][1])], 16, 1000, ends[:1], share=False)
    assert not batch.scored.any() and not streams.token_losses(toy.model, batch).any()


def test_a_token_that_spans_the_boundary_belongs_to_the_closing_sentence(toy):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    texts, ends = solved()
    splitter = pre_tokenizers.Split(Regex(r"\$\.\nFinal| ?[A-Za-z]+| ?\d|\s|[^\sA-Za-z\d]"), behavior="isolated")
    words = {word for context, text in texts for word, _ in splitter.pre_tokenize_str(context + text)}
    words |= {word for _, text in texts for word, _ in splitter.pre_tokenize_str(text.removesuffix(ends[0]))}
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *sorted(words)]
    made = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = splitter
    merging = loading.LanguageModel(toy.model, tokenizer.wrapped(made))
    (batch,) = streams.pool_of(merging, texts[:1], 256, 1000, ends[:1])
    said = [names[i] for i in batch.input_ids[0][batch.closing[0].bool()]]
    assert said[0] == "$.\nFinal" and "".join(said) == "$." + ends[0]
    before = [names[i] for i in batch.input_ids[0][(batch.scored - batch.closing)[0].bool()]]
    assert "".join(before) == texts[0][1].removesuffix("$." + ends[0])


def test_the_two_losses_are_the_whole_one_token_by_token(toy):
    texts, ends = solved()
    pool = streams.pool_of(toy, texts, 256, 1000, ends)
    losses = streams.document_losses(toy.model, pool)
    for batch in pool:
        each = streams.token_losses(toy.model, batch).double()
        for row, index in enumerate(batch.documents):
            closing = each[row][batch.closing[row].bool()].sum()
            solution = each[row][(batch.scored - batch.closing)[row].bool()].sum()
            assert losses.closing[index] == pytest.approx(float(closing), abs=1e-6) and closing > 0
            assert losses.solution[index] == pytest.approx(float(solution), abs=1e-6) and solution > 0
            assert losses.tokens[index] == int(batch.scored[row].sum())
    assert losses.mean() + losses.mean("closing") == pytest.approx(losses.mean("total"), abs=1e-12)
    plain = streams.document_losses(toy.model, streams.pool_of(toy, texts, 256, 1000))
    assert losses.mean("total") == pytest.approx(plain.mean("total"), abs=1e-6)
    first = np.array([True, False])
    assert losses.mean("closing", first) == pytest.approx(losses.closing[0] / losses.tokens[0])


TEXTS = [("", "There are 12 boxes."), ("Problem:\nSolve", " the box."), ("", "The train was late, and Ada asked.")]


def test_texts_of_a_tokenizer_that_adds_no_bos_have_none_and_their_losses_are_those_of_transformers(bare):
    pairs = streams.tokenize(bare, TEXTS, 64)
    assert [ids for ids, _ in pairs] == [bare.tokenizer(a + b, add_special_tokens=False).input_ids for a, b in TEXTS]
    losses = streams.document_losses(bare.model, streams.batches(pairs, 1000, "cpu"))
    assert not loading.opens_with_bos(bare.tokenizer)
    for at, (ids, held) in enumerate(pairs):
        labels = torch.tensor([[-100] * held + ids[held:]])  # the first one has nothing before it: transformers shifts it away
        reference = float(bare.model(input_ids=torch.tensor([ids]), labels=labels).loss)
        assert losses.nats("total")[at] / losses.tokens[at] == pytest.approx(reference, rel=1e-5)
        assert losses.tokens[at] == len(ids) - max(held, 1)


def opened_by(toy, template):
    """The toy with a tokenizer whose post-processor does this."""
    from tokenizers import processors

    tokens = copy.deepcopy(toy.tokenizer)
    tokens._tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 2)])
    return loading.LanguageModel(toy.model, tokens)


class Half:
    """A tokenizer that opens only short texts, or only long ones, with BOS."""

    bos_token, bos_token_id = "<bos>", 2

    def __init__(self, tokens, long):
        self._tokens, self._long = tokens, long

    def __call__(self, text):
        return self._tokens(text, add_special_tokens=(len(text) > 3) == self._long)


def test_a_bos_that_is_doubled_or_there_for_some_texts_only_is_refused(toy):
    once, none = opened_by(toy, "<bos> $A"), opened_by(toy, "$A")
    halves = [loading.LanguageModel(toy.model, Half(toy.tokenizer, long)) for long in (True, False)]
    long, short, own = ("", "There are boxes."), ("", "box"), ("<bos>", "box")
    for model, texts, said in (
        (opened_by(toy, "<bos> <bos> $A"), [short], "<bos> exactly once, found 2 in 'box'"),
        (once, [short, own], "<bos> exactly once, found 2 in '<bos>box'"),
        (none, [("<bos><bos>", "box")], "<bos> exactly once, found 2"),
        (none, [short, own], "<bos> never, found 1 in '<bos>box'"),
        (none, [own, short], "<bos> never, found 1 in '<bos>box'"),
        (halves[0], [short, long], "<bos> never, found 1 in 'There"),
        (halves[1], [short, long], "<bos> exactly once, found 0 in 'There"),
    ):
        with pytest.raises(ModelError, match=said) as refused:
            streams.tokenize(model, texts, 8)
        assert "\n" not in str(refused.value)
    inner = [("", "box<bos>box")]  # in the midst of a text it opens nothing
    assert [streams.tokenize(model, inner, 8)[0][0].count(2) for model in (once, none)] == [2, 1]
    assert [ids[:2].count(2) for ids, _ in streams.tokenize(none, [own, own], 8)] == [1, 1]  # as a chat template's


def test_gains_are_one_plus_w_for_gemma_and_w_for_llama(toy):
    block = weights.decoder_blocks(toy.model)[1]
    with torch.no_grad():
        block.post_feedforward_layernorm.weight.fill_(0.5)
        block.input_layernorm.weight.fill_(0.25)
    gains = loading.gains_of(toy)
    assert torch.all(gains[1, "down"] == 1.5) and torch.all(gains[1, "q"] == 1.25)

    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )
    with torch.no_grad():
        llama.model.layers[0].post_attention_layernorm.weight.fill_(0.5)
    gains = loading.gains_of(loading.LanguageModel(llama, None))
    assert torch.all(gains[0, "gate"] == 0.5) and torch.all(gains[0, "down"] == 1)
    assert len(weights.edit_weights(llama)) == 14


@pytest.fixture()
def saved(toy, tmp_path):
    """The toy in a folder, in shards, with a function that changes its tensors."""
    toy.model.save_pretrained(tmp_path, max_shard_size="20KB"), toy.tokenizer.save_pretrained(tmp_path)

    def change(act):
        for path in sorted(tmp_path.glob("*.safetensors")):
            tensors = load_file(path)
            act(tensors)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
        return tmp_path

    return change


GATE, NORM = "model.layers.1.mlp.gate_proj.weight", "model.layers.0.input_layernorm.weight"
CHANGES = {
    "renamed matrix": (
        lambda t: t.update({"model.layers.1.mlp.gat.weight": t.pop(GATE)}) if GATE in t else None,
        "gate_proj of layer 1",
    ),
    "renamed norm": (
        lambda t: t.update({"model.norms.weight": t.pop(NORM)}) if NORM in t else None,
        "is missing from the checkpoint",
    ),
    "leftover": (
        lambda t: t.update({"model.extra.weight": torch.ones(2)}) if NORM in t else None,
        "not a weight of this architecture",
    ),
    "transposed": (lambda t: t.update({GATE: t[GATE].T}) if GATE in t else None, "another shape"),
    "float16": (lambda t: t.update({k: v.half() for k, v in t.items()}), "float16"),
    "NaN": (lambda t: t[GATE].fill_(float("nan")) if GATE in t else None, "NaN or Inf"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_that_is_not_whole_and_sound_is_refused_with_the_tensor_that_is_wrong(saved, name):
    act, said = CHANGES[name]
    with pytest.raises(weights.ModelError, match=said) as refused:
        loading.load(saved(act))
    assert "\n" not in str(refused.value)


def test_a_shard_that_is_missing_or_cut_short_is_named(saved):
    folder = saved(lambda tensors: None)
    assert loading.load(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(weights.ModelError, match=f"{shard.name}.*not a whole safetensors"):
        loading.load(folder)
    shard.unlink()
    with pytest.raises(weights.ModelError, match=f"{shard.name} is missing"):
        loading.load(folder)


def test_pickled_weights_are_never_opened(tmp_path):
    torch.save({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        loading.load(tmp_path)


def test_the_hash_sees_a_single_flipped_bit(toy):
    before = weights.weight_hash(toy.model)
    weight = weights.edit_weights(toy.model)[0, "q"]
    with torch.no_grad():
        weight.view(torch.int32)[0, 0] ^= 1
    assert weights.weight_hash(toy.model) != before


def test_nan_and_inf_are_named_by_where_they_are():
    loading.check_finite({"the output of layer 0": torch.ones(3)})
    with pytest.raises(ModelError, match="the output of layer 3 holds NaN or Inf"):
        loading.check_finite({"the output of layer 2": torch.ones(3), "the output of layer 3": torch.tensor([1.0, float("inf")])})


def test_a_folder_without_its_configuration_or_tokenizer_is_refused_in_one_line(toy, tmp_path):
    toy.model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be read .*save it into the same folder"):
        loading.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="there is no config.json"):
        loading.load(tmp_path)


def test_a_tokenizer_that_cannot_pad_pads_with_its_end(toy, tokens, tmp_path):
    toy.model.save_pretrained(tmp_path)
    padless = copy.deepcopy(tokens)
    padless.pad_token = None
    padless.save_pretrained(tmp_path)
    assert loading.load(tmp_path).tokenizer.pad_token == tokens.eos_token


def four_shots(count=6):
    """Problems that open with four shots of many tokens, and their closing sentences."""
    opening = "".join(f"Problem:\nWhat is {i} + {i + 1}?\n\nSolution: It is {2 * i + 1} and not {i}.\n\n" for i in range(4))
    texts = [
        (opening + prompts.prompt(f"What is {i} + {i * i}?"), prompts.target(rf"It is $\boxed{{{i + i * i}}}$."))
        for i in range(count)
    ]
    return texts, [prompts.closing(text) for _, text in texts]


@pytest.mark.parametrize("window", [None, 24])
def test_an_opening_is_computed_once_and_changes_no_loss(toy, window, monkeypatch):
    config = toy.model.config
    monkeypatch.setattr(config, "sliding_window", window or config.sliding_window)
    model = toy if window is None else replace(toy, model=type(toy.model)(config).eval())
    if window:
        model.model.load_state_dict(toy.model.state_dict())
    texts, ends = four_shots()
    pools = [streams.pool_of(model, texts, 1000, 300, ends, share=share) for share in (True, False)]
    assert len(pools[0][0].opening) >= streams.OPENING and pools[1][0].opening == ()
    held = {index: int(batch.attention_mask[row].sum()) for batch in pools[0] for row, index in enumerate(batch.documents)}
    whole = {index: int(batch.attention_mask[row].sum()) for batch in pools[1] for row, index in enumerate(batch.documents)}
    assert all(whole[i] == held[i] + len(pools[0][0].opening) for i in held)
    once, plain = (streams.document_losses(model.model, pool) for pool in pools)
    for part in ("solution", "closing", "total"):
        assert np.allclose(once.nats(part), plain.nats(part), rtol=2e-5), part
    assert np.array_equal(once.tokens, plain.tokens)


def test_an_opening_is_no_part_of_what_is_cut_and_a_short_one_is_none(toy, monkeypatch):
    texts, ends = four_shots()
    (width,) = {batch.input_ids.shape[1] for batch in streams.pool_of(toy, texts, 12, 10_000, ends)}
    assert width == 12
    monkeypatch.setattr(toy.model.config, "max_position_embeddings", 90)
    with pytest.raises(
        UserError, match="tokens of opening and a problem make .*, the model's context is 90; lower evaluation.num_fewshot"
    ):
        streams.pool_of(toy, texts, 200, 10_000, ends)
    short = [(prompts.prompt(f"What is {i}?"), " So what?") for i in range(3)]
    assert streams.pool_of(toy, short, 256, 1000)[0].opening == ()
