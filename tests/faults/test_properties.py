"""Properties that must hold for any input: the algebra, projections, statistics and file formats."""

import string

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from stetholib import editing, layer_sets, profiles, statistics
from stetholib import significance as sg
from stetholib.data import prompts
from stetholib.editing import TaskVector
from stetholib.models import subspaces
from stetholib.store import files
from stetholib.store.tables import CONTRACTS, Workspace

settings.register_profile(
    "project",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("project")
SEED, SCALE = st.integers(0, 10_000), st.floats(-8, 8, width=32)
SIDES = st.sampled_from(["reader", "writer"])
COUNTS = st.integers(2, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n)))
PAIRS = st.integers(2, 400).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda g: st.tuples(st.just(g), st.integers(0, n - g), st.just(n)))
)


def vector(seed, layers=2, shape=(5, 4)):
    generator = torch.Generator().manual_seed(seed)
    keys = [(layer, matrix) for layer in range(layers) for matrix in ("q", "down")]
    return TaskVector({where: torch.randn(*shape, generator=generator, dtype=torch.float64) for where in keys})


def close(one, other):
    return all(torch.allclose(one.deltas[w], other.deltas[w], atol=1e-9) for w in one.deltas)


@given(SEED, SEED, SCALE, SCALE)
def test_task_vectors_are_a_vector_space_and_energy_its_squared_norm(one, other, a, b):
    x, y = vector(one), vector(other)
    assert (
        close((x + y) - y, x) and close(x + y, y + x) and close(a * (x + y), a * x + a * y) and close((a + b) * x, a * x + b * x)
    )
    assert (a * x).energy() == pytest.approx(a**2 * x.energy())
    assert (x + y).energy() + (x - y).energy() == pytest.approx(2 * (x.energy() + y.energy()))
    assert sum(x.restrict([layer]).energy() for layer in x.layers) == pytest.approx(x.energy())


@given(SEED, st.sampled_from([torch.bfloat16, torch.float16]), st.floats(1e-6, 1.0))
def test_rounding_leaves_each_weight_within_half_a_step(seed, dtype, size):
    base = {where: delta.float() for where, delta in vector(seed + 1).deltas.items()}
    exact = TaskVector({where: size * delta.float() for where, delta in vector(seed).deltas.items()})
    kept = editing.rounded(base, exact, dtype)
    for where, delta in exact.deltas.items():
        after = base[where] + delta
        bound = torch.finfo(dtype).eps * (after.abs() + base[where].abs()) / 2 + 1e-6
        assert ((kept.deltas[where] - delta).abs() <= bound).all()
    shares = editing.survival_shares(editing.survival(exact, exact))
    assert shares["energy_kept"] == 1 and shares["cosine"] == pytest.approx(1)


@given(SEED, st.integers(2, 9), st.integers(2, 9), SIDES, st.data())
def test_projections_are_orthogonal_and_energy_grows_with_rank_to_the_whole(seed, rows, columns, side, data):
    width = columns if side == "reader" else rows
    rank = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    basis = subspaces.random_basis(width, rank, generator)
    once = subspaces.project(delta, basis, side)
    assert torch.allclose(subspaces.project(once, basis, side), once, atol=1e-10)
    kept = subspaces.energy_by_rank(delta, basis, side)
    assert (kept[1:] >= kept[:-1] - 1e-12).all() and kept[0] >= -1e-12 and kept[-1] <= 1 + 1e-9
    share = float(once.square().sum() / delta.square().sum())
    assert share == pytest.approx(float(kept[-1])) and float((once * (delta - once)).sum()) == pytest.approx(0, abs=1e-9)
    if rank == width:
        assert share == pytest.approx(1)


@given(COUNTS)
def test_z_changes_its_sign_with_the_order_and_the_pooled_one_is_the_closed_form(counts):
    one, other, n = counts
    for z in (statistics.harness_z, statistics.unpaired_z, statistics.pooled_z):
        assert z(one, other, n) == -z(other, one, n) or (one == other and z(one, other, n) == 0)
        assert 0 <= statistics.two_sided(z(one, other, n)) <= 1
    # the closed form of a table of two by two: by its margins, without any proportion
    margins = (one + other) * (2 * n - one - other)
    expected = (other - one) * np.sqrt(2 * n / margins) if margins else 0
    assert statistics.pooled_z(one, other, n) == pytest.approx(expected)


@given(PAIRS)
def test_mcnemar_is_scipys_binomial_test_and_does_not_know_which_side_gained(pairs):
    gained, lost, _ = pairs
    assert statistics.mcnemar(gained, lost) == statistics.mcnemar(lost, gained)
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert statistics.mcnemar(gained, lost) == pytest.approx(expected)


