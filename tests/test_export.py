"""What leaves the house: the exported model is the edited one, bit for bit, and everything else is the base's, byte for byte."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file, save_file

from stetholib import profiles
from stetholib.__main__ import main
from stetholib.commands import export as command
from stetholib.commands import reproduce
from stetholib.editing import Edit, Lazy, TaskVector, edited
from stetholib.errors import UserError
from stetholib.minerva_math import Variant
from stetholib.models import export, loading
from stetholib.models.weights import MATRICES, Checkpoint, ModelError, weight_names
from stetholib.store.files import file_hash
from stetholib.store.tables import Workspace
from stetholib.study.minerva_math import MinervaMath
from stetholib.study.subspace_projection import SubspaceProjection

IDS = torch.tensor([[2, 17, 300, 45, 8, 99]])
LAYERS, ALPHA = (0, 2), 0.7


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder with a Llama-shaped `base` of four blocks and a `finetuned` one."""
    folder = tmp_path_factory.mktemp("two")
    toys.checkpoints(folder)
    return folder


def tau(folder):
    return TaskVector.between(Checkpoint(folder / "base"), Checkpoint(folder / "finetuned"))


def exported(base, edit, into, delta=False):
    with export.whole(into, export.bytes_wanted(base, edit, delta)) as draft:
        (export.write_delta if delta else export.write_model)(base, edit, draft)
        (draft / export.PROVENANCE).write_text(json.dumps({"written": {path.name: "-" for path in draft.iterdir()}}))
    return into


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def saved(model, tokenizer, folder, **how):
    model.save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)
    return folder


