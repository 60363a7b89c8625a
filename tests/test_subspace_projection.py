from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from stetholib import subspace_projection as sp
from stetholib.calibration import planted_sums
from stetholib.editing import TaskVector
from stetholib.errors import UserError
from stetholib.models import subspaces
from stetholib.models.dictionary import Dictionary
from stetholib.models.weights import MATRICES, READERS, SIDE
from stetholib.profiles import load
from stetholib.sae_features import Heard, specificities
from stetholib.subspace_projection import Directions, Ranks

D, HIDDEN = 24, 40
SIDES = ("all", "reader", "writer")


def overlap(one, other):
    return float(subspaces.principal_cosines(one, other).square().mean())


@pytest.fixture(scope="module")
def vector():
    generator = torch.Generator().manual_seed(0)
    shape = {"reader": (HIDDEN, D), "writer": (D, HIDDEN)}
    return TaskVector({(layer, m): torch.randn(shape[SIDE[m]], generator=generator) for layer in range(2) for m in MATRICES})


@pytest.mark.parametrize("side", ["reader", "writer"])
def test_the_whole_space_keeps_everything_and_an_orthogonal_basis_nothing(vector, side):
    delta = vector.deltas[0, "q" if side == "reader" else "o"]
    whole = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    assert float(subspaces.energy_by_rank(delta, whole, side)[-1]) == pytest.approx(1, abs=1e-6)
    half, rest = whole[:, :10], whole[:, 10:]
    kept = subspaces.project(delta.double(), half, side)
    assert float(subspaces.energy_by_rank(kept, rest, side)[-1]) < 1e-20
    assert float(subspaces.energy_by_rank(delta, half, side)[-1]) == pytest.approx(
        float(kept.square().sum() / delta.double().square().sum()), rel=1e-10
    )


def test_projecting_twice_is_projecting_once(vector):
    q = torch.linalg.qr(torch.randn(D, 5, dtype=torch.float64))[0]
    once = subspaces.project(vector.deltas[0, "up"].double(), q, "reader")
    assert torch.allclose(once, subspaces.project(once, q, "reader"), atol=1e-12)


def planted_vector(layers, width, hidden, rank, share, seed):
    """A task vector of which exactly `share` of every matrix's energy lies in a known subspace of each block, with their bases."""
    generator = torch.Generator().manual_seed(seed)
    deltas, bases = {}, {}
    for layer in range(layers):
        q = subspaces.orthonormal(torch.randn(rank, width, generator=generator, dtype=torch.float64))
        bases[layer] = q
        for matrix in MATRICES:
            wide = torch.randn(hidden, width, generator=generator, dtype=torch.float64)
            inside = wide @ q @ q.T
            outside = wide - inside
            mixed = share**0.5 * inside / inside.norm() + (1 - share) ** 0.5 * outside / outside.norm()
            deltas[layer, matrix] = (mixed if SIDE[matrix] == "reader" else mixed.T).clone()
    return TaskVector(deltas), bases


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_planted_energy_is_found_to_a_millionth(share):
    planted, bases = planted_vector(layers=2, width=20, hidden=30, rank=3, share=share, seed=4)
    for (layer, matrix), delta in planted.deltas.items():
        assert float(subspaces.energy_by_rank(delta, bases[layer], SIDE[matrix])[-1]) == pytest.approx(share, abs=1e-6)
    assert sp.scalpel(planted, bases).energy() == pytest.approx(share * planted.energy(), abs=1e-6)


def test_a_random_subspace_keeps_its_share_of_the_width(vector):
    sites = {layer: Directions({"sae_decoder": torch.eye(D, dtype=torch.float64)[:, :6]}) for layer in range(2)}
    gains = {where: torch.ones(D) for where in vector.deltas}
    table = sp.measure(vector, sites, gains, Ranks(3, (1, 3, 6)), random_draws=60, seed=1)
    rows = table[table["basis"] == "random"]
    for rank, part in rows.groupby("rank"):
        error = part["energy_sd"] / np.sqrt(60)
        assert abs(part["energy_retained"].mean() - rank / D) < 3 * np.sqrt((error**2).sum()) / len(part)
        assert ((part["energy_retained"] - rank / D).abs() < 4.5 * error).all()


