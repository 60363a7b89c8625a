"""Every architecture in the table, on tiny random models: where its norms stand, how their gains work, and that edits undo."""

from functools import partial

import pytest
import torch

from stetholib.editing import Edit, TaskVector, edited
from stetholib.errors import ModelError
from stetholib.models import loading, weights
from stetholib.models.architectures import ARCHITECTURES, architecture

KINDS = sorted(set(ARCHITECTURES) - {"gemma3"})  # which is gemma3_text with a vision tower beside it


def tiny(kind, words=40):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    config = AutoConfig.for_model(kind, vocab_size=words, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.randn(parameter.shape))
    return model


def passed(model):
    """What went into and came out of every module of the last block in one forward pass, by name; the block itself is ``."""
    seen, block = {}, weights.decoder_blocks(model)[1]
    first = lambda one: one[0] if isinstance(one, tuple) else one  # noqa: E731

    def keep(name, module, args, kwargs, output):
        seen[name] = (args[0] if args else kwargs.get("hidden_states"), first(output))

    hooks = [part.register_forward_hook(partial(keep, name), with_kwargs=True) for name, part in block.named_modules()]
    model(input_ids=torch.tensor([[2, 5, 9, 7]]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_gains_are_those_of_transformers_own_norms_where_they_stand(kind):
    model = tiny(kind)
    gains, seen, norms = loading.gains_of(loading.LanguageModel(model, None)), passed(model), ARCHITECTURES[kind].norms
    eps = model.config.rms_norm_eps
    scaled = lambda x, gain: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain  # noqa: E731
    close = partial(torch.allclose, atol=1e-5)
    into, out = seen[""]
    assert torch.equal(seen["input_layernorm"][0], into)
    middle = seen[norms["gate"]][0]  # the residual stream between attention and MLP
    for matrix, part in ((m, "mlp" if m in ("gate", "up", "down") else "self_attn") for m in weights.MATRICES):
        read, written = seen[f"{part}.{matrix}_proj"]
        gain = gains[1, matrix]
        if matrix in weights.READERS:
            assert close(read, scaled(seen[norms[matrix]][0], gain)), matrix
        else:
            change = middle - into if matrix == "o" else out - middle
            assert close(change, scaled(written, gain) if matrix in norms else written), matrix
            assert matrix in norms or torch.equal(gain, torch.ones(16))


@pytest.mark.parametrize("kind", KINDS)
def test_all_seven_matrices_are_edited_and_restored(kind):
    model = tiny(kind)
    before, held = weights.weight_hash(model), {where: w.clone() for where, w in weights.edit_weights(model).items()}
    assert len(held) == 14
    vector = TaskVector({where: torch.randn_like(w) for where, w in held.items()})
    with edited(model, Edit(vector, (0, 1))):
        assert all(torch.equal(w, held[where] + vector.deltas[where]) for where, w in weights.edit_weights(model).items())
    assert weights.weight_hash(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_one_is_loaded_with_the_same_bytes(kind, tokens, tmp_path):
    model = tiny(kind, len(tokens))
    model.save_pretrained(tmp_path), tokens.save_pretrained(tmp_path)
    assert weights.weight_hash(loading.load(tmp_path).model) == weights.weight_hash(model)


def test_one_that_is_not_in_the_table_is_refused_with_those_that_are():
    for kind in ("olmo2", "cohere", None, ["llama"]):
        with pytest.raises(ModelError, match="Gemma, Gemma 2, Gemma 3, Llama, Mistral, Qwen2, Qwen3, SmolLM3$"):
            architecture(kind, "model")