def like_the_edited(base, edit, into, dtype):
    """Export, load it with transformers alone, and hold it against the model under `edited`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = loading.load(base, dtype)
    exported(base, edit, into)
    found, info = AutoModelForCausalLM.from_pretrained(into, attn_implementation="eager", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert found.dtype == getattr(torch, dtype)
    with edited(model.model, edit) as wanted:
        assert same(found.state_dict(), wanted.state_dict()) and torch.equal(logits(found), logits(wanted))
    assert not torch.equal(logits(found), logits(model.model))
    assert AutoTokenizer.from_pretrained(into).get_vocab() == model.tokenizer.get_vocab()


@pytest.mark.parametrize("layers, alpha", [(LAYERS, 1.0), ((1,), ALPHA), ((0, 1, 2, 3), 1 / 3)])
def test_an_export_is_the_edited_model_bit_for_bit(two, tmp_path, layers, alpha):
    like_the_edited(two / "base", Edit(tau(two), layers, alpha=alpha), tmp_path / "out", "float32")


@pytest.mark.parametrize("shards", ["50KB", "5GB"])
def test_a_tied_gemma_in_bfloat16_keeps_its_shards_and_its_one_embedding(toy, tmp_path, shards):
    base = saved(toy.model.to(torch.bfloat16), toy.tokenizer, tmp_path / "base", max_shard_size=shards)
    assert len(list(base.glob("*.safetensors"))) == 1 if shards == "5GB" else (base / "model.safetensors.index.json").is_file()
    assert "lm_head.weight" not in Checkpoint(base)
    vector = TaskVector(
        {where: 0.01 * torch.randn(Checkpoint(base).shape(n)) for where, n in weight_names(Checkpoint(base)).items()}
    )
    like_the_edited(base, Edit(vector, (1,), alpha=ALPHA), tmp_path / "out", "bfloat16")
    assert {p.name for p in base.iterdir()} | {export.PROVENANCE} == {p.name for p in (tmp_path / "out").iterdir()}


def test_every_byte_that_is_no_edited_matrix_is_the_bases(two, tmp_path):
    base = shutil.copytree(two / "base", tmp_path / "base")
    (base / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (base / "LICENSE").write_bytes(b"of its own")
    (base / "provenance.json").write_text("{}")  # of the base, and no part of a model
    out = exported(base, Edit(tau(two), LAYERS), tmp_path / "out")
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name != "provenance.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = ((folder / "model.safetensors").read_bytes() for folder in (base, out))
    tensors, start = export.header(base / "model.safetensors")
    names = weight_names(Checkpoint(base))
    touched = sorted(tensors[names[layer, matrix]]["data_offsets"] for layer in LAYERS for matrix in MATRICES)
    assert len(before) == len(after)
    at = 0
    for begin, end in [*touched, (len(before) - start, 0)]:
        assert before[at : start + begin] == after[at : start + begin]
        assert end == 0 or before[start + begin : start + end] != after[start + begin : start + end]
        at = start + end
    assert same(load_file(out / "model.safetensors"), {name: Checkpoint(out)[name] for name in Checkpoint(out)})


def test_one_matrix_of_the_vector_lives_at_a_time(two, tmp_path):
    vector, alive, most = tau(two), [], []

    def watched(where):
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        delta = vector.deltas[where]
        alive.append(weakref.ref(delta))
        return delta

    edit = Edit(TaskVector(Lazy(vector.deltas, watched)), LAYERS)
    assert export.bytes_wanted(two / "base", edit, True) > 0 and not most, "asking for the size reads nothing"
    for delta in (False, True):
        exported(two / "base", edit, tmp_path / str(delta), delta)
    assert len(most) == 2 * len(LAYERS) * len(MATRICES) and max(most) == 0


def test_a_delta_added_in_float32_and_rounded_once_is_the_exported_model(toy, tmp_path):
    base = saved(toy.model.to(torch.bfloat16), toy.tokenizer, tmp_path / "base", max_shard_size="50KB")
    names = weight_names(Checkpoint(base))
    edit = Edit(
        TaskVector({where: 0.01 * torch.randn(Checkpoint(base).shape(n)) for where, n in names.items()}), (0,), alpha=ALPHA
    )
    whole, alone = exported(base, edit, tmp_path / "whole"), exported(base, edit, tmp_path / "alone", delta=True)
    deltas, stored = load_file(alone / export.DELTA), Checkpoint(base)
    assert set(deltas) == {names[0, matrix] for matrix in MATRICES} and {d.dtype for d in deltas.values()} == {torch.float32}
    again = {name: (stored[name].float() + deltas[name]).bfloat16() if name in deltas else stored[name] for name in stored}
    assert same(again, dict(Checkpoint(whole).items()))
    narrow = {name: (stored[name].float() + delta.bfloat16()).bfloat16() for name, delta in deltas.items()}
    assert any(not torch.equal(narrow[name], again[name]) for name in deltas)
    assert sum(path.stat().st_size for path in alone.glob("*.safetensors")) >= export.bytes_wanted(base, edit, True)
    assert {path.name for path in alone.iterdir()} == {export.DELTA, export.PROVENANCE}


def by_mergekit(recipe):
    """What mergekit 0.1.5 makes of such a recipe, written down from its config.py and generalized_task_arithmetic.py."""
    config = yaml.safe_load(recipe)
    assert set(config) == {"merge_method", "base_model", "models", "dtype", "out_dtype"}
    assert config["merge_method"] == "task_arithmetic" and config["dtype"] == "float32"
    (other,) = [one for one in config["models"] if one["model"] != config["base_model"]]
    base, tuned = (Checkpoint(Path(place)) for place in (config["base_model"], other["model"]))
    merged = {}
    for name in base:
        fits = (one["value"] for one in other["parameters"]["weight"] if one.get("filter") is None or one["filter"] in name)
        before, after = base[name].to(torch.float32), tuned[name].to(torch.float32)
        deltas = torch.stack([after - before])
        deltas.mul_(torch.tensor([next(fits)], dtype=deltas.dtype).reshape(-1, *[1] * before.dim()))
        merged[name] = (before + deltas.sum(dim=0)).to(before.dtype).to(getattr(torch, config["out_dtype"]))
    return merged


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["llama", "gemma"])
def test_the_recipe_gives_the_same_tensors_by_mergekits_own_arithmetic(two, tokens, tmp_path, dtype, shape):
    from transformers import Gemma3ForCausalLM

    from stetholib.data.mini import base as mini_base

    for name in ("base", "finetuned"):
        if shape == "gemma":  # 12 blocks, so that layer 1 and layer 11 could be mixed up
            model = Gemma3ForCausalLM(mini_base.config(layers=12, hidden=32, vocab_size=len(tokens)))
            saved(model.to(getattr(torch, dtype)), tokens, tmp_path / name)
        else:
            shutil.copytree(two / name, tmp_path / name)
            tensors = {
                key: one.to(getattr(torch, dtype)) for key, one in load_file(tmp_path / name / "model.safetensors").items()
            }
            tensors["model.norm.weight"] += name == "finetuned"  # what is not of the vector must stay
            save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    base, layers = tmp_path / "base", (1, 3)
    out = exported(base, Edit(tau(tmp_path), layers, alpha=ALPHA), tmp_path / "out")
    assert export.dtypes(base) == {dtype}
    recipe = export.recipe(str(base), str(tmp_path / "finetuned"), layers, ALPHA, dtype)
    assert same(by_mergekit(recipe), dict(Checkpoint(out).items()))
    vision = "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight"
    weight = yaml.safe_load(recipe)["models"][1]["parameters"]["weight"]
    assert next(one["value"] for one in weight if one.get("filter", vision) in vision) == 0


class Killed(BaseException):
    """What comes from outside, in the middle."""


def test_an_export_is_whole_or_not_there_and_an_old_one_stays_until_the_new_one_is_whole(two, tmp_path):
    def broken(where):
        if where == (2, "v"):
            raise Killed
        return tau(two).deltas[where]

    edit = Edit(tau(two), LAYERS)
    cut = Edit(TaskVector(Lazy(edit.vector.deltas, broken)), LAYERS)
    with pytest.raises(Killed):
        exported(two / "base", cut, tmp_path / "new" / "out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
    out = exported(two / "base", edit, tmp_path / "out")
    before = {path.name: file_hash(path) for path in out.iterdir()}
    with pytest.raises(Killed):
        exported(two / "base", cut, out)
    assert {path.name: file_hash(path) for path in out.iterdir()} == before
    exported(two / "base", Edit(tau(two), (1,)), out)
    assert file_hash(out / "model.safetensors") != before["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


def test_what_a_kill_leaves_between_two_names_is_mended(two, tmp_path):
    edit = Edit(tau(two), LAYERS)
    out = exported(two / "base", edit, tmp_path / "out")
    out.rename(tmp_path / ".out.export-old")
    (tmp_path / ".out.export-draft").mkdir()
    with pytest.raises(Killed), export.whole(out, 0):
        raise Killed
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "model.safetensors").is_file()


def test_a_place_that_holds_anything_else_and_a_full_disk_are_refused_before_anything_is_written(two, tmp_path, monkeypatch):
    edit = Edit(tau(two), LAYERS)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    out = exported(two / "base", edit, tmp_path / "empty")
    exported(two / "base", edit, out)
    (out / "thesis.tex").write_text("years of work")
    for place, said in ((two / "base", "which no export wrote"), (out, "thesis.tex"), (tmp_path / "file", "is a file")):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=said) as error:
            exported(two / "base", edit, place)
        assert "\n" not in str(error.value) and sorted(tmp_path.rglob("*")) == before
    wanted = export.bytes_wanted(two / "base", edit, False)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, wanted - 1))
    with pytest.raises(UserError, match=r"GiB are to be written and .* free in .*; free some space"):
        exported(two / "base", edit, tmp_path / "far" / "away")
    assert not (tmp_path / "far").exists()


def test_an_edit_that_does_not_fit_the_base_is_refused(two, tmp_path):
    for deltas, said in (
        ({(9, "q"): torch.zeros(32, 32)}, "no q in layer 9"),
        ({(0, "q"): torch.zeros(3, 32)}, r"q_proj.weight is \[32, 32\] F32 in the base; the edit needs \[3, 32\] and"),
    ):
        with pytest.raises(ModelError, match=said):
            exported(two / "base", Edit(TaskVector(deltas), tuple({layer for layer, _ in deltas})), tmp_path / "out")
    base = shutil.copytree(two / "base", tmp_path / "whole_numbers")
    tensors = load_file(base / "model.safetensors")
    name = weight_names(tensors)[0, "q"]
    save_file(tensors | {name: tensors[name].to(torch.int8)}, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"is \[32, 32\] I8 in the base; the edit needs .* F32 or BF16 or F16"):
        exported(base, Edit(tau(two), (0,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "variant, said",
    [("stetoscope", "is no variant (did you mean 'stethoscope'?)"), ("base", "whole on disk"), ("finetuned", "whole on disk")],
)
def test_a_variant_that_is_none_is_one_line_that_lists_those_there_are(capsys, variant, said):
    assert main(["export", "--variant", variant, "--profile", "smoke"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and said in line and "there are: full, " in line and "base," not in line.split("there are")[1]


@pytest.fixture()
def asked(two, tmp_path, monkeypatch):
    """Export of a variant by the command, from a study of two checkpoints of one's own in which layers are chosen already."""
    shutil.copytree(two, tmp_path / "mine")
    (tmp_path / "mine" / "task.yaml").write_text(toys.TASK)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(toys.profile()))
    monkeypatch.chdir(tmp_path)
    known = {"stethoscope": Variant("stethoscope", "raw", LAYERS), "scalpel": Variant("scalpel", "projected", (0, 1, 2, 3), 0.5)}
    monkeypatch.setattr(MinervaMath, "_variants", known)
    monkeypatch.setattr(SubspaceProjection, "vector_of", lambda self, name: self._vectors.tau)
    monkeypatch.setattr(reproduce, "set_environment", lambda *a: None)
    monkeypatch.setenv("STETHOLIB_HOME", str(tmp_path))
    return lambda name, **more: command.export(name, "mine.yaml", "cpu", **more)