def test_own_svd_is_the_best_subspace_and_each_matrix_has_a_better_one(vector):
    best = sp.own_svd(vector, 0)
    for side, matrices in (("reader", ("q", "k", "v", "gate", "up")), ("writer", ("o", "down"))):
        total = sum(float(vector.deltas[0, m].double().square().sum()) for m in matrices)
        kept = sum(
            float(
                subspaces.energy_by_rank(vector.deltas[0, m], best[side][:, :4], side)[-1]
                * vector.deltas[0, m].double().square().sum()
            )
            for m in matrices
        )
        for seed in range(20):
            other = subspaces.random_basis(D, 4, torch.Generator().manual_seed(seed))
            rival = sum(
                float(
                    subspaces.energy_by_rank(vector.deltas[0, m], other, side)[-1] * vector.deltas[0, m].double().square().sum()
                )
                for m in matrices
            )
            assert rival < kept
        stacked = torch.cat(
            [vector.deltas[0, m].double() if side == "reader" else vector.deltas[0, m].double().T for m in matrices]
        )
        assert kept / total == pytest.approx(
            float(torch.linalg.svdvals(stacked)[:4].square().sum() / stacked.square().sum()), rel=1e-9
        )


def by_hand(reader, writer):
    """A block whose one reader and one writer have these energies along the axes of the residual stream; the rest is zero."""
    deltas = {(0, m): torch.zeros(4, 3) if SIDE[m] == "reader" else torch.zeros(3, 4) for m in MATRICES}
    deltas[0, "q"] = torch.cat([torch.diag(torch.tensor(reader).sqrt()), torch.zeros(1, 3)])
    deltas[0, "o"] = torch.cat([torch.diag(torch.tensor(writer).sqrt()), torch.zeros(3, 1)], 1)
    return TaskVector(deltas)


def test_the_best_subspace_of_a_layer_weighs_readers_and_writers_together():
    hand = by_hand([4.0, 1.0, 0.0], [1.0, 9.0, 0.0])
    best = sp.own_svd(hand, 0)
    assert [int(best[side][:, 0].abs().argmax()) for side in ("reader", "writer", "both")] == [0, 1, 1]
    kept = {name: sp.scalpel(hand, {0: basis[:, :1]}).energy() for name, basis in best.items()}
    assert kept == pytest.approx(dict(reader=5.0, writer=10.0, both=10.0))  # of 15; a subspace a side keeps 4 + 9
    gains = {where: torch.ones(3) for where in hand.deltas}
    sites = {0: Directions({"sae_decoder": torch.eye(3, dtype=torch.float64)[:, :2]})}
    table, energies = sp.measure(hand, sites, gains, Ranks(1, (1, 2)), random_draws=3, seed=0), hand.energies()
    whole = subspaces.split_loss(table, energies, 1)
    assert (whole.retained, whole.ceiling) == pytest.approx((5 / 15, 10 / 15))
    sides = subspaces.splits_by_side(table, energies, 1)
    assert sides["readers"].ceiling == pytest.approx(4 / 5) and sides["writers"].ceiling == pytest.approx(9 / 10)


def test_no_single_subspace_of_a_layer_keeps_more_than_its_own(vector):
    best, generator = sp.own_svd(vector, 1), torch.Generator().manual_seed(0)
    block = vector.restrict([1])
    rivals = [subspaces.random_basis(D, 4, generator) for _ in range(50)] + [best["reader"][:, :4], best["writer"][:, :4]]
    kept = sp.scalpel(block, {1: best["both"][:, :4]}).energy()
    assert all(sp.scalpel(block, {1: rival}).energy() < kept for rival in rivals)


