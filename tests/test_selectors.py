"""Every rule that scores layers, where the answer is known; and the probes that the rules read."""

import numpy as np
import pytest
import torch

from stetholib import probes, selectors
from stetholib.data.mini import stories
from stetholib.data.prompts import closing, prompt, target
from stetholib.editing import TaskVector
from stetholib.layer_sets import select
from stetholib.models import streams, weights

NAN = float("nan")
ROWS = [("What is 1 + 2?", r"So $1 + 2 = \boxed{3}$."), ("Solve $2x = 8$.", r"So $x = \boxed{4}$."), ("What?", r"$\boxed{12}$.")]
TEXTS = [(prompt(problem), target(solution, "minerva")) for problem, solution in ROWS]
CLOSINGS = [closing(text) for _, text in TEXTS]


def test_the_rise_is_what_a_layer_adds_and_is_unknown_after_a_layer_without_a_score():
    assert selectors.rise([0.5, 0.7, NAN, 1.0, 0.9]).tolist() == pytest.approx([0.0, 0.2, NAN, NAN, -0.1], nan_ok=True)
    written = np.zeros(12)
    written[[2, 3, 8, 9]] = 1.0
    stream = [
        sum(0.8 ** (layer - at) * written[at] for at in range(layer + 1)) for layer in range(12)
    ]  # it decays as others write
    assert select(stream, 4) != (2, 3, 8, 9) == select(selectors.rise(stream), 4)


def test_the_excess_is_above_the_mean_of_the_dictionaries():
    found = selectors.excess([0.5, NAN, 0.9], np.array([[0.1, 0.2, 0.3], [0.3, 0.4, 0.9]]))
    assert found.tolist() == pytest.approx([0.3, NAN, 0.3], nan_ok=True)


def test_the_difference_of_means_is_cohens_d_and_judged_where_it_was_not_found():
    rng = np.random.default_rng(0)
    maths, half = np.arange(4000) < 2000, np.arange(4000) % 2 == 0
    noise = rng.normal(size=(4000, 8))
    shifted = noise + np.where(maths, 1.5, 0.0)[:, None] * np.eye(8)[3]
    assert selectors.mean_difference(shifted, maths, half) == pytest.approx(1.5, abs=0.1)
    few = rng.normal(size=(40, 300))  # more dimensions than documents: where it is found, any direction tells them apart
    seen = np.arange(40) % 2 == 0
    assert abs(selectors.mean_difference(few, np.arange(40) < 20, seen)) < 1.5


def test_what_a_rule_reads_off_gradients_is_known():
    along = np.array([[1.0, -2.0], [3.0, -4.0]])
    assert selectors.taylor(along).tolist() == [-2.0, 3.0]
    assert selectors.fisher(along**2).tolist() == [5.0, 10.0]
    aligned = selectors.off_principal([2.0, 3.0], np.array([[6.0, 0.0]]), np.array([[9.0, 1.0]]), [4.0, 1.0])
    assert aligned.tolist() == [2.0, 0.0]  # a gradient along the vector couples by 1, one across it by 0
    assert selectors.zero_ablation(1.0, [1.5, 0.9]).tolist() == pytest.approx([0.5, -0.1])


def test_signal_to_noise_is_high_for_few_directions_and_low_for_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 40))
    spiked = noise + 30 * np.outer(rng.normal(size=60), rng.normal(size=40)) / 10
    told = [selectors.signal_to_noise(np.linalg.svd(one, compute_uv=False), (60, 40)) for one in (noise, spiked)]
    assert told[1] > 0 and np.isfinite(told).all()
    assert selectors.signal_to_noise(np.zeros(4), (4, 4)) == 0.0
    low_rank = rng.normal(size=(60, 4)).astype("float32") @ rng.normal(size=(4, 40)).astype("float32")
    assert np.isnan(selectors.signal_to_noise(np.linalg.svd(low_rank, compute_uv=False), (60, 40)))  # as a LoRA's
    values, edge = np.array([5.0, 2.0, 1.0, 0.0]), (2.75 - 0.75) / 1.349 * 2
    assert edge < 5 and selectors.signal_to_noise(values, (4, 4)) == pytest.approx(5 / 3 / 5)


def test_places_select_what_their_names_say():
    chosen = {name: select(score, 4) for name, score in selectors.place(12).items()}
    assert chosen == {"first": (0, 1, 2, 3), "middle": (4, 5, 6, 7), "last": (8, 9, 10, 11)}
    assert select(selectors.place(30)["middle"], 10) == tuple(range(10, 20)) and select(selectors.place(5)["middle"], 2) == (1, 2)