def front(card):
    return yaml.safe_load(card.split("---")[1])


def test_the_command_writes_model_card_recipe_and_provenance_with_every_hash(asked, two, tmp_path):
    out = asked("stethoscope")
    assert out == tmp_path / "runs" / "mine" / "export" / "stethoscope"
    assert same(by_mergekit((out / export.RECIPE).read_text()), dict(Checkpoint(out).items()))
    said = json.loads((out / export.PROVENANCE).read_text())
    assert said["written"] == {p.name: file_hash(p) for p in out.iterdir() if p.name != export.PROVENANCE}
    for what, folder in (("base", "base"), ("finetune", "finetuned")):
        assert said[what]["name"] == f"mine/{folder}"
        assert said[what]["files"]["model.safetensors"] == file_hash(two / folder / "model.safetensors")
    assert said["variant"] == dict(name="stethoscope", vector="raw", layers=list(LAYERS), alpha=1.0)
    digest = profiles.load("mine.yaml").digest
    assert said["vector"] and said["profile_hash"] == digest and said["libraries"]["torch"] == torch.__version__.split("+")[0]
    card = (out / export.CARD).read_text()
    assert front(card)["license"] == "other" and "layers 0, 2" in card and "times 1," in card and command.RECIPE in card
    assert command.UNMEASURED in card and command.TOY not in card and digest in card
    again = {path.name: file_hash(path) for path in out.iterdir()}
    assert {path.name: file_hash(path) for path in asked("stethoscope").iterdir()} == again, "the same bytes when repeated"