def test_the_deviation_of_chance_bounds_that_of_one_random_subspace_a_layer(vector):
    sites = {layer: Directions({"sae_decoder": torch.eye(D, dtype=torch.float64)[:, :6]}) for layer in range(2)}
    gains = {where: torch.ones(D) for where in vector.deltas}
    uneven = vector.map(lambda where, delta: delta * (3.0 if where == (0, "up") else 1.0))
    table, energies = sp.measure(uneven, sites, gains, Ranks(3, (3,)), random_draws=400, seed=1), uneven.energies()
    generator, drawn = torch.Generator().manual_seed(7), []
    for _ in range(400):
        bases = {layer: subspaces.random_basis(D, 3, generator) for layer in uneven.layers}
        kept = {at: float(subspaces.energy_by_rank(d, bases[at[0]], SIDE[at[1]])[-1]) for at, d in uneven.deltas.items()}
        drawn.append({side: sum(e * kept[at] for at, e in energies.items() if side in ("all", SIDE[at[1]])) for side in SIDES})
    for side in SIDES:
        whole = sum(e for at, e in energies.items() if side in ("all", SIDE[at[1]]))
        split = subspaces.split_loss(table, energies, 3, **({} if side == "all" else dict(side=side)))
        true = np.std([one[side] for one in drawn], ddof=1) / whole
        assert 0.95 * true < split.chance_sd < 7**0.5 * true
        assert split.z == pytest.approx((split.retained - 3 / D) / split.chance_sd)
    assert np.isnan(subspaces.LossSplit(0.1, 0.3, 0.1, 0.0).z)


def table_of(vector, basis=None):
    ranks = Ranks(3, (1, 3, 6))
    basis = torch.linalg.qr(torch.randn(D, 6, dtype=torch.float64))[0] if basis is None else basis
    sites = {layer: Directions({"sae_decoder": basis, "sae_encoder": basis}) for layer in range(2)}
    generator = torch.Generator().manual_seed(3)
    gains = {where: 0.5 + torch.rand(D, generator=generator) for where in vector.deltas}
    return sp.measure(vector, sites, gains, ranks, random_draws=3, seed=0), sites, gains


def test_budget_and_misalignment_are_exactly_what_is_lost(vector):
    table, _, _ = table_of(vector)
    energies = vector.energies()
    for where in ({}, {"side": "reader"}, {"side": "writer"}):
        split = subspaces.split_loss(table, energies, 3, **where)
        assert split.rank_budget + split.misalignment == pytest.approx(1 - split.retained, abs=1e-12)
        assert split.ceiling >= split.retained


def test_the_index_is_zero_for_the_best_basis_and_one_for_a_random_one():
    assert subspaces.LossSplit(retained=0.4, ceiling=0.4, chance=0.1, chance_sd=0.01).index == 0
    assert subspaces.LossSplit(retained=0.1, ceiling=0.4, chance=0.1, chance_sd=0.01).index == 1
    assert np.isnan(subspaces.LossSplit(0.1, 0.1, 0.1, 0.01).index)


def test_pooling_weighs_matrices_by_their_energy(vector):
    table, sites, _ = table_of(vector)
    kept = (
        subspaces.pooled(subspaces.default_rows(table), vector.energies())
        .set_index(["basis", "rank"])
        .loc[("sae_decoder", 3), "energy_retained"]
    )
    projected = sp.scalpel(vector, {layer: site.by_name["sae_decoder"][:, :3] for layer, site in sites.items()})
    assert kept == pytest.approx(projected.energy() / vector.energy(), rel=1e-5)


def test_the_table_has_one_row_a_key_and_block_zero_keeps_its_own_site(vector):
    table, _, _ = table_of(vector)
    assert not table.duplicated(["layer", "matrix", "basis", "rank", "sae_layer", "gains"]).any()
    assert (table.loc[table["layer"] == 0, "sae_layer"] == 0).all()
    earlier = table[table["sae_layer"] != table["layer"]]
    assert set(earlier["matrix"]) == {"q", "k", "v", "gate", "up"} and (earlier["sae_layer"] == earlier["layer"] - 1).all()


