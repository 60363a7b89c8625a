import re
import shutil
from dataclasses import replace
from importlib.metadata import distributions
from types import SimpleNamespace

import pandas as pd
import pytest

from stetholib.commands import fabricate, looks
from stetholib.data import corpora, hub, installed
from stetholib.data.mini.problems import SUBJECTS
from stetholib.errors import UserError
from stetholib.profiles import load
from stetholib.study import Study

DATA = replace(
    load("gemma-3-270m").data,
    train_problems=9,
    validation_problems=5,
    test_problems=dict.fromkeys(SUBJECTS, 7),
    general_documents=10,
)

OURS, SPLITS = load("mini").data, ("train", "validation", "test")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """MATH and WikiText in their parquet files, as folders."""
    folder = tmp_path_factory.mktemp("data")
    fabricate.maths(DATA, folder / "maths", 0)
    fabricate.general(DATA, folder / "general", 0)
    return replace(DATA, maths=str(folder / "maths"), general=str(folder / "general"))


def test_validation_is_a_part_of_training_that_the_fine_tune_never_sees(spec):
    splits = {split: corpora.problems(spec, split, 0) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 63, "validation": 35, "test": 49}
    asked = {split: {row["problem"] for row in rows} for split, rows in splits.items()}
    assert not asked["train"] & asked["validation"] and not asked["train"] & asked["test"]
    assert splits["validation"] == corpora.problems(spec, "validation", 1)  # picked by hash, in every world


def test_problems_on_two_sides_of_a_data_set_of_the_hub_are_left_out_of_training_and_counted(spec, tmp_path, monkeypatch):
    """MATH itself has some; nobody can mend what lies on the Hub, so they are left out. White space makes no other problem."""
    shutil.copytree(spec.maths, tmp_path / "maths")
    train, test = (next((tmp_path / "maths" / "algebra").glob(f"{split}-*.parquet")) for split in ("train", "test"))
    tested = pd.read_parquet(test).head(3).assign(problem=lambda rows: "  " + rows["problem"])
    held = next(row for row in corpora.problems(spec, "validation", 0) if row["subject"] == "algebra")
    copies = pd.DataFrame([{**held, "problem": " " * more + held["problem"]} for more in range(1, 9)])
    pd.concat([pd.read_parquet(train), tested, copies]).to_parquet(train)
    monkeypatch.setattr(hub, "snapshot", lambda *asked: tmp_path / "maths")
    fetched = replace(spec, maths="owner/name", train_problems=10_000)
    taken = sum(row["problem"].strip() == held["problem"] for row in corpora.problems(fetched, "validation", 0))
    assert corpora.left_out(fetched) == dict(left_out_in_test=3, left_out_in_validation=9 - taken) and 0 < taken < 9
    assert corpora.left_out(OURS) == {}, "generated problems"
    same = {split: {" ".join(row["problem"].split()) for row in corpora.problems(fetched, split, 0)} for split in SPLITS}
    assert same["train"] and not same["train"] & (same["validation"] | same["test"]) and not same["validation"] & same["test"]
    with pytest.raises(UserError, match="3 training problems of .* are in its test split as well"):
        corpora.problems(replace(spec, maths=str(tmp_path / "maths")), "train", 0)


def test_general_text_is_paragraphs_and_its_parts_never_share_one(spec):
    parts = {split: corpora.general(spec, split, 10, 0) for split in ("train", "validation", "test")}
    assert all(len(text.split()) >= 40 for part in parts.values() for text in part)
    assert len(set().union(*parts.values())) == 30
    whole = {split: set(corpora.articles(spec, part)) for split, part in parts.items()}
    assert not whole["train"] & whole["validation"] and not whole["test"] & (whole["train"] | whole["validation"])
    assert all(re.fullmatch(r" = Tale \d+ = \n", article) for article in set().union(*whole.values()))
    every = corpora.articles(spec, corpora.general(spec, "train", 10_000, 0, or_fewer=True))
    assert max(map(every.count, every)) == 3  # of an article, none of which is in another part
    assert corpora.articles(OURS, ["one", "two"]) == ["one", "two"]