def test_a_projected_vector_has_no_recipe_and_a_delta_says_how_it_is_added(asked, tmp_path):
    out = asked("scalpel", into=str(tmp_path / "a place"))
    card = (out / export.CARD).read_text()
    assert not (out / export.RECIPE).exists() and command.NO_RECIPE in card and "projected onto" in card and "times 0.5," in card
    alone = asked("stethoscope", delta=True)
    assert alone.name == "stethoscope-delta" and {p.name for p in alone.iterdir()} == {
        export.DELTA,
        export.CARD,
        export.PROVENANCE,
    }
    assert command.DELTA in (alone / export.CARD).read_text()


def test_the_card_says_in_which_precision_the_measured_model_answered_where_it_is_another(asked, tmp_path):
    for name in ("base", "finetuned"):
        path = tmp_path / "mine" / name / "model.safetensors"
        save_file({key: tensor.bfloat16() for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert "computed in float32. The tensors here are stored in bfloat16" in (asked("stethoscope") / export.CARD).read_text()


def test_the_licence_is_that_of_the_bases_card_or_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert command.licence(tmp_path) == "other"
    (tmp_path / "config.json").write_text('{"license": "apache-2.0"}')
    assert command.licence(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("no front matter --- here")
    assert command.licence(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n# A model\n")
    assert command.licence(tmp_path) == "gemma"


def tables(folder, profile, layers="0 2"):
    """What a run leaves, as far as a card reads it."""
    workspace = Workspace(profile.name, folder)
    answered = [("base", "all", 0.5), ("stethoscope", "all", 0.75)]
    frame = pd.DataFrame([dict(variant=name, subject=subject, general_loss=loss) for name, subject, loss in answered])
    frame.to_csv((workspace.figures / "05_minerva_math.csv"), index=False)
    row = dict(variant="stethoscope", n=16, base_accuracy=0.25, accuracy=0.5, ci_low=0.1, ci_high=0.4, verdict="improved")
    rows = [
        row | dict(subject=subject, metric=metric, difference=difference)
        for subject in ("all", "products", "sums")
        for metric, difference in (("exact_match", 0.25), ("math_verify", float("nan") if subject == "sums" else -0.125))
    ]
    pd.DataFrame(rows).to_csv(workspace.figures / "06_significance.csv", index=False)
    pd.DataFrame([dict(selector="stethoscope", layers=layers)]).to_csv(workspace.figures / "04_layer_sets.csv", index=False)
    manifest = dict(profile_hash=profile.digest, model=dict(key="key"))
    (workspace.figures / "manifest.json").write_text(json.dumps(manifest))
    return workspace


def test_the_card_says_what_was_measured_and_nothing_of_another_run(tmp_path):
    profile = profiles.load("mini")
    variant = Variant("stethoscope", "raw", LAYERS)
    (tmp_path / "figures" / "mini").mkdir(parents=True)
    workspace = tables(tmp_path, profile)
    lines = command.measured(workspace, profile, "key", variant, "sums")
    assert (
        lines[2] == "| all (16) | exact match | 25.0% | 50.0% | +25.0 points, paired interval +10.0 to +40.0 points | improved |"
    )
    assert "| all (16) | Math-Verify |" in lines[3] and "-12.5 points" in lines[3]
    assert lines[4].startswith("| sums (16) | exact match") and lines[5] == "" and "+0.2500 nats a token" in lines[6]
    card = command.card(profile, variant, "other", [], lines)
    assert "\n".join(lines) in card and command.UNMEASURED not in card
    assert "**This is a miniature**" in card and front(card)["base_model"] == "mini" and "1 measured" not in card
    assert not command.measured(workspace, profile, "another base", variant, "sums")
    assert not command.measured(workspace, profiles.load("mini", {"seed": 1}), "key", variant, "sums")
    assert not command.measured(workspace, profile, "key", Variant("stethoscope", "raw", (1,)), "sums")
    assert not command.measured(workspace, profile, "key", Variant("full", "raw", LAYERS), "sums")
    (workspace.figures / "06_significance.csv").unlink()
    assert not command.measured(workspace, profile, "key", variant, "sums")
    assert command.UNMEASURED in command.card(profile, variant, "other", [], [])