def test_the_auroc_of_known_layers():
    assert selectors.auroc([0, 5, 4, 1], [1, 2]) == 1.0 and selectors.auroc([5, 0, 1, 4], [1, 2]) == 0.0
    assert selectors.auroc([1, 1, 1, 1], [1, 2]) == 0.5 and selectors.auroc([NAN, 1, 0, NAN], [1, 2]) == 1.0
    assert selectors.auroc([2, 1, 0], [0, 2]) == 0.5


def test_skipping_a_block_is_what_a_silent_block_does(toy):
    ids = torch.tensor([[2, 30, 31, 32, 33]])
    with torch.no_grad():
        with probes.skipped(toy.model, 1) as model:
            without = model(input_ids=ids).logits
        before = toy.model(input_ids=ids).logits
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            getattr(toy.model.model.layers[1], norm).weight.fill_(-1.0)
        assert torch.equal(toy.model(input_ids=ids).logits, without) and not torch.allclose(before, without)
    pool = streams.pool_of(toy, TEXTS, 64, 1000, CLOSINGS)
    assert np.allclose(probes.losses_skipping(toy, 1, pool).solution, streams.document_losses(toy.model, pool).solution)
    assert not any(block._forward_hooks for block in weights.decoder_blocks(toy.model))


@pytest.fixture()
def vector(toy):
    generator = torch.Generator().manual_seed(1)
    made = {where: torch.randn(weight.shape, generator=generator) for where, weight in weights.edit_weights(toy.model).items()}
    return TaskVector(made)


def test_couplings_are_the_slope_of_the_loss_along_the_vector(toy, vector):
    found = probes.couplings(toy, vector, TEXTS, CLOSINGS, 64)
    pool, step = streams.pool_of(toy, TEXTS, 64, 1000, CLOSINGS), 1e-4
    for layer in (0, 1):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for (at, _), weight, delta in zip(vector.deltas, weights.edit_weights(toy.model).values(), vector.deltas.values(), strict=True):  # fmt: skip
                    weight.add_(delta, alpha=sign * step if at == layer else 0.0)
            ends.append(streams.document_losses(toy.model, pool).solution)
            with torch.no_grad():
                for (at, _), weight, delta in zip(vector.deltas, weights.edit_weights(toy.model).values(), vector.deltas.values(), strict=True):  # fmt: skip
                    weight.sub_(delta, alpha=sign * step if at == layer else 0.0)
        assert np.allclose(found.along[:, layer], (ends[0] - ends[1]) / (2 * step), rtol=0.02, atol=0.02)


def test_couplings_are_those_of_autograd_one_problem_at_a_time_and_leave_no_trace(toy, vector):
    found = probes.couplings(toy, vector, TEXTS, CLOSINGS, 64)
    theirs = weights.edit_weights(toy.model)
    assert not any(
        weight.requires_grad or weight.grad is not None or weight._post_accumulate_grad_hooks for weight in theirs.values()
    )
    pool = streams.pool_of(toy, TEXTS[1:2], 64, 1000, CLOSINGS[1:2])
    for weight in theirs.values():
        weight.requires_grad_(True)
    loss = (streams.token_losses(toy.model, pool[0]) * (1 - pool[0].closing)).sum()
    grads = dict(zip(theirs, torch.autograd.grad(loss, list(theirs.values())), strict=True))
    for layer in (0, 1):
        of = [(grads[where].double(), vector.deltas[where].double()) for where in theirs if where[0] == layer]
        assert found.along[1, layer] == pytest.approx(sum(float((g * tau).sum()) for g, tau in of), rel=1e-4)
        assert found.squared[1, layer] == pytest.approx(sum(float(g.square().sum()) for g, _ in of), rel=1e-4)
        assert found.weighted[1, layer] == pytest.approx(sum(float((g * tau).square().sum()) for g, tau in of), rel=1e-4)


def test_a_documents_mean_is_of_its_tokens_without_the_first_and_without_outliers(toy):
    texts = stories.generate(3, 0, "validation")
    found = probes.document_means(toy, texts, 64, 300, {0: 1e9, 1: 1e9})
    ids = torch.tensor([toy.tokenizer(texts[1]).input_ids[:64]])
    with torch.no_grad(), streams.residual_stream(toy.model) as taken:
        toy.model(input_ids=ids)
    assert np.allclose(found[1][1], taken[1][0, 1:].double().mean(0), atol=1e-5)
    norms = taken[0][0, 1:].norm(dim=1)
    limit = float(norms.median())
    fewer = probes.document_means(toy, texts, 64, 300, {0: limit})
    assert np.allclose(fewer[0][1], taken[0][0, 1:][norms <= limit].double().mean(0), atol=1e-4)
