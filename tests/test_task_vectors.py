import pytest
import torch
from safetensors.torch import save_file

from stetholib import editing, task_vectors
from stetholib.commands import fabricate
from stetholib.editing import Edit, TaskVector, edited, matched_scales
from stetholib.models import subspaces, weights
from stetholib.models.weights import Checkpoint, ModelError
from stetholib.task_vectors import energy_elsewhere, measure, stable_rank


def state(layers=2, d=6, seed=0, dtype=torch.float32, prefix="model."):
    """A checkpoint with Llama-like names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(q=(d, d), k=(4, d), v=(4, d), o=(d, d), gate=(8, d), up=(8, d), down=(d, 8))
    found = {f"{prefix}embed_tokens.weight": torch.randn(10, d, generator=generator).to(dtype)}
    for layer in range(layers):
        for matrix, shape in shapes.items():
            part = "self_attn" if matrix in "qkvo" else "mlp"
            found[f"{prefix}layers.{layer}.{part}.{matrix}_proj.weight"] = torch.randn(shape, generator=generator).to(dtype)
    return found


@pytest.fixture()
def vector():
    return TaskVector.between(state(seed=0), state(seed=1))


def test_canonical_names_are_the_same_for_text_only_multimodal_and_llama_checkpoints():
    plain = weights.weight_names(state())
    nested = state(prefix="language_model.model.") | {"vision_tower.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    assert plain.keys() == weights.weight_names(nested).keys()
    assert all("vision" not in name for name in weights.weight_names(nested).values())


def test_a_missing_or_doubled_matrix_is_named():
    broken = state()
    del broken["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match="up_proj of layer 1 is missing"):
        weights.weight_names(broken)
    with pytest.raises(ModelError, match="both claim"):
        weights.weight_names(list(state()) + list(state(prefix="other.")))
    with pytest.raises(ModelError, match="no decoder block"):
        weights.weight_names(["a", "b"])


def test_the_algebra_is_that_of_vectors(vector):
    other = TaskVector.between(state(seed=2), state(seed=3))
    key = (1, "gate")
    both = (vector + other).deltas[key]
    assert torch.allclose(both, vector.deltas[key] + other.deltas[key])
    assert torch.allclose((both - other.deltas[key]), vector.deltas[key], atol=1e-6)
    assert (2 * vector).energy() == pytest.approx(4 * vector.energy())
    assert (vector - vector).energy() == 0
    assert torch.equal((-vector).deltas[key], -vector.deltas[key])
    assert len(vector.deltas) == 14 and next(iter(vector.deltas)) == (0, "down")


def test_energies_of_parts_add_up_to_the_whole(vector):
    parts = (
        vector.restrict([0]).energy()
        + vector.restrict([1], weights.READERS).energy()
        + vector.restrict([1], weights.WRITERS).energy()
    )
    assert parts == pytest.approx(vector.energy())


def test_unlike_checkpoints_are_refused_with_what_differs():
    other = state(seed=1)
    other["model.layers.0.self_attn.q_proj.weight"] = other["model.layers.0.self_attn.q_proj.weight"].half()
    with pytest.raises(ModelError, match="q_proj.weight is .6, 6. float32 in the base and .6, 6. float16"):
        TaskVector.between(state(), other).energy()
    other["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(ModelError, match="and .3, 3. float32 in the fine-tune"):
        TaskVector.between(state(), other).energy()
    halves = {name: tensor.bfloat16() for name, tensor in state(seed=1).items()}
    assert TaskVector.between(state(), halves, same_dtype=False).energy() > 0
    with pytest.raises(ModelError, match="extra.weight is in only one"):
        task_vectors.check_same_tensors(state(), state() | {"extra.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match="layer 2 is in only one"):
        TaskVector.between(state(), state(layers=3))
    bad = state(seed=1)
    bad["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN or Inf"):
        TaskVector.between(state(), bad).energy()


def test_vectors_of_different_matrices_cannot_be_added(vector):
    with pytest.raises(ModelError, match="different matrices"):
        vector + vector.restrict([0])
    wide = TaskVector.between(state(d=8, seed=0), state(d=8, seed=1))
    with pytest.raises(ModelError, match="in one vector"):
        (vector + wide).energy()
    with pytest.raises(ModelError, match="no layer 7"):
        vector.restrict([7])
    with pytest.raises(KeyError):
        vector.deltas[9, "q"]


def test_a_vector_of_two_folders_is_that_of_two_state_dicts(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        whole, folder = state(seed=seed), tmp_path / name
        folder.mkdir()
        names = sorted(whole)
        save_file({n: whole[n] for n in names[:5]}, folder / "model-00001-of-00002.safetensors")
        save_file({n: whole[n] for n in names[5:]}, folder / "model-00002-of-00002.safetensors")
    from_disk = TaskVector.between(Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b"))
    in_memory = TaskVector.between(state(seed=0), state(seed=1)).in_memory()
    assert from_disk.energies() == in_memory.energies()
    assert len(Checkpoint(tmp_path / "a")) == len(state())
    (tmp_path / "c").mkdir()
    with pytest.raises(ModelError, match="safetensors"):
        Checkpoint(tmp_path / "c")


def test_stable_rank_counts_equal_directions():
    assert stable_rank(torch.eye(5)) == pytest.approx(5)
    assert stable_rank(torch.ones(4, 3)) == pytest.approx(1)
    assert stable_rank(torch.zeros(4, 3)) == 0


def test_the_table_holds_worked_numbers():
    base, changed = state(), state()
    name = "model.layers.1.mlp.down_proj.weight"
    changed[name] = base[name] * 1.5
    vector = TaskVector.between(base, changed)
    matrices = {where: base[n] for where, n in weights.weight_names(base).items()}
    row = measure(matrices, vector).set_index(["layer", "matrix"]).loc[(1, "down")]
    assert row["side"] == "writer" and row["relative"] == pytest.approx(0.5) and row["energy_share"] == pytest.approx(1)
    assert row["delta_norm"] == pytest.approx(0.5 * float(base[name].norm()))


def test_energy_outside_the_seven_matrices_is_reported_by_kind():
    base, other = state(), state()
    other["model.embed_tokens.weight"] = base["model.embed_tokens.weight"] + 1
    assert energy_elsewhere(base, other) == {"embeddings": pytest.approx(60), "norms": 0, "other": 0}
    with pytest.raises(ModelError, match="only one"):
        energy_elsewhere(base, other | {"extra.weight": torch.zeros(1)})


def random_vector(model, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    matrices = weights.edit_weights(model)
    return TaskVector({where: scale * torch.randn(w.shape, generator=generator) for where, w in matrices.items()})


def test_scale_zero_and_no_layers_leave_every_byte(toy):
    before = weights.weight_hash(toy.model)
    vector = random_vector(toy.model)
    for edit in (Edit(vector, (0, 1), alpha=0.0), Edit(vector, ()), Edit(vector, (0,), matrices=())):
        with edited(toy.model, edit) as model:
            assert edit.is_empty and weights.weight_hash(model) == before


def test_an_edit_is_undone_to_the_byte_also_after_an_error(toy):
    before = weights.weight_hash(toy.model)
    with pytest.raises(RuntimeError, match="inside"), edited(toy.model, Edit(random_vector(toy.model), (0, 1))) as model:
        assert weights.weight_hash(model) != before
        raise RuntimeError("inside")
    assert weights.weight_hash(toy.model) == before


def test_an_edit_equals_a_merge_by_state_dict(toy):
    from copy import deepcopy

    vector = random_vector(toy.model)
    merged = deepcopy(toy.model)
    names = weights.weight_names(merged.state_dict())
    merged.load_state_dict(
        {
            n: (t + 0.5 * vector.deltas[w] if (w := {v: k for k, v in names.items()}.get(n)) and w[0] == 1 else t)
            for n, t in merged.state_dict().items()
        }
    )
    with edited(toy.model, Edit(vector, (1,), alpha=0.5)) as model:
        assert weights.weight_hash(model) == weights.weight_hash(merged)


def test_an_edit_touches_only_its_layers_and_matrices(toy):
    before = {name: p.clone() for name, p in toy.model.named_parameters()}
    with edited(toy.model, Edit(random_vector(toy.model), (1,), matrices=("o",))) as model:
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.layers.1.self_attn.o_proj.weight"]


def test_an_edit_that_does_not_fit_is_refused_before_anything_is_touched(toy):
    before = weights.weight_hash(toy.model)
    vector = random_vector(toy.model)
    small = TaskVector({where: delta[:2] for where, delta in vector.deltas.items()})
    with pytest.raises(ModelError, match="in the model"), edited(toy.model, Edit(small, (0,))):
        pass
    deep = TaskVector({(where[0] + 5, where[1]): delta for where, delta in vector.deltas.items()})
    with pytest.raises(ModelError, match="no .* in layer"), edited(toy.model, Edit(deep, (5,))):
        pass
    assert weights.weight_hash(toy.model) == before


def test_bfloat16_models_are_edited_in_float32_and_restored(toy):
    model = toy.model.bfloat16()
    before = weights.weight_hash(model)
    vector = random_vector(model, scale=1.0)
    expected = (weights.edit_weights(model)[0, "q"].float() + vector.deltas[0, "q"]).bfloat16()
    with edited(model, Edit(vector, (0,))):
        assert torch.equal(weights.edit_weights(model)[0, "q"], expected)
    assert weights.weight_hash(model) == before


def test_matched_scales_bring_each_matrix_to_the_wanted_energy(vector):
    wanted = {where: float(i) for i, where in enumerate(vector.deltas)}
    scaled = vector * matched_scales(wanted, vector.energies())
    assert scaled.energies() == pytest.approx(wanted, rel=1e-5)
    assert matched_scales({(0, "q"): 1.0}, {(0, "q"): 0.0}) == {(0, "q"): 0.0}


def test_stable_rank_by_lanczos_is_that_of_the_whole_decomposition():
    matrix = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))
    spectral = float(torch.linalg.svdvals(matrix.double())[0])
    assert stable_rank(matrix) == pytest.approx(float(matrix.double().square().sum()) / spectral**2, rel=1e-10)


def test_a_checkpoint_with_a_missing_shard_is_refused(tmp_path):
    fabricate.model("google/gemma-3-270m-it", tmp_path, 0.05, "float32", 0)
    whole = Checkpoint(tmp_path)
    name = next(iter(whole))
    assert whole.shape(name) == tuple(whole[name].shape)
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-\d{5}.safetensors is missing"):
        Checkpoint(tmp_path)


def test_rounding_by_hand():
    """One step of bfloat16 at 1 is 2^-7: a quarter of it is lost, three quarters become a whole one."""
    step = 2.0**-7
    base, change = {(0, "q"): torch.ones(1, 4)}, torch.tensor([[0.25, 0.75, 1.0, 0.0]]) * step
    exact = TaskVector({(0, "q"): change})
    kept = editing.rounded(base, exact, torch.bfloat16)
    assert torch.equal(kept.deltas[0, "q"], torch.tensor([[0.0, 1.0, 1.0, 0.0]]) * step)
    sums = editing.survival(exact, kept)
    shares = editing.survival_shares(sums)
    assert sums["unmoved"].tolist() == [2] and shares["unmoved"] == 0.5
    assert shares["energy_kept"] == pytest.approx(2 / (0.0625 + 0.5625 + 1))
    assert shares["cosine"] == pytest.approx(1.75 / (2 * 1.625) ** 0.5)


def test_a_vector_between_two_bfloat16_checkpoints_survives_bfloat16_whole():
    generator = torch.Generator().manual_seed(0)
    base = {(0, "q"): torch.randn(40, 40, generator=generator).bfloat16()}
    tuned = (base[0, "q"].float() + 0.002 * torch.randn(40, 40, generator=generator)).bfloat16()
    vector = TaskVector({(0, "q"): tuned.float() - base[0, "q"].float()})
    shares = editing.survival_shares(editing.survival(vector, editing.rounded(base, vector, torch.bfloat16)))
    assert shares["energy_kept"] == 1 and shares["cosine"] == pytest.approx(1)
    assert shares["unmoved"] == float((tuned == base[0, "q"]).double().mean()) > 0.1


def test_a_head_counts_as_embeddings_unless_it_is_a_copy_of_them():
    base, tuned = state(seed=0), state(seed=1)
    once = energy_elsewhere(base, tuned)["embeddings"]
    tied = [{**s, "lm_head.weight": s["model.embed_tokens.weight"]} for s in (base, tuned)]
    assert energy_elsewhere(*tied)["embeddings"] == once
    own = [{**s, "lm_head.weight": s["model.embed_tokens.weight"] * 3} for s in (base, tuned)]
    assert energy_elsewhere(*own)["embeddings"] == pytest.approx(10 * once)


def test_squared_singular_values_are_those_of_the_whole_decomposition():
    for shape in ((30, 12), (12, 30)):
        delta = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        whole = torch.linalg.svdvals(delta.double()).square()
        assert torch.allclose(subspaces.singular_energies(delta), whole, rtol=1e-9)
