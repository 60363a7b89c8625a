"""What a look tells before anything is computed: each row is one thing wrong with files of one's own, and the line it must give."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import toys
import yaml

from stetholib import profiles
from stetholib.commands import doctor


def key(section, name, value):
    return lambda values: values[section].update({name: value})


def task(text):
    def change(values):
        Path("mine/other.yaml").write_text(text)
        values["evaluation"]["task"] = "mine/other.yaml"

    return change


def problems(change):
    """One subject's training problems changed, in a copy: change(training rows, test rows) gives the new training rows."""

    def act(values):
        shutil.copytree("mine/problems", "mine/changed")
        train, test = (next(Path("mine/changed/sums").glob(f"{split}-*")) for split in ("train", "test"))
        change(pd.read_parquet(train), pd.read_parquet(test)).to_parquet(train)
        values["data"]["maths"] = "mine/changed"

    return act


def without_a_sae(values):
    shutil.rmtree("mine/saes/block_2")


def without_its_weights(values):
    Path("mine/saes/block_2/sae_weights.safetensors").unlink()


def an_sae_that_says(**said):
    def act(values):
        path = Path("mine/saes/block_2/cfg.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": said}))

    return act


# what is wrong -> (the change, the check that says so, its line)
CASES = {
    "no task": (key("evaluation", "task", "mine/no.yaml"), "task file", "there is no file mine/no.yaml"),
    "a group of tasks": (task("group: g\ntask: [a, b]\n"), "prompts", "task mine/other.yaml: the harness cannot use it .it does not hold one task"),
    "a task that is no YAML": (task("a: [1"), "prompts", "task mine/other.yaml: the harness cannot use it .it does not hold one task, or is no YAML"),
    "a task without a test split": (task(toys.TASK.replace("test_split: test", "validation_split: test")), "prompts", "must have test_split: test"),
    "too few texts for step 02": (key("data", "general_documents", 9999), "documents", "9999 are wanted; lower data.general_documents"),
    "too few texts for step 05": (key("evaluation", "general_documents", 9999), "documents", "9999 are wanted; lower evaluation.general_documents"),
    "too few problems to hear": (key("data", "feature_problems", 9999), "problems", "one has 4; lower data.feature_problems"),
    "texts longer than the context": (key("data", "max_tokens", 99999), "tokenizer", "context is 2048; lower data.max_tokens"),
    "a tokenizer that adds BOS twice": (lambda values: toys.opening(Path("mine/base"), "<bos>", "<bos>"), "tokenizer", "<bos> exactly once, found 2"),
    "answers longer than the context": (key("evaluation", "max_new_tokens", 99999), "prompts", "exceed the model's context of 2048"),
    "a folder that is not there": (key("model", "base", "./nothere"), "model", "no such folder here"),
    "a home": (key("model", "base", "~/nothere"), "model", "no such folder here"),
    "a URL": (key("model", "base", "https://host/owner/name"), "model", "owner/name, no URL"),
    "a file for a folder": (key("model", "base", "mine/task.yaml"), "model", "this is a file; give the folder"),
    "SAEs of which one is missing": (without_a_sae, "SAE files", "no block_2/cfg.json"),
    "SAEs of which one has no weights": (without_its_weights, "SAE files", "no block_2/sae_weights.safetensors"),
    "an SAE of another block": (an_sae_that_says(hook_name="model.layers.1"), "SAE files", "block_2: it says that it reads model.layers.1; the output of block 2 is needed"),
    "an SAE of another place": (an_sae_that_says(hook_name="blocks.2.hook_mlp_out"), "SAE files", "reads blocks.2.hook_mlp_out; the output of block 2"),
    "test problems among the training ones": (problems(lambda train, test: pd.concat([train, test.head(2)])), "problems", "2 training problems of mine/changed are in its test split as well"),
    "problems that are numbers": (problems(lambda train, test: train.assign(problem=range(len(train)))), "problems", "column 'problem' holds int64, not text"),
    "no boxed answers": (key("finetune", "target", "minerva"), "problems", "set finetune.target to plain"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return toys.world(tmp_path_factory.mktemp("sound"))


def looked(folder, change):
    """What the doctor finds wrong, by the check's name."""
    shutil.copytree(folder / "mine", "mine")
    values = toys.profile()
    change(values)
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    return {check.name: check.line for check in doctor.examine(profiles.load("mine.yaml"), "cpu") if not check.ok}


def test_sound_files_pass_every_look(sound, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert looked(sound, lambda values: None) == {}


@pytest.mark.parametrize("bos", ["<bos>", None])
def test_a_tokenizer_that_adds_no_bos_is_taken_and_the_look_says_so(sound, tmp_path, monkeypatch, bos):
    monkeypatch.chdir(tmp_path)
    assert looked(sound, lambda values: toys.opening(Path("mine/base"), bos=bos)) == {}
    (found,) = [check for check in doctor.examine(profiles.load("mine.yaml"), "cpu") if check.name == "tokenizer"]
    assert "texts open without BOS" in found.line


@pytest.mark.parametrize("name", CASES)
def test_what_a_look_can_tell_is_told_before_anything_is_computed(sound, tmp_path, monkeypatch, name):
    change, check, said = CASES[name]
    monkeypatch.chdir(tmp_path)
    found = looked(sound, change)
    assert re.search(said, found[check]) and "\n" not in found[check], found