@given(PAIRS, SEED)
def test_the_interval_holds_its_estimate_and_the_verdict_follows_from_the_row(pairs, seed):
    gained, lost, n = pairs
    low, high = statistics.bootstrap_interval(gained, lost, n, 0.05, 300, seed)
    assert -1 <= low <= high <= 1
    if 10 < gained + lost < n:
        assert low - 1e-9 <= (gained - lost) / n <= high + 1e-9
    word = sg.verdict((gained - lost) / n, statistics.mcnemar(gained, lost), low, 0.05, 0.05)
    assert word in ("improved", "degraded", "no worse", "inconclusive")
    assert (word == "improved") <= (gained > lost) and (word == "degraded") <= (lost > gained)
    assert 0 <= statistics.minimum_detectable((gained + lost) / n, n, 0.05) <= 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_corrects_upwards_by_how_many_p_are_no_smaller(p):
    found = statistics.holm(p)
    assert (found >= np.array(p) - 1e-15).all() and (found <= 1).all()
    # each p times how many are no smaller, then never below that of a smaller one
    assert np.allclose(found, [min(1, max(q * sum(r >= q for r in p) for q in p if q <= one)) for one in p], rtol=1e-12, atol=0)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=20, unique=True), st.data())
def test_selected_layers_score_at_least_as_high_as_all_others(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    chosen = layer_sets.select(scores, count)
    rest = [s for i, s in enumerate(scores) if i not in chosen]
    assert len(set(chosen)) == count and list(chosen) == sorted(chosen)
    assert not rest or min(scores[i] for i in chosen) >= max(rest)
    one = np.array(scores)[:, None]
    assert 0 <= layer_sets.percentiles(one[:1], one, 0)[0, 0] <= 1


@given(st.text(string.ascii_letters + string.digits + r"{}\+-*/=,.() ", max_size=40))
def test_the_boxed_answer_of_any_text_is_found_or_refused_in_one_line(inner):
    try:
        found = prompts.boxed_answer(rf"So it is $\boxed{{{inner}}}$.")
    except ValueError as error:
        assert "\n" not in str(error)
        return
    depth, lowest = 0, 0
    for sign in inner:
        depth += (sign == "{") - (sign == "}")
        lowest = min(lowest, depth)
    if depth == 0 and lowest == 0 and "boxed" not in inner:
        assert found == inner


ROWS = st.lists(
    st.dictionaries(st.text(max_size=8).filter(lambda k: k != files.CHECK), st.one_of(st.text(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), st.none(), st.booleans()), max_size=4),
    max_size=6,
)  # fmt: skip


@given(ROWS, ROWS)
def test_a_ledger_gives_back_what_was_put_in(tmp_path, first, second):
    path = tmp_path / "ledger.jsonl"
    path.unlink(missing_ok=True)
    files.append_json(path, first)
    files.append_json(path, second)
    assert list(files.read_json_lines(path)) == first + second


@given(ROWS.filter(bool), st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
def test_whatever_is_written_over_a_ledger_no_row_is_invented(tmp_path, rows, at, junk):
    path = tmp_path / "ledger.jsonl"
    path.unlink(missing_ok=True)
    files.append_json(path, rows)
    whole = path.read_bytes()
    at %= len(whole)
    path.write_bytes(whole[:at] + junk + whole[at + len(junk) :])
    assert all(row in rows for row in files.read_json_lines(path))


@given(st.permutations(range(6)), st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=6, max_size=6))
def test_a_table_has_the_same_bytes_whatever_the_order_of_its_rows(tmp_path, order, values):
    keys, columns = CONTRACTS["06_published"]
    rows = [dict.fromkeys(columns, value) | {keys[0]: f"test {i}"} for i, value in enumerate(values)]
    space = Workspace("test", tmp_path)
    once = space.table("06_published", pd.DataFrame(rows)).read_bytes()
    assert space.table("06_published", pd.DataFrame([rows[i] for i in order])).read_bytes() == once
    assert space.read_table("06_published").columns.tolist() == keys + columns


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-5, 10**7), st.floats(), st.text(max_size=6), st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))  # fmt: skip
KEYS = sorted(
    f"{section}.{key}" for section, inside in yaml.safe_load((profiles.FOLDER / "smoke.yaml").read_text()).items() if isinstance(inside, dict) for key in inside
)  # fmt: skip


@given(st.sampled_from(KEYS), VALUES)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key, value):
    try:
        found = profiles.load("smoke", {key: value})
    except profiles.ProfileError as error:
        assert "\n" not in str(error) and key.split(".")[0] in str(error)
        return
    section, name = key.split(".")
    taken = getattr(getattr(found, section), name)
    assert taken == value or list(taken) == list(value)


@given(st.binary(max_size=200))
def test_any_bytes_as_a_profile_are_refused_in_one_line(tmp_path, junk):
    path = tmp_path / "mine.yaml"
    path.write_bytes(junk)
    with pytest.raises(profiles.ProfileError) as refused:
        profiles.load(str(path))
    assert "\n" not in str(refused.value)