def test_gains_carry_directions_through_the_norm(vector):
    """A reader behind gain D reads D v where the residual stream holds v; brute force on the product W D."""
    generator = torch.Generator().manual_seed(5)
    gain, v = 0.5 + torch.rand(D, generator=generator).double(), torch.randn(D, 2, generator=generator).double()
    q = subspaces.orthonormal(v.T)
    reader = subspaces.through_gain(q, gain, "reader", covector=False)
    assert torch.linalg.matrix_rank(torch.cat([reader, gain.unsqueeze(1) * v], 1)) == 2
    writer = subspaces.through_gain(q, gain, "writer", covector=False)
    assert torch.linalg.matrix_rank(torch.cat([gain.unsqueeze(1) * writer, v], 1)) == 2
    encoder = subspaces.through_gain(q, gain, "reader", covector=True)
    assert torch.linalg.matrix_rank(torch.cat([gain.unsqueeze(1) * encoder, v], 1)) == 2
    for basis in (reader, writer, encoder):
        assert torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64))
    ones = torch.ones(D, dtype=torch.float64)
    assert overlap(subspaces.through_gain(q, ones, "reader", covector=False), q) == pytest.approx(1)


def test_principal_angles_against_scipy():
    from scipy.linalg import subspace_angles

    a, b = (torch.linalg.qr(torch.randn(D, 4, dtype=torch.float64))[0] for _ in range(2))
    assert np.allclose(sorted(np.cos(subspace_angles(a.numpy(), b.numpy()))), sorted(subspaces.principal_cosines(a, b)))
    assert overlap(a, a) == pytest.approx(1)


def test_random_subspaces_overlap_by_rank_over_width():
    generator = torch.Generator().manual_seed(0)
    mean = np.mean(
        [overlap(subspaces.random_basis(D, 4, generator), subspaces.random_basis(D, 4, generator)) for _ in range(300)]
    )
    assert mean == pytest.approx(4 / D, abs=0.01)


def test_the_mechanism_finds_planted_gradients_and_activations():
    """Updates that are outer products of known gradients and activations align with them as the theory says."""
    generator = torch.Generator().manual_seed(0)
    act, grad = (subspaces.random_basis(D, 3, generator) for _ in range(2))
    deltas = {}
    for layer in range(2):
        for m in MATRICES:
            if SIDE[m] == "reader":
                deltas[layer, m] = torch.randn(HIDDEN, 3, generator=generator).double() @ act.T
            else:
                deltas[layer, m] = grad @ torch.randn(3, HIDDEN, generator=generator).double()
    sites = {
        layer: Directions({"sae_decoder": subspaces.random_basis(D, 3, generator), "activation_pca": act, "gradient_pca": grad})
        for layer in range(2)
    }
    found = sp.mechanism(TaskVector(deltas), sites, 3)
    mean = found.groupby(["side", "basis"])["overlap"].mean()
    assert mean["reader", "activation_pca"] == pytest.approx(1) and mean["writer", "gradient_pca"] == pytest.approx(1)
    assert mean["reader", "gradient_pca"] < 0.5 and mean["writer", "activation_pca"] < 0.5
    angles = found.groupby(["side", "basis"])["angle"].mean()
    assert angles["reader", "activation_pca"] < 0.1 and angles["writer", "activation_pca"] > 20


WIDE, RANK, LORA_RANK, LAYERS = 64, 5, 4, range(6)
FULL = load("smoke").finetune
LORA = replace(FULL, method="lora", lora_rank=LORA_RANK)


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def started(reads_from, seed=2):
    """The table of a vector whose readers read from `reads_from(A, SAE directions)`, [n, width], each with an A of its own."""
    generator, deltas, start, sites = torch.Generator().manual_seed(seed), {}, {}, {}
    for layer in LAYERS:
        names = ("sae_decoder", "activation_pca")
        sites[layer] = Directions({name: subspaces.random_basis(WIDE, RANK, generator) for name in names})
        for matrix in MATRICES:
            start[layer, matrix] = normal(LORA_RANK, WIDE, generator=generator).float()
            read = reads_from(start[layer, matrix], sites[layer].by_name["sae_decoder"].T).double()
            deltas[layer, matrix] = (normal(HIDDEN, len(read), generator=generator) @ read).float()
    return sp.lora_start(TaskVector(deltas), start, sites, RANK, random_draws=4, seed=0)