def test_too_little_general_text_and_a_missing_split_say_which_key_to_mend(spec, tmp_path):
    with pytest.raises(UserError, match=r"lower data.general_documents"):
        corpora.general(spec, "test", 10_000, 0)
    with pytest.raises(UserError, match=r"has no algebra/test-\*.parquet; mend data.maths"):
        corpora.problems(replace(spec, maths=str(tmp_path)), "test", 0)


def test_rows_without_a_text_are_refused_and_fewer_texts_will_do_where_asked_so(spec, tmp_path):
    file = tmp_path / "wiki" / str(DATA.general_config) / "validation-00000-of-00001.parquet"
    fabricate._parquet(pd.DataFrame({"text": ["a " * 50, None]}), file)
    with pytest.raises(UserError, match="some rows have no 'text'"):
        corpora.general(replace(spec, general=str(tmp_path / "wiki")), "train", 1, 0)
    assert 10 < len(corpora.general(spec, "train", 10_000, 0, or_fewer=True)) < 10_000


def test_the_patterns_are_of_every_file_that_a_run_reads(spec):
    wanted = corpora.patterns(spec)
    assert len(wanted["maths"]) == 14 and "algebra/test-*.parquet" in wanted["maths"]
    assert wanted["general"] == [f"{DATA.general_config}/validation-*.parquet"]


PROSE = (
    "This is what package {} says of itself, in so many words that a paragraph of prose is made of it: "
    + "and on it goes " * 6
    + "{}."
)
LICENCE = (
    "Permission is granted to whoever asks for it, " + "and to everyone who comes after, " * 6 + "in all the world and for good."
)
# what is no prose -> as it stands in a document
NO_PROSE = {
    "too short": "Word " * 38 + "end.",
    "code": "\n".join(["Code:"] + ["    and so it goes on"] * 12) + ".",
    "fenced code": "```\nThis is " + "code and no prose " * 14 + ".\n```",
    "a session": ">>> this\nIs " + "an answer " * 30 + ".",
    "a table": "| A | B |\n| and so | it goes |\n" + "| of words | many |\n" * 12 + ".",
    "a rule": "Title\n=====\n" + "And so it goes on " * 14 + ".",
    "a formula": "Let x = 2, " + "and so it goes on " * 14 + ".",
    "an address": "See https://host.example/, " + "and so it goes on " * 14 + ".",
    "badges": "[![A](b)](c)\n" * 44 + ".",
    "fields": "A :param x: one " + "and so it goes on " * 14 + ".",
    "numbers": "Then " + "17 and 4 or 5 " * 20 + ".",
    "no sentence": "And so it goes on " * 14,
    "a fragment": "and so it goes on " * 14 + ".",
}


@pytest.fixture()
def site(tmp_path, monkeypatch):
    """Forty installed packages: each with a description, a document, a module, a licence like all others, and what is no prose."""
    for at in range(40):
        info = tmp_path / "site" / f"pack_{at}-1.0.dist-info"
        info.mkdir(parents=True)
        files = {f"pack_{at}/notes.rst": PROSE.format(at, "there"), f"pack_{at}/no.md": "\n\n".join(NO_PROSE.values())}
        indented = PROSE.format(at, "inside").replace(" words ", "\n    words ")
        files[f"pack_{at}/__init__.py"] = f'def one():\n    """Short.\n\n    {indented}\n    """\n    return 1\n'
        files[f"{info.name}/LICENSE.txt"] = LICENCE
        for name, text in files.items():
            (tmp_path / "site" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "site" / name).write_text(text)
        (tmp_path / "site" / f"pack_{at}" / "latin.txt").write_bytes(PROSE.format(at, "\xe9").encode("latin-1"))
        name = "stetholib" if at == 39 else f"Pack_{at}"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n\n{PROSE.format(at, 'here')}\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in (*files, f"pack_{at}/latin.txt", f"pack_{at}/gone.py")))
    monkeypatch.setattr(installed, "distributions", lambda: distributions(path=[str(tmp_path / "site")]))
    installed.paragraphs.cache_clear()
    yield tmp_path / "site"
    installed.paragraphs.cache_clear()


INSTALLED = replace(DATA, general="installed")


