"""Bad checkpoints, case by case, at the doors: as a base, as a fine-tune, and in the doctor where small files alone tell."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import mini_base
from safetensors.torch import load_file, save_file

from stetholib import profiles, task_vectors
from stetholib.adapters import saes
from stetholib.commands import doctor
from stetholib.data.source import Source
from stetholib.errors import UserError
from stetholib.models import loading
from stetholib.models.weights import Checkpoint

GATE, NORM = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.input_layernorm.weight"
INDEX = "model.safetensors.index.json"
FP8 = dict(quantization_config=dict(quant_method="fp8", weight_block_size=[128, 128]))


def weights(act, file="model.safetensors"):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        act(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})

    return change


def stored(dtype, name=GATE):
    return weights(lambda t: t.update({name: t[name].to(dtype)}))


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def dangling(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nowhere")


def adapter(folder):
    save_file({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text("{}")


PAIR = both(stored(torch.float8_e4m3fn), weights(lambda t: t.update({f"{GATE}_scale_inv": torch.ones(1, 1)})))
AGAIN = weights(lambda t: [t.pop(name) for name in list(t) if name != GATE], "other.safetensors")
# name -> (what is wrong, what its line says, whether the doctor tells as well)
CASES = {
    "an FP8 pair": (both(PAIR, config(**FP8)), r"quantization_config \(fp8\); quantised weights cannot be edited", True),
    "an FP8 pair that the configuration keeps to itself": (PAIR, f"{GATE} is stored as F8_E4M3, .*; use float32 or bfloat16", False),
    "quantised weights of the language half": (config(text_config=FP8), r"quantization_config \(fp8\)", True),
    "int8": (stored(torch.int8), "is stored as I8", False),
    "uint8": (stored(torch.uint8), "is stored as U8", False),
    "a norm in float16": (stored(torch.float16, NORM), f"{NORM} is float16, which overflows", False),
    "a tensor in two files": (AGAIN, rf"{GATE} is in model.safetensors and in other.safetensors; keep .*{INDEX}", False),
    "an index that is no JSON": (text(INDEX, "{"), rf"{INDEX}: it is no index of weights .*; fetch or save it again", False),
    "an index without a weight_map": (text(INDEX, "{}"), rf"{INDEX}: it is no index of weights", False),
    "an index without its metadata": (text(INDEX, '{"weight_map": {"a": "model.safetensors"}}'), rf"{INDEX}: it is no index of weights", False),
    "an index of numbers": (text(INDEX, '{"metadata": {}, "weight_map": {"a": 1}}'), rf"{INDEX}: it is no index of weights", False),
    "an index of a file that is not there": (text(INDEX, '{"metadata": {}, "weight_map": {"a": "b.safetensors"}}'), "b.safetensors is missing", False),
    "an index beside whole weights": (both(AGAIN, text(INDEX, '{"metadata": {}, "weight_map": {"a": "other.safetensors"}}')), rf"lies beside {INDEX}, .*; remove one", False),
    "a link to nothing": (dangling, "model.safetensors: it is a link to a file that is not there; fetch or save it again", False),
    "a LoRA adapter": (adapter, r"it is an adapter .*merge it by merge_and_unload\(\), then save_pretrained\(\)", True),
    "OLMo 2": (config(model_type="olmo2"), r"'olmo2'\) is not known here.*take a model of Gemma, .*SmolLM3", True),
    "Cohere": (config(model_type="cohere"), r"'cohere'\) is not known here", True),
    "code of its own": (config(model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}), r"'mine'\) is not known here, and code that it may bring is never run", True),
    "a configuration without a type": (text("config.json", "{}"), r"\(None\) is not known here", True),
    "a configuration that is no JSON": (text("config.json", "{"), "config.json cannot be read", True),
    "a configuration that is a list": (text("config.json", "[]"), "config.json cannot be read", True),
}  # fmt: skip


@pytest.fixture()
def pair(toy, tmp_path):
    """Two folders of the toy, the first of which stays sound."""
    for name in ("sound", "bent"):
        toy.model.save_pretrained(tmp_path / name), toy.tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "sound", tmp_path / "bent"


@pytest.mark.parametrize("name", CASES)
def test_a_bad_checkpoint_is_refused_as_a_base_and_as_a_fine_tune(pair, name):
    sound, bent = pair
    change, said, small = CASES[name]
    change(bent)
    doors = [lambda: loading.load(bent), lambda: task_vectors.difference(Checkpoint(sound), Checkpoint(bent), True)]
    doors += [lambda: doctor._check_model(Source.of(str(bent)))] * small
    for door in doors:
        with pytest.raises(UserError, match=said) as refused:
            door()
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_the_files_that_an_index_names_are_read_and_no_others(pair):
    folder = pair[1]
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = dict(metadata={}, weight_map=dict.fromkeys(tensors, "model-00001-of-00001.safetensors"))
    (folder / INDEX).write_text(json.dumps(index))
    save_file({GATE: torch.zeros_like(tensors[GATE])}, folder / "stale.safetensors")
    found, loaded = Checkpoint(folder), loading.load(folder)
    assert torch.equal(found[GATE], tensors[GATE]) and found.files == [folder / "model-00001-of-00001.safetensors"]
    assert torch.equal(dict(loaded.model.named_parameters())[GATE], found[GATE])


def test_a_tokenizer_with_code_of_its_own_asks_nobody_and_runs_nothing(pair, monkeypatch):
    folder = pair[1]
    (folder / "tokenizer.json").unlink()
    (folder / "mine.py").write_text("raise SystemExit('this ran')")
    said = dict(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("a prompt"))
    try:
        loading.load(folder)
    except UserError as error:
        assert "its tokenizer cannot be read" in str(error) and "\n" not in str(error)


def test_a_topk_sae_is_refused_with_the_way_to_save_one_that_works():
    one = SimpleNamespace(cfg=SimpleNamespace(architecture=lambda: "topk"))
    with pytest.raises(
        UserError, match=r"'topk' is not supported.*BatchTopKTrainingSAE.*save_inference_model\(\) writes JumpReLU"
    ):
        saes.dictionary(one)


def test_saes_of_another_commit_than_a_profiles_first_are_refused(tmp_path):
    of = partial(replace, profiles.load("mini").sae)
    one, pinned, folder = of(release="one"), of(release="one", revision="v2"), of(release="folder")
    for spec, commit in ((one, "a"), (one, "a"), (pinned, "b"), (folder, None)):
        saes.check_commit(tmp_path, spec, commit)
    assert [saes.commit_of(tmp_path, spec) for spec in (one, pinned, folder)] == [{"commit": "a"}, {"commit": "b"}, {}]
    with pytest.raises(UserError, match="SAEs of one@main were fetched at commit a, and now the Hub gives b; set sae.revision"):
        saes.check_commit(tmp_path, one, "b")


def test_the_doctor_says_that_a_task_of_ones_own_is_code_before_all_else():
    from stetholib import profiles

    profile = profiles.load("smoke")
    own = replace(profile, evaluation=replace(profile.evaluation, task="mine/task.yaml"))
    told = doctor.examine(own, "cpu")
    assert next(told).name == "packages"
    said = next(told)
    assert said.name == "task" and said.ok and said.line.startswith("mine/task.yaml is code that will run")
    assert "task" not in [check.name for check in doctor.examine(profile, "cpu")]


def test_the_shipped_model_is_one_that_the_doctor_knows():
    doctor._check_model(Source.of("mini"))
    doctor._check_model(Source.of(str(mini_base.FOLDER)))
    doctor._check_model(Source.of("train", kind="sae"))
