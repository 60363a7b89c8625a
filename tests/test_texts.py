from dataclasses import replace

import pandas as pd
import pytest

from stetholib.commands import fabricate
from stetholib.data import corpora
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