def near(values, expected):
    """Whether the mean of many measurements is what is expected, to three standard errors."""
    return abs(values.mean() - expected) < 3 * values.std() / len(values) ** 0.5


def test_readers_of_a_lora_whose_a_stays_read_from_where_it_began_and_every_basis_is_at_chance():
    table = started(lambda a, sae: a)
    assert list(zip(table["layer"], table["matrix"], strict=True)) == [(n, m) for n in LAYERS for m in READERS]
    assert table["overlap"].to_numpy() == pytest.approx(1, abs=1e-9) and set(table["chance"]) == {LORA_RANK / WIDE}
    assert set(table["lora_rank"]) == {LORA_RANK} and set(table["basis_chance"]) == {RANK / WIDE}
    for basis in ("sae_decoder", "activation_pca", "random"):
        assert near(table[f"{basis}_kept"], RANK / WIDE) and table[f"{basis}_left"].max() < 1e-9
    means = subspaces.lora_means(table)
    assert set(means.index) == {"sae_decoder", "activation_pca", "random"} and means["kept_of_rest"].isna().all()
    said = sp.lora_told(table, LORA)
    assert "LoRA of rank 4" in said and "**100.0%**" in said and "(chance 6.2%)" in said and "whatever SAEs do" in said


def test_readers_that_read_from_the_saes_directions_owe_nothing_to_where_a_began():
    table = started(lambda a, sae: sae)
    assert near(table["overlap"], LORA_RANK / WIDE) and table["sae_decoder_kept"].to_numpy() == pytest.approx(1)
    means = subspaces.lora_means(table)
    assert means.loc["sae_decoder", "kept"] == pytest.approx(1) and means.loc["sae_decoder", "kept_of_rest"] > 0.85
    assert means.loc["activation_pca", "kept_of_rest"] < 0.2 and (means["chance"] == RANK / WIDE).all()
    said = sp.lora_told(table, LORA)
    assert "whatever SAEs do" not in said and "most of it lies elsewhere" in said


def test_what_training_adds_beside_the_start_is_seen_once_the_start_is_taken_out():
    table = started(lambda a, sae: torch.cat([a.double(), 0.8 * sae]))
    means, share = subspaces.lora_means(table), 1 - (table["energy"] * (1 - table["overlap"])).sum() / table["energy"].sum()
    assert 0.9 < share < 1 and means.loc["sae_decoder", "kept"] < 0.2 and means.loc["sae_decoder", "kept_of_rest"] > 0.8
    said = sp.lora_told(table, replace(LORA, lora_start="eva"))
    assert f"LoRA of rank 4, started by eva: **{share:.1%}**" in said and "not with what was learnt" in said
    assert "SAEs" not in said


def test_a_vector_that_is_no_lora_is_said_to_be_none_and_of_a_given_one_nothing_is_known():
    full, given = sp.lora_told(None, FULL), sp.lora_told(None, replace(LORA, finetuned="mine/finetuned"))
    assert full.count(".") == 1 and "full fine-tune" in full and "cannot be the cause" in full
    assert given.count(".") == 1 and "not known" in given and "full fine-tune" not in given


def test_the_mechanism_test_follows_the_table_whichever_way_it_falls():
    def table(reader, writer):
        rows = [("reader", "activation_pca", reader), ("reader", "gradient_pca", 0.3)]
        rows += [("writer", "gradient_pca", writer), ("writer", "activation_pca", 0.3)]
        return pd.DataFrame(
            [dict(layer=i, side=s, basis=b, overlap=o + 0.01 * i * (o != 0.3)) for s, b, o in rows for i in range(10)]
        )

    held = subspaces.mechanism_test(table(0.6, 0.1)).set_index("side")
    assert held.loc["reader", "in_favour"] == 10 and held.loc["reader", "p"] == pytest.approx(2 / 2**10)
    assert held.loc["writer", "in_favour"] == 0 and held.loc["writer", "p"] == pytest.approx(2 / 2**10)
    same = subspaces.mechanism_test(table(0.3, 0.3))
    assert same["p"].tolist() == [1, 1] and same["in_favour"].tolist() == [0, 0]


