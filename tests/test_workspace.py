import json
import resource
import signal
import types

import pandas as pd
import pytest
import torch

from stetholib import workspace as ws
from stetholib.workspace import Artefact, Workspace, WorkspaceError


@pytest.fixture()
def space(tmp_path):
    return Workspace("test", tmp_path)


def make(folder):
    (folder / "extra.txt").write_text("x")
    return Artefact({"a": torch.arange(3.0)}, {"t": pd.DataFrame({"n": [1, 2], "x": [0.1, 1 / 3]})}, {"v": 7})


def test_an_artefact_is_made_once_and_comes_back_exactly(space):
    made = []
    for _ in range(2):
        found = space.cached("stage", "key", lambda folder: made.append(1) or make(folder))
    assert made == [1] and found.values == {"v": 7} and found.key == "key"
    assert torch.equal(found.tensors["a"], torch.arange(3.0)) and found.tables["t"]["x"].tolist() == [0.1, 1 / 3]
    assert (found.folder / "extra.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["tensors.safetensors", "t.parquet", "extra.txt", "artefact.json"])
def test_a_damaged_artefact_is_set_aside_and_made_anew(space, name):
    path = space.cached("stage", "key", make).folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    made = []
    space.cached("stage", "key", lambda folder: made.append(1) or make(folder))
    assert made == [1] and any(p.name.startswith("damaged-") for p in space.store.iterdir())


def test_a_stage_that_fails_leaves_nothing_behind(space):
    def fails(folder):
        (folder / "half.txt").write_text("half")
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError):
        space.cached("stage", "key", fails)
    assert [p.name for p in space.store.iterdir() if p.is_dir()] == []


def published(**changes):
    return pd.DataFrame(
        [
            dict(test="b", base_correct=1, edited_correct=2, n=3, z=1 / 3, p=0.5),
            dict(test="a", base_correct=1, edited_correct=2, n=3, z=2.0, p=1e-9),
        ]
    )


def test_a_table_is_sorted_by_key_with_six_digits_and_keys_first(space):
    text = space.table("06_published", published()[["p", "z", "n", "edited_correct", "base_correct", "test"]]).read_text()
    assert text == "test,base_correct,edited_correct,n,z,p\na,1,2,3,2,1e-09\nb,1,2,3,0.333333,0.5\n"
    assert len(space.read_table("06_published")) == 2


def test_a_table_that_breaks_its_contract_is_not_written(space):
    with pytest.raises(WorkspaceError, match="column 'z' is missing"):
        space.table("06_published", published().drop(columns="z"))
    with pytest.raises(WorkspaceError, match="share the key"):
        space.table("06_published", published().assign(test="a"))
    with pytest.raises(WorkspaceError, match="run notebook 06 first"):
        space.read_table("06_published")


def test_prose_does_not_change_a_codes_hash_but_code_does(tmp_path):
    def module(text):
        path = tmp_path / "m.py"
        path.write_text(text)
        found = types.ModuleType("m")
        found.__file__ = str(path)
        return ws.source_hash([found])

    plain = module('"""Doc."""\ndef f(x):\n    """Says."""\n    return x + 1\n')
    assert plain == module('"""Other."""\n\n\ndef f(x):\n    """Says more."""\n    # why\n    return x + 1\n')
    assert plain != module('"""Doc."""\ndef f(x):\n    """Says."""\n    return x + 2\n')


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"

    def half(draft):
        draft.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ws.atomic(path, half)
    assert list(path.parent.iterdir()) == []
    ws.atomic(path, lambda draft: draft.write_text("whole"))
    assert path.read_text() == "whole"


def test_a_line_cut_short_by_a_kill_is_left_out_and_costs_no_other_line(tmp_path, caplog):
    path = tmp_path / "answers.jsonl"
    ws.append_json(path, [{"a": 1}, {"a": "é\u2028"}])
    path.write_bytes(path.read_bytes() + b'{"a": 3')
    assert list(ws.read_json_lines(path)) == [{"a": 1}, {"a": "é\u2028"}]
    assert "answers.jsonl: line 3 is damaged" in caplog.text
    ws.append_json(path, [{"a": 4}])
    assert list(ws.read_json_lines(path)) == [{"a": 1}, {"a": "é\u2028"}, {"a": 4}]
    assert list(ws.read_json_lines(tmp_path / "absent")) == []


def test_every_flipped_byte_of_a_ledger_is_noticed(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"completion": "so it is $5$.", "tokens": 12}, {"completion": "2", "tokens": 3}]
    ws.append_json(path, rows)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 32, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            assert all(row in rows for row in ws.read_json_lines(path))


def test_a_ledger_is_cut_back_where_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    ws.append_json(path, [{"a": 1}])
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limit[1]))
    try:
        with pytest.raises(OSError):
            ws.append_json(path, [{"a": "long " * 20}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before


def test_progress_says_how_long_it_will_take(tmp_path, monkeypatch):
    log, clock = tmp_path / "log", iter(range(0, 1000, 3))
    monkeypatch.setenv("STETHOLIB_PROGRESS", str(log))
    monkeypatch.setattr(ws.time, "monotonic", lambda: next(clock))
    assert list(ws.progress(range(6), "step")) == list(range(6))
    assert "step: 1/6, 6 s, about 30 s left" in log.read_text()


def test_the_manifest_of_an_artefact_names_its_files(space):
    index = json.loads((space.cached("stage", "key", make).folder / "artefact.json").read_text())
    assert set(index["files"]) == {"extra.txt", "t.parquet", "tensors.safetensors"} and index["stage"] == "stage"
