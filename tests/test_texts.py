import shutil
from dataclasses import replace

import pandas as pd
import pytest

from stetholib.commands import fabricate
from stetholib.data import corpora, hub
from stetholib.data.mini.problems import SUBJECTS
from stetholib.errors import UserError
from stetholib.profiles import load

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