def test_ranks_come_from_shares_of_the_width():
    assert Ranks.of(64, 0.03, [0.016, 0.25]) == Ranks(2, (1, 2, 16))
    assert Ranks.of(2560, 0.03, [0.03]) == Ranks(77, (77,))
    assert Ranks.of(4, 0.01, [2.0]) == Ranks(1, (1, 4))


def test_directions_that_cannot_span_their_rank_are_refused():
    with pytest.raises(UserError, match="above the width"):
        subspaces.orthonormal(torch.randn(5, 4))
    with pytest.raises(UserError, match="linearly dependent"):
        subspaces.orthonormal(torch.ones(2, 4))


def test_energy_outside_the_principal_subspaces_is_that_of_a_whole_decomposition():
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 20), (20, 12)):
        weight, delta = (torch.randn(shape, generator=generator) for _ in range(2))
        u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
        k = 1 + int((np.cumsum(s**2) < 0.5 * (s**2).sum()).sum())
        inside = u[:, :k] @ u[:, :k].T @ delta.double().numpy() @ vh[:k].T @ vh[:k]
        assert subspaces.outside_principal(delta, weight) == pytest.approx(float(((delta.numpy() - inside) ** 2).sum()), rel=1e-6)
        assert subspaces.outside_principal(weight, weight, share=1.0) == pytest.approx(0.0, abs=1e-8 * s[0] ** 2)
        assert subspaces.outside_principal(delta, torch.zeros(shape)) == pytest.approx(float(delta.square().sum()))


def test_where_fewer_features_fire_than_a_rank_the_basis_ends_there_and_below_the_default_rank_it_is_refused(vector):
    sums, corpus_of = planted_sums(layers=1, planted=0, effect=1.5, seed=0)
    rates = (sums[0].fires.sum(0) / sums[0].weight.sum()).sort(descending=True).values
    d_sae, generator = sums[0].total.shape[1], torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, D, generator=generator), dim=1)
    one = Dictionary(directions.T.contiguous(), torch.zeros(d_sae), directions, torch.zeros(D), torch.zeros(d_sae))
    moment = torch.eye(D, dtype=torch.float64)
    heard, few = {0: Heard(pd.DataFrame(), {"corpus.0": sums[0]}, {0: moment})}, float(rates[7])

    def found(minimum, default):
        ranks = Ranks(default, (default, 20))
        return sp.directions(heard, {0: one}, {0: moment}, corpus_of.tolist(), "cohen_d", minimum, ranks, [0])[0].by_name

    with torch.no_grad():
        firing = int(next(specificities([sums[0]], corpus_of, "cohen_d", few, False))[1].sum())
    assert 3 <= firing < 20
    bases = found(few, 3)
    assert [bases[name].shape[1] for name in ("sae_decoder", "sae_encoder", "activation_pca")] == [firing, firing, 20]
    with pytest.raises(UserError, match=f"{firing + 1} are needed but only {firing} fire often enough"):
        found(few, firing + 1)
    first = vector.restrict([0])
    gains = {where: torch.ones(D) for where in first.deltas}
    table = sp.measure(first, {0: Directions(bases)}, gains, Ranks(3, (3, 20)), 2, 0).query("gains == 'plain'")
    kept = table.query("basis == 'sae_decoder' and rank == 20").set_index("matrix")["energy_retained"]
    for (_, matrix), delta in first.deltas.items():
        assert kept[matrix] == pytest.approx(float(subspaces.energy_by_rank(delta, bases["sae_decoder"], SIDE[matrix])[-1]))
