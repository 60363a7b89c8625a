"""Profiles of random mistakes: each is a profile, or is refused in one line. STETHOLIB_FUZZ raises the number of examples."""

import copy
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stetholib import profiles
from stetholib.errors import UserError

EXAMPLES = int(os.environ.get("STETHOLIB_FUZZ", "200"))
FUZZED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SMOKE = yaml.safe_load((profiles.FOLDER / "smoke.yaml").read_text()) | {"name": "mine"}
PLACES = [(section,) for section in SMOKE] + [(s, k) for s, inside in SMOKE.items() if isinstance(inside, dict) for k in inside]
ODD = [10**400, -(10**400), 16**5000, 10**11, float("inf"), float("nan"), True, False, None, "", ".", "..", "../../x", "/x", "a\0b", "a\nb", "\ud800", "2e-4", "mini", "seeds", {1: 1, "a": 2}, {"algebra": True}, {}, [], {"../x": 1}, "x" * 10**4, [[]], b"x"]  # fmt: skip
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=3))
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.one_of(st.text(max_size=4), st.integers(), st.none()), inner, max_size=3), max_leaves=6),
)  # fmt: skip
ACTS = st.lists(st.tuples(st.sampled_from(["put", "drop", "rename", "add"]), st.sampled_from(PLACES), VALUES), min_size=1, max_size=3)  # fmt: skip


def mutated(acts):
    """The smoke profile's keys with some of them changed, dropped, renamed or added to."""
    values = copy.deepcopy(SMOKE)
    for act, (*sections, last), value in acts:
        inside = values
        for section in sections:
            inside = inside.get(section)
        if not isinstance(inside, dict):
            continue
        if act == "put":
            inside[last] = value
        elif act == "add":
            inside[value if isinstance(value, str | int | float | None) else "more"] = 1
        else:
            old = inside.pop(last, None)
            inside |= {f"{last}s": old} if act == "rename" else {}
    return values


def one_line_or_a_profile(ask):
    try:
        assert isinstance(ask(), profiles.Profile)
    except UserError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) < 700


@FUZZED
@given(ACTS)
def test_a_file_of_random_mistakes_is_a_profile_or_one_line(tmp_path, acts):
    path = tmp_path / "mine.yaml"
    try:
        path.write_text(yaml.safe_dump(mutated(acts)), encoding="utf-8")
    except (UnicodeEncodeError, ValueError):  # what YAML cannot write, no file holds
        return
    one_line_or_a_profile(lambda: profiles.load(str(path)))


@FUZZED
@given(st.dictionaries(st.one_of(st.sampled_from([".".join(place) for place in PLACES]), st.text(max_size=6), st.integers()), VALUES, min_size=1, max_size=3))  # fmt: skip
def test_random_overrides_are_a_profile_or_one_line(overrides):
    one_line_or_a_profile(lambda: profiles.load("smoke", overrides))


def text(**changes):
    return yaml.safe_dump(SMOKE | changes)


BIG = "1" * 400
# name -> (the file, what its line says)
FILES = {
    "a name that climbs out": (text(name="../../x"), r"'\.\./\.\./x' is no name"),
    "an empty name": (text(name=""), "'' is no name"),
    "the folder as a name": (text(name="."), r"'\.' is no name"),
    "the folder above as a name": (text(name=".."), r"'\.\.' is no name"),
    "an absolute name": (text(name="/x"), "'/x' is no name"),
    "a long name": (text(name="x" * 65), "is no name"),
    "a name with NUL": (text(name="a\0b"), "one line of text"),
    "a shipped profile's name": (text(name="mini"), "write over the figures that come with the repository"),
    "a shipped profile's name in capitals": (text(name="Mini"), "write over the figures"),
    "the committed worlds' name": (text(name="seeds"), "write over the figures"),
    "a subject that is a path": (text(data=SMOKE["data"] | {"test_problems": {"../x": 1}}), r"'\.\./x' is no name"),
    "subjects of two kinds": (text(data=SMOKE["data"] | {"test_problems": {1: 1, "a": 1}}), "1 is no name"),
    "a subject counted by truth": (text(data=SMOKE["data"] | {"test_problems": {"algebra": True}}), "positive whole numbers"),
    "no subject": (text(data=SMOKE["data"] | {"test_problems": {}}), "positive whole numbers"),
    "a key twice": (text() + "seed: 1\n", r"line \d+ gives the key 'seed' again"),
    "a key of a section twice": (text(sae=0).replace("sae: 0", "sae: {k: 1, k: 2}"), r"line \d+ gives the key 'k' again"),
    "a number of 400 digits": (text(seed=0).replace("seed: 0", f"seed: {BIG}"), "out of range"),
    "a negative one": (text(seed=0).replace("seed: 0", f"seed: -{BIG}"), "out of range"),
    "a number of 400 digits for a float": (text(finetune=0).replace("finetune: 0", f"finetune: {BIG}"), "expected a section"),
    "an endless number": (text(finetune=SMOKE["finetune"] | {"epochs": float("inf")}), "inf is out of range"),
    "a billion threads": (text(threads=10**11), "between 1 and 1024"),
    "more active features than there are": (text(sae=SMOKE["sae"] | {"k": 65}), "65 is above d_sae, 64"),
    "a number that YAML reads as text": (text(finetune=SMOKE["finetune"] | {"learning_rate": "2e-4"}), "write 2.0e-4"),
    "a value that is not what its tag says": (text() + "x: !!int ''\n", "not a readable YAML"),
    "brackets without end": ("[" * 5000, "not a readable YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_profile_with_one_mistake_is_refused_in_one_line(tmp_path, name):
    content, said = FILES[name]
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(profiles.ProfileError, match=said) as refused:
        profiles.load(str(path))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("overrides", [{"name": "../x"}, {"name": "mini"}, {"name": "a/b"}])
def test_an_override_of_the_name_is_held_to_the_same(overrides):
    with pytest.raises(profiles.ProfileError, match="is no name|write over"):
        profiles.load("smoke", overrides)


def test_nothing_is_deleted_by_a_name_that_is_a_path(tmp_path, monkeypatch, capsys):
    from stetholib.__main__ import main

    victim = tmp_path / "x" / ".1.kept"
    victim.parent.mkdir()
    victim.touch()
    (tmp_path / "home" / "figures").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text(text(name="../../x"))
    monkeypatch.setenv("STETHOLIB_HOME", str(tmp_path / "home"))
    for command in (["reproduce"], ["doctor"], ["seeds"]):
        assert main([*command, "--profile", str(tmp_path / "mine.yaml")]) == 2
    assert victim.is_file() and capsys.readouterr().err.count("\n") == 3


@pytest.mark.parametrize("into", ["../x", "", ".", "mini", "smoke", "/tmp/x"])
def test_worlds_go_into_a_folder_below_figures_that_is_no_profiles(into):
    from stetholib.commands import seeds

    with pytest.raises(UserError, match="INTO"):
        seeds.run("smoke", "cpu", 1, into)