def test_installed_text_is_prose_of_40_words_each_once_and_a_package_lies_in_one_split(site):
    parts = {split: corpora.general(INSTALLED, split, 10_000, 0, or_fewer=True) for split in SPLITS}
    texts = [text for part in parts.values() for text in part]
    assert len(set(texts)) == len(texts) and all(len(text.split()) >= 40 for text in texts)
    assert sorted(texts) == sorted([LICENCE] + [PROSE.format(at, end) for at in range(39) for end in ("here", "there", "inside")])
    packages = {split: {text.split()[4] for text in part if text != LICENCE} for split, part in parts.items()}
    assert sum(map(len, packages.values())) == 39 and len(packages["train"]) > len(packages["validation"]) > 0 < len(
        packages["test"]
    )


def test_installed_text_is_the_same_in_any_order_of_packages_and_its_hash_tells_another(site, monkeypatch):
    first, told = corpora.general(INSTALLED, "train", 20, 0), installed.fingerprint()
    found = list(installed.distributions())
    monkeypatch.setattr(installed, "distributions", lambda: found[::-1])
    installed.paragraphs.cache_clear()
    assert corpora.general(INSTALLED, "train", 20, 1) == first and installed.fingerprint() == told
    monkeypatch.setattr(installed, "distributions", lambda: found[1:])
    installed.paragraphs.cache_clear()
    assert installed.fingerprint()["general_sha256"] != told["general_sha256"]
    assert told["general_words"] - installed.fingerprint()["general_words"] == 3 * len(PROSE.format(1, "here").split())


def test_formal_text_is_what_holds_signs_of_code_or_formulas(site):
    formal = "\n".join([f">>> x_{i} = f({i}) + {i}" for i in range(12)])
    (site / "pack_3" / "code.md").write_text(f"{PROSE.format(3, 'code')}\n\n{formal}\n\n{formal[:60]}\n")
    record = site / "pack_3-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text() + "pack_3/code.md,,\n")
    assert dict(installed.paragraphs(True)) == {" ".join(formal.split()): "pack-3"}
    spec = replace(DATA, general="installed_formal")
    found = {split: corpora.general(spec, split, 9, 0, or_fewer=True) for split in SPLITS}
    assert sorted(map(len, found.values())) == [0, 0, 1] and installed.fingerprint(True)["general_words"] == len(formal.split())
    with pytest.raises(UserError, match="data.maths is installed_formal, but packages hold"):
        corpora.problems(replace(DATA, maths="installed_formal"), "train", 0)


def test_too_little_installed_text_and_installed_problems_are_refused(site):
    with pytest.raises(UserError, match=r"data: installed has \d+ general documents for test, .*lower data.general_documents"):
        corpora.general(INSTALLED, "test", 10_000, 0)
    with pytest.raises(UserError, match="data.maths is installed, but packages hold general text and no problems"):
        corpora.problems(replace(DATA, maths="installed"), "train", 0)


def test_the_doctor_looks_at_installed_text_and_a_manifest_holds_its_hash_where_it_is_used(site, tmp_path):
    mini, said = load("mini"), {}
    other = replace(mini, data=replace(mini.data, general="installed", general_documents=10_000))
    assert [name for name, _ in looks.looks(other, ["maths", "general"], lambda: 1)] == ["subjects", "documents"]
    with pytest.raises(UserError, match="10000 are wanted; lower data.general_documents"):
        dict(looks.looks(other, ["maths", "general"], lambda: 1))["documents"]()
    for profile in (mini, other):
        world = SimpleNamespace(store=SimpleNamespace(folder=tmp_path), base_key="key", overrides={})
        heard = SimpleNamespace(self_tests=lambda: pd.DataFrame({"d_sae": [2]}))
        said[profile.data.general] = Study.manifest(
            SimpleNamespace(profile=profile, device="cpu", world=world, sae_features=heard)
        )
    assert set(said["generated"]["data"]) == {"maths", "maths_revision", "general", "general_revision"}
    assert said["installed"]["data"] == said["generated"]["data"] | {"general": "installed"} | installed.fingerprint()


@pytest.mark.slow
def test_what_is_installed_here_is_enough_for_a_real_model():
    parts = {split: corpora.general(INSTALLED, split, 10**6, 0, or_fewer=True) for split in SPLITS}
    words = {split: sum(len(text.split()) for text in part) for split, part in parts.items()}
    assert words["train"] >= 300_000 and words["validation"] >= 30_000 and words["test"] >= 30_000
