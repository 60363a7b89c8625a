"""Every step's answers, in a world of toys that is opened once."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from IPython.display import Markdown
from matplotlib.figure import Figure

from stetholib import calibration, plots
from stetholib.adapters import finetuning
from stetholib.data.mini import base as mini_base
from stetholib.data.mini.problems import SUBJECTS
from stetholib.errors import UserError
from stetholib.models.subspaces import Ranks, default_rows
from stetholib.models.sums import CONTRASTS
from stetholib.models.weights import READERS
from stetholib.significance import paired_against
from stetholib.store.tables import CONTRACTS, Workspace, WorkspaceError
from stetholib.study import Study
from stetholib.study import layer_selection as wired
from stetholib.study.world import World

VARIANTS = ["base", "finetuned", "full", "full_shrunk", "scalpel", "raw_shrunk", "stethoscope", "stethoscope_matched", "random_1"]
SMALL = {
    "data.train_problems": 4,
    "data.validation_problems": 4,
    "data.feature_problems": 4,
    "data.general_documents": 28,
    "data.test_problems": dict.fromkeys(SUBJECTS, 2),
    "sae.training_tokens": 1024,
    "sae.d_sae": 48,
    "features.matched_minimum": 2,
    "projection.gradient_problems": 1,
    "selection.loss_problems": 1,
    "evaluation.max_new_tokens": 4,
    "evaluation.noise_problems": 3,
    "evaluation.general_documents": 2,
    "evaluation.variants": VARIANTS,
}
LAYERS = range(3)
STEPS = ("task_vectors", "sae_features", "subspace_projection", "layer_selection", "minerva_math", "significance")
KEYED = {  # what notebooks ask each step for that comes as a table, and its columns; a contract's where it is a stem
    "task_vectors.table": "01_task_vectors",
    "task_vectors.finetune_curve": "step loss",
    "task_vectors.rounding": "change stored_in unmoved energy_kept cosine",
    "sae_features.table": "02_sae_features",
    "sae_features.self_tests": "layer d_sae fvu l0 alive fvu_random fvu_neighbour score_random_corpus score_random_matched",
    "subspace_projection.table": "03_subspace_projection",
    "subspace_projection.mechanism": "layer side basis overlap chance",
    "subspace_projection.energy_or_direction": "variant loss_change low high",
    "subspace_projection.rounding_of_edits": "vector unmoved energy_kept cosine",
    "layer_selection.table": "04_layer_selection",
    "layer_selection.sets": "04_layer_sets",
    "layer_selection.agreement": "contrast definition layers rho_with_default",
    "layer_selection.relations": "predictor effect rho low high partial",
    "layer_selection.reliability": "04_reliability",
    "minerva_math.table": "05_minerva_math",
    "minerva_math.records": "variant subject problem_id completion stopped_by exact_match math_verify extracted",
    "minerva_math.noise": "change",
    "significance.table": "06_significance",
    "significance.published": "06_published",
    "significance.claims": "06_claims",
}
TABLES = {
    **dict.fromkeys(KEYED, ()),
    "sae_features.top_tokens": (0, 1),
    "minerva_math.token_limits": (["base", "full"],),
    "significance.pairs": ([("full", "base"), ("stethoscope", "random_1")],),
    "layer_selection.sae_stability": (1,),
}
VALUES = [
    "task_vectors.energies",
    "task_vectors.energy_elsewhere",
    "task_vectors.restored",
    "sae_features.best_auroc",
    "layer_selection.chosen",
    "minerva_math.variants",
    "minerva_math.checks",
    "significance.headline",
]


def few_p_values(count):
    return calibration.null_p_values(8)


def rough_power(effects, worlds):
    return calibration.power_curve((0.0, 0.6), 2)


@pytest.fixture(scope="module")
def study(tmp_path_factory, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_base.tokenizer, "build", lambda: tokens)
        patch.setattr(wired.layer_selection.spearman, "__defaults__", (0.05, 40, 0))  # of 2000 resamples
        patch.setattr(wired, "calibration", SimpleNamespace(null_p_values=few_p_values, power_curve=rough_power))
        yield Study.open("smoke", SMALL, root=tmp_path_factory.mktemp("world"))


def asked(study, name, *given):
    step, _, question = name.partition(".")
    return getattr(getattr(study, step), question)(*given)


def on_disk(study):
    """Every file of the world but locks, with when it was written."""
    found = (path for path in study.workspace.root.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_its_columns_and_belongs_to_whoever_asked(study, name):
    table = asked(study, name, *TABLES[name])
    columns = KEYED.get(name, "")
    keys, further = CONTRACTS.get(columns, ([], columns.split()))
    assert isinstance(table, pd.DataFrame) and len(table) and set(keys + further) <= set(table)
    assert not keys or not table.duplicated(keys).any()
    whole, before = table.copy(), on_disk(study)
    for column in list(table):
        table[column] = "spoiled"
    table.drop(index=table.index[1:], inplace=True)
    pd.testing.assert_frame_equal(asked(study, name, *TABLES[name]), whole)
    assert on_disk(study) == before, "an answer that is known costs no file"


@pytest.mark.parametrize("name", VALUES)
def test_a_dict_belongs_to_whoever_asked(study, name):
    found = asked(study, name)
    whole = dict(found)
    assert isinstance(found, dict) and whole
    found.clear()
    again = asked(study, name)
    assert again.keys() == whole.keys() and str(again) == str(whole)


def test_a_table_has_a_row_for_everything_it_measures(study):
    layers, contrasts = len(LAYERS), len(CONTRASTS)
    sizes = {"task_vectors.table": layers * 7, "sae_features.table": layers * contrasts, "sae_features.self_tests": layers}
    sizes |= {"layer_selection.table": layers * contrasts, "layer_selection.agreement": contrasts * 3}
    sizes |= {"layer_selection.relations": 4 * 4, "minerva_math.records": len(VARIANTS) * len(SUBJECTS) * 2}
    sizes |= {"minerva_math.table": len(VARIANTS) * (len(SUBJECTS) + 1), "significance.claims": None}
    assert {name: len(asked(study, name)) for name in sizes if sizes[name]} == {k: v for k, v in sizes.items() if v}
    assert set(asked(study, "significance.claims")["claim"]) == {f"C{i}" for i in range(1, 10)}


def test_asking_writes_no_figure_and_no_record(study):
    study.significance.claims(), study.layer_selection.table()
    written = {path.relative_to(study.workspace.root).parts[0] for path in on_disk(study)}
    assert written == {"runs"} and not study.workspace.figures.exists() and not study.workspace.records.exists()
    assert study.workspace.store.name == "store" and study.workspace.store.parent.name == "smoke"


def test_01_the_vector_and_its_invariants(study):
    step = study.task_vectors
    assert step.restored() == dict.fromkeys(step.restored(), True) and len(step.restored()) == 4
    vector = step.vector
    assert set(vector.energies()) == set(step.energies()) and vector.layers == tuple(LAYERS)
    assert (step.folder / "config.json").is_file()
    assert step.energy_elsewhere() == dict(embeddings=0.0, norms=0.0, other=0.0), "only the seven matrices are trained"


def test_02_sums_scores_and_other_definitions(study):
    step = study.sae_features
    for contrast in CONTRASTS:
        for kind in (None, "auroc"):
            found = step.specificities(contrast, kind)
            assert len(found) == len(LAYERS) and all(v.shape == fires.shape == (48,) for v, fires in found)
    assert all(0 <= value <= 1 for values in step.best_auroc().values() for value in values)
    with step.dictionaries.opened() as every:
        assert every[1].W_dec.shape == (48, 32) and torch.equal(every[1].W_dec, every[1].W_dec)
    assert step.rule("auroc").kind == "auroc" and step.believed == [*LAYERS]
    assert len(step.top_tokens(0, 1, 3)) <= 3


def test_03_directions_and_vectors(study):
    step = study.subspace_projection
    assert step.width == 32 and step.ranks == Ranks.of(32, 0.03, study.profile.projection.rank_shares)
    assert set(step.sites) == set(LAYERS) and {"sae_decoder"} <= set(step.sites[0].by_name)
    energy = {}
    for name in ("raw", "projected", "projected_rescaled", "raw_shrunk"):
        with step.vector_of(name).opened() as vector:
            energy[name] = vector.energy()
    assert energy["projected_rescaled"] == pytest.approx(energy["raw"], rel=1e-3) and energy["projected"] < energy["raw"]
    assert energy["raw_shrunk"] == pytest.approx(energy["projected"], rel=1e-3)


def test_03_the_readers_of_a_lora_are_held_against_where_its_a_began(study):
    assert study.subspace_projection.lora_start() is None and study.task_vectors.lora_start is None
    assert not (study.task_vectors.folder / finetuning.START).exists()
    changed = SMALL | {"finetune.method": "lora", "finetune.lora_rank": 2}
    made = Study.open("smoke", changed, root=study.workspace.root)
    with made.task_vectors.lora_start.opened() as start:
        assert {a.shape[0] for a in start.values()} == {2} and len(start) == len(LAYERS) * 7
    table, energies = made.subspace_projection.lora_start(), made.task_vectors.energies()
    assert list(zip(table["layer"], table["matrix"], strict=True)) == [at for at in energies if at[1] in READERS]
    assert table["overlap"].min() > 0.9 and set(table["chance"]) == {2 / 32}
    kept = default_rows(made.subspace_projection.table()).query("rank == 1 and basis == 'sae_decoder' and side == 'reader'")
    assert table["sae_decoder_kept"].tolist() == pytest.approx(kept["energy_retained"].tolist(), rel=1e-9)
    said = made.significance.claims("C1", "C3", "C9").set_index("claim")["measured"].str.endswith("; of a LoRA of rank 2")
    assert said.to_dict() == {"C1": True, "C3": True, "C9": False}
    assert made.manifest()["finetune"] == study.manifest()["finetune"] | dict(method="lora", lora_rank=2, lora_start="kaiming")


def test_04_scores_sets_and_losses(study):
    step = study.layer_selection
    scores = step.scores("corpus")
    assert scores.permuted.shape == scores.resampled.shape == (3, 20) and scores.score.tolist() == step.plain_scores("corpus")
    scores.score[:] = 0
    assert step.scores("corpus").score.any(), "arrays belong to whoever asked"
    null, power = wired.planted(study.world)
    assert isinstance(null, np.ndarray) and {"effect", "power"} <= set(power)
    assert step.selected_count == 1 and all(len(layers) == 1 for _, layers in step.chosen().values())
    sets = step.sets().set_index(["selector", "draw"])
    after, before = study.losses.of(LAYERS), study.losses.of(())
    assert sets.loc[("full", 0), "loss_change"] == pytest.approx(after.mean() - before.mean(), abs=1e-9)
    assert sets.loc[("full", 0), "closing_change"] == pytest.approx(after.mean("closing") - before.mean("closing"), abs=1e-9)
    assert study.losses.of(LAYERS, 0.0).mean("total") == before.mean("total") and before.closing.all()
    assert len(before.tokens) == len(study.losses.subjects) == len(SUBJECTS)
    scales = study.losses.scales(step.shrunk).set_index("alpha")
    assert len(scales) == 7 and scales.loc[1.0, "solution"] == pytest.approx(sets.loc[("full", 0), "loss_change"])
    shrunk = sets.loc[("full_shrunk", 0), ["energy", "loss_change", "general_change"]].tolist()
    assert shrunk == pytest.approx(scales.loc[step.shrunk, ["energy", "solution", "general"]].tolist())
    again = Study.open("smoke", SMALL, root=study.workspace.root).losses
    assert all((again.of(LAYERS).nats(part) == after.nats(part)).all() for part in ("solution", "closing")), "the same bits"


def test_05_answers_are_asked_once_and_by_any_rank(study):
    step = study.minerva_math
    variants, asked_before = step.variants(), on_disk(study)
    assert list(variants) == VARIANTS and step.headline_subject == "number_theory"
    step.records()
    base = step.answers(variants["base"])
    assert len(base) == 2 * len(SUBJECTS) and base == step.answers(variants["base"], 1, 2)
    assert all(answer.problem_id == name and answer.completion_tokens <= 4 for name, answer in base.items())
    assert asked_before.items() <= on_disk(study).items()
    assert set(step.records(["full"])["variant"]) == {"full"} and step.general_loss(variants["base"]) > 0
    assert step.checks()["identical_scores"] is True
    with step.edited_model(variants["base"]).opened() as model:
        assert model is study.world.base


def test_06_pairs_and_the_row_of_a_world(study):
    step = study.significance
    paired, row = paired_against(study.minerva_math.records(), "base", "full", step.margins), step.headline()
    assert set(paired) == {"difference", "ci_low", "ci_high", "mcnemar_p", "gained", "lost"}
    assert row["gain_full"] == pytest.approx(paired["difference"]) and 0 <= row["discarded"] <= 1
    assert len(step.pairs([("full", "base")])) == 2, "one row a metric"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_small_and_says_whose_numbers_these_are(study, name):
    step = getattr(study, name)
    public = {one for one in (*dir(type(step)), *vars(step)) if not one.startswith("_")}
    assert len(public) <= 12, sorted(public)
    said = step.heading()
    assert isinstance(said, Markdown) and "**ours, smoke test**" in said.data and "seed 0" in said.data
    for key, value in SMALL.items():
        assert f"`{key}` = {value!r}" in said.data
    bare = getattr(Study.open("smoke", root=study.workspace.root), name).heading().data
    assert "Overridden" in said.data and "Overridden" not in bare


@pytest.fixture()
def keeping(study, tmp_path):
    """The same study, whose figures and records go elsewhere."""
    return Study(World(study.profile, "cpu", Workspace("kept", tmp_path), SMALL))


def names(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_keep_writes_exactly_the_contracts_files(keeping, study):
    root = keeping.workspace.root
    figure, ax = plots.panels()
    ax.plot([0, 1], [0, 1])
    assert isinstance(figure, Figure) and keeping.keep("04_layer_sets", study.layer_selection.sets(), figure) is None
    assert names(root) == {f"figures/kept/04_layer_sets.{kind}" for kind in ("csv", "png", "svg")}
    assert "Ours, smoke test" in (root / "figures/kept/04_layer_sets.svg").read_text()
    records = study.minerva_math.records()
    keeping.keep("records", records)
    keeping.keep("manifest", study.manifest())
    further = {f"runs/kept/records/{name}.jsonl" for name in VARIANTS} | {"figures/kept/manifest.json"}
    assert names(root) == {f"figures/kept/04_layer_sets.{kind}" for kind in ("csv", "png", "svg")} | further
    lines = [json.loads(line) for line in (root / "runs/kept/records/full.jsonl").read_text().splitlines()]
    assert [line["problem_id"] for line in lines] == records.query("variant == 'full'")["problem_id"].tolist()
    manifest = json.loads((root / "figures/kept/manifest.json").read_text())
    assert manifest == json.loads(json.dumps(study.manifest())) and manifest["profile"] == "smoke"
    assert manifest["sae"]["d_sae"] == 48 and manifest["finetune"]["method"] == "full"


@pytest.mark.parametrize("stem", sorted(CONTRACTS))
def test_every_contract_is_kept_by_the_step_that_owns_it(keeping, study, stem):
    name = next(name for name, of in KEYED.items() if of == stem)
    keeping.keep(stem, asked(study, name))
    assert names(keeping.workspace.root) == {f"figures/kept/{stem}.csv"}
    assert len(keeping.workspace.read_table(stem)) == len(asked(study, name))


def test_keep_refuses_what_is_no_table_figure_or_dict_and_what_breaks_its_contract(keeping, study):
    with pytest.raises(TypeError, match="keep: list is no table, figure or dict"):
        keeping.keep("06_published", [1])
    with pytest.raises(WorkspaceError, match="column 'z' is missing"):
        keeping.keep("06_published", study.significance.published().drop(columns="z"))
    assert not names(keeping.workspace.root)


def test_an_overridden_world_keeps_its_files_apart_in_the_same_store(tmp_path):
    plain, changed = (Study.open("smoke", given, root=tmp_path).workspace for given in (None, {"seed": 1}))
    assert plain.store == changed.store and plain.figures != changed.figures and plain.records != changed.records
    assert plain.figures.name == "smoke" and changed.figures.name.startswith("smoke--seed-1-")


def test_the_readmes_ten_lines_run_as_they_stand_but_for_the_profile(study, capsys):
    lines = re.search(r"```python\n(from stetholib import Study.*?)```", (ROOT / "stetholib" / "README.md").read_text(), re.S)[1]
    assert lines.count('Study.open("mini")') == 1
    exec(lines.replace('"mini"', '"smoke", root=root'), found := {"root": study.workspace.root})
    said = capsys.readouterr().out.splitlines()
    assert "layer" in said[0] and found["layers"] and all(0 < float(loss) < 20 for loss in said[-1].split())


def test_an_edit_of_ones_own_stands_beside_the_others_from_step_04_on(study):
    root = study.workspace.root
    own = Study.open("smoke", SMALL | {"edit.layers": [2, 0], "edit.alpha": 0.5}, root=root)
    (row,) = own.layer_selection.sets().query("selector == 'own'").to_dict("records")
    assert row["layers"] == "0 2" and row["alpha"] == 0.5
    change = own.losses.of((0, 2), 0.5).mean("solution") - own.losses.of(()).mean("solution")
    tokens = own.losses.of(()).tokens
    nats = (own.losses.of((0, 2), 0.5).nats("solution") - own.losses.of(()).nats("solution")).sum() / tokens.sum()
    assert row["loss_change"] == pytest.approx(nats) and np.sign(change) == np.sign(nats)
    variants = own.minerva_math.variants()
    assert list(variants) == [*VARIANTS, "own"] and variants["own"].layers == (0, 2) and variants["own"].alpha == 0.5
    assert set(own.minerva_math.records(["base", "own"])["variant"]) == {"base", "own"}
    assert "own" not in study.minerva_math.variants() and "own" not in set(study.layer_selection.sets()["selector"])
    scalpel = Study.open("smoke", SMALL | {"edit.vector": "projected"}, root=root)
    assert scalpel.minerva_math.variants()["own"].layers == scalpel.layer_selection.chosen()["stethoscope"][1]
    assert "own" not in set(scalpel.layer_selection.sets()["selector"])  # losses of step 04 are of the raw vector
    with pytest.raises(UserError, match="there is no layer 7; this model has 3"):
        Study.open("smoke", SMALL | {"edit.layers": [7]}, root=root).minerva_math.variants()


SAME = "def mine(m):\n    return (m.mean_maths - m.mean_general) / ((m.var_maths + m.var_general) / 2 + 1e-6).sqrt()\n"


def test_a_specificity_of_ones_own_is_a_function_in_a_file_and_its_hash_is_part_of_every_key(study, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(SAME)
    monkeypatch.chdir(tmp_path)
    ours = study.layer_selection.plain_scores("corpus")
    theirs = study.layer_selection.plain_scores("corpus", "mine.py:mine")
    assert theirs == pytest.approx(ours, nan_ok=True)
    first = study.sae_features.rule("mine.py:mine")
    (tmp_path / "mine.py").write_text(SAME.replace("return (", "return 2 * ("))
    assert study.sae_features.rule("mine.py:mine") != first
    doubled = study.layer_selection.plain_scores("corpus", "mine.py:mine")
    assert doubled == pytest.approx([2 * score for score in ours], nan_ok=True)
    own = Study.open("smoke", SMALL | {"features.specificity": "mine.py:mine"}, root=study.workspace.root)
    agreement = own.layer_selection.agreement()
    assert set(agreement["definition"]) == {"cohen_d", "firing_log_ratio", "auroc", "mine.py:mine"}
    for text, said in (
        ("mine = 1\n", "defines no function mine"),
        ("def mine(m):\n    return m.nothing\n", "mine.py:mine failed: AttributeError"),
        ("def mine(m):\n    return m.mean_maths[0]\n", "must return a tensor of finite numbers of shape"),
        ("def mine(m):\n    return m.mean_maths / 0\n", "must return a tensor of finite numbers"),
        ("def mine(m:\n", "mine.py does not run: SyntaxError"),
    ):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(UserError, match=re.escape(said)):
            study.layer_selection.plain_scores("corpus", "mine.py:mine")
