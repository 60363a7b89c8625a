import dataclasses

import pytest
import yaml

from stetholib import profiles
from stetholib.profiles import ProfileError, load


@pytest.mark.parametrize("name", profiles.available())
def test_every_shipped_profile_is_valid_and_bears_its_own_name(name):
    profile = load(name)
    assert profile.name == name and len(profile.digest) == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile.seed = 1


DIGESTS = {
    "gemma-3-1b": "a1b2fe010b724493",
    "gemma-3-270m": "418e9c15c5658afb",
    "mini": "1414f96053ae676b",
    "organism": "391915f7cfd2ffdf",
    "organism-drawn": "5fea6ae720023542",
    "organism-negative": "c5f060c830eaa76a",
    "organism-other": "5b17f6c74f85b3bd",
    "paper": "9f8bb1703a837ded",
    "smoke": "837fdba8bcf60590",
    "smollm2": "f2049f0bc5b41e8d",
    "smollm2-math": "c49bc9af9a453ce2",
}


def test_the_shipped_profiles_are_these_and_ask_what_they_always_asked():
    """A digest that moves is another experiment: change it here only together with what the profile is meant to say."""
    assert {name: load(name).digest for name in profiles.available()} == DIGESTS
    assert [name for name in DIGESTS if load(name).published_rung] == ["paper"]


def test_keys_that_came_later_keep_the_hash_and_only_another_value_is_another_experiment():
    assert load("mini", {"finetune.lora_start": "eva"}).digest != DIGESTS["mini"]
    assert load("mini", {"sae.warm_up": 0.1}).digest != load("mini", {"model.notice": "ours"}).digest == DIGESTS["mini"]
    made = load("gemma-3-1b").finetune
    assert made.lora == "LoRA of rank 32" and dataclasses.replace(made, finetuned="mine").lora == load("mini").finetune.lora == ""
    assert dataclasses.replace(made, lora_start="pissa").lora == "LoRA of rank 32, started by pissa"


def changed(tmp_path, change):
    values = yaml.safe_load((profiles.FOLDER / "mini.yaml").read_text()) | {"name": "mine"}
    change(values)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_users_own_file_is_a_profile(tmp_path):
    path = changed(tmp_path, lambda v: v.update(seed=7))
    assert load(path).seed == 7 and load(path).digest != load("mini").digest


MISTAKES = {
    "misspelt section key": (
        lambda v: v["selection"].update(score_shair=v["selection"].pop("score_share")),
        r"unknown key 'score_shair' \(did you mean 'score_share'\?\)",
    ),
    "missing key": (lambda v: v["sae"].pop("k"), "missing key 'k'"),
    "share above one": (
        lambda v: v["projection"].update(rank_share=1.5),
        "rank_share: 1.5 is out of range, it must be between 0 and 1",
    ),
    "negative count": (
        lambda v: v["selection"].update(permutations=-3),
        "permutations: -3 is out of range, it must be 1 or more",
    ),
    "wrong choice": (lambda v: v["finetune"].update(method="lorra"), r"'lorra' \(did you mean 'lora'\?\)"),
    "float16": (lambda v: v["model"].update(dtype="float16"), "must be one of float32, bfloat16"),
    "text for a number": (lambda v: v.update(seed="zero"), "expected int, got 'zero'"),
    "truth for a number": (lambda v: v.update(seed=True), "expected int, got True"),
    "not a number": (lambda v: v["finetune"].update(learning_rate=float("nan")), "nan is out of range"),
    "number for a list": (lambda v: v["evaluation"].update(variants=3), "expected a list"),
    "value in a list out of range": (lambda v: v["projection"].update(rank_shares=[0.1, 2.0]), "2.0 is out of range"),
    "text for a section": (lambda v: v.update(sae="none"), "expected a section"),
    "no test problems": (lambda v: v["data"].update(test_problems={"algebra": 0}), "positive whole numbers"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_that_names_it(tmp_path, mistake):
    change, message = MISTAKES[mistake]
    with pytest.raises(ProfileError, match=message) as caught:
        load(changed(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_an_unknown_profile_names_the_nearest():
    with pytest.raises(ProfileError, match=r"unknown profile 'minni' \(did you mean 'mini'\?\)"):
        load("minni")


def test_overrides_reach_single_keys_and_refuse_unknown_ones():
    assert load("mini", {"selection.score_share": 0.05}).selection.score_share == 0.05
    for dotted, message in (
        ("selecton.score_share", "did you mean 'selection'"),
        ("selection.scoreshare", "did you mean 'score_share'"),
    ):
        with pytest.raises(ProfileError, match=message):
            load("mini", {dotted: 0.05})


def test_a_file_that_is_not_a_profile_is_refused(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ProfileError, match="mapping"):
        load(str(path))
    path.write_text("a: [\n")
    with pytest.raises(ProfileError, match="not a readable YAML"):
        load(str(path))


def test_no_code_asks_which_profile_it_serves():
    for path in profiles.FOLDER.parent.rglob("*.py"):
        text = path.read_text()
        assert "profile.name ==" not in text and 'name == "paper"' not in text


def test_a_profile_that_extends_another_says_only_what_differs_and_claims_nothing_for_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: paper\nname: mine\ntitle: mine\nselection: {greedy: false}\ndata: {test_problems: {algebra: 3}}\n")
    mine, paper = profiles.load(str(path)), profiles.load("paper")
    assert not mine.published_rung and mine.data.test_problems == {"algebra": 3} and mine.selection.greedy is False
    assert mine.selection.random_sets == paper.selection.random_sets and mine.model == paper.model


@pytest.mark.parametrize("name", profiles.available())
def test_any_shipped_profile_can_be_extended_one_that_itself_extends_among_them(tmp_path, name):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: {name}\nname: mine\ntitle: mine\n")
    mine = load(str(path))
    assert dataclasses.replace(mine, name=name, title=load(name).title, published_rung=load(name).published_rung) == load(name)
    assert not mine.published_rung


def test_what_the_real_rungs_share_is_no_profile_and_nobody_elses_to_extend(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: _real\nname: mine\ntitle: mine\n")
    assert "_real" not in profiles.available()
    with pytest.raises(ProfileError, match="extends '_real', which does not ship with the package"):
        load(str(path))
    with pytest.raises(ProfileError, match="unknown profile '_real'"):
        load("_real")
