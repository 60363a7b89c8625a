import json
import resource
import signal
import types

import pandas as pd
import pytest
import torch

from stetholib.store import artefacts, code, files, progress
from stetholib.store.artefacts import Store
from stetholib.store.files import append_json, atomic, read_json_lines
from stetholib.store.tables import Workspace, WorkspaceError

MADE, FLAWS = [], []  # what the stages below did, and whether they fail: no part of their code


@pytest.fixture()
def space(tmp_path):
    return Workspace("test", tmp_path)


@pytest.fixture()
def store(tmp_path):
    MADE.clear(), FLAWS.clear()
    return Store(tmp_path / "store")


def stage(count, *, folder):
    MADE.append(count)
    (folder / "extra.txt").write_text("x")
    if FLAWS:
        raise FLAWS[0]
    table = pd.DataFrame({"n": [1, 2], "x": [0.1, 1 / 3]})
    return {"a": torch.arange(float(count)), "t": table, "v": 7}


def anew(store):
    """The same store, seen by another process."""
    return Store(store.folder, store.conditions)


def test_an_artefact_is_made_once_and_comes_back_exactly(store):
    for one in (store, store, anew(store)):
        found = one.made(stage, 3)
        assert set(found.value) == {"a", "t", "v"} and found.value["v"] == 7 and found.name.startswith("stage-")
        assert torch.equal(found.value["a"], torch.arange(3.0)) and found.value["t"]["x"].tolist() == [0.1, 1 / 3]
        assert (found.folder / "extra.txt").read_text() == "x"
    assert MADE == [3]


@pytest.mark.parametrize("name", ["tensors.safetensors", "value.t.parquet", "extra.txt", "artefact.json"])
def test_a_damaged_artefact_is_set_aside_and_made_anew(store, name):
    path = store.made(stage, 3).folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    found = anew(store).made(stage, 3)
    assert MADE == [3, 3] and any(p.name.startswith("damaged-") for p in store.folder.iterdir())
    assert torch.equal(found.value["a"], torch.arange(3.0))


@pytest.mark.parametrize("name", ["tensors.safetensors", "value.t.parquet", "extra.txt", "artefact.json"])
def test_an_artefact_that_lacks_a_file_is_made_anew(store, name):
    (store.made(stage, 3).folder / name).unlink()
    anew(store).made(stage, 3)
    assert MADE == [3, 3]


def test_a_stage_that_fails_leaves_nothing_behind(store):
    FLAWS.append(RuntimeError("on the way"))
    with pytest.raises(RuntimeError):
        store.made(stage, 3)
    assert [p.name for p in store.folder.iterdir() if p.is_dir()] == []


def test_what_a_killed_process_left_is_swept_away(store):
    name = f"stage-{store.key(stage, 3)}"
    left = store.folder / f".{name}.1"
    left.mkdir(parents=True)
    (left / "half.txt").touch()
    store.made(stage, 3)
    assert [p.name for p in store.folder.iterdir() if p.is_dir()] == [name]


def resumes(count, *, unfinished):
    unfinished.mkdir(exist_ok=True)
    (unfinished / str(len(MADE))).touch()
    MADE.append(count)
    if FLAWS:
        raise FLAWS.pop()
    return sorted(path.name for path in unfinished.iterdir())


def test_work_that_resumes_finds_what_it_left_and_leaves_none_when_it_is_done(store):
    FLAWS.append(RuntimeError("on the way"))
    with pytest.raises(RuntimeError):
        store.made(resumes, 1)
    assert store.made(resumes, 1).value == ["0", "1"]
    assert not any(p.name.startswith("unfinished") for p in store.folder.iterdir())


def broken(count):
    return object()


def test_what_cannot_be_kept_is_refused_and_leaves_nothing(store):
    with pytest.raises(TypeError, match="a stage cannot return object"):
        store.made(broken, 1)
    assert [p.name for p in store.folder.iterdir() if p.is_dir()] == []


def test_conditions_are_part_of_every_key(store):
    assert store.key(stage, 3) == anew(store).key(stage, 3)
    assert len({Store(store.folder, given).key(stage, 3) for given in ((), ["cpu", 2], ["cpu", 4], ["cuda", 2])}) == 4


def grows(count):
    """Rows, one at a time."""


def test_a_ledger_keeps_its_rows_under_a_key_and_reads_all_parts(store):
    whole = store.ledger("rows", grows, 1, parts="*")
    whole.append([{"a": 1}])
    part = store.ledger("rows", grows, 1, part=".1", parts="*")
    assert part.rows == [{"a": 1}] and part.identity == whole.identity == store.key(grows, 1)
    part.append([{"a": 2}, {"a": 3}])
    assert part.rows == [{"a": 1}, {"a": 2}, {"a": 3}] and whole.rows == [{"a": 1}]
    assert sorted(row["a"] for row in store.ledger("rows", grows, 1, parts="*").rows) == [1, 2, 3]
    assert store.ledger("rows", grows, 2, parts="*").rows == []
    assert {p.name for p in store.folder.iterdir()} == {f"rows-{whole.identity}{part}.jsonl" for part in ("", ".1")}


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


def test_prose_does_not_change_a_codes_hash_but_code_does(tmp_path, monkeypatch):
    def module(text):
        path = tmp_path / "m.py"
        path.write_text(text)
        found = types.ModuleType("m")
        found.__file__ = str(path)
        monkeypatch.setitem(code.sys.modules, "m", found)
        exec(compile(text, str(path), "exec"), found.__dict__)
        code.outline.cache_clear(), code.code_of.cache_clear(), code._in_reach.cache_clear()
        return code.code_of(found.f)

    plain = module('"""Doc."""\ndef f(x):\n    """Says."""\n    return x + 1\n')
    assert plain == module('"""Other."""\n\n\ndef f(x):\n    """Says more."""\n    # why\n    return x + 1\n')
    assert plain != module('"""Doc."""\ndef f(x):\n    """Says."""\n    return x + 2\n')
    assert code.canonical("x = 1  # one") == code.canonical("x=1") != code.canonical("x = 2")


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"

    def half(draft):
        draft.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        atomic(path, half)
    assert list(path.parent.iterdir()) == []
    atomic(path, lambda draft: draft.write_text("whole"))
    assert path.read_text() == "whole"


def test_a_line_cut_short_by_a_kill_is_left_out_and_costs_no_other_line(tmp_path, caplog):
    path = tmp_path / "answers.jsonl"
    append_json(path, [{"a": 1}, {"a": "é\u2028"}])
    path.write_bytes(path.read_bytes() + b'{"a": 3')
    assert list(read_json_lines(path)) == [{"a": 1}, {"a": "é\u2028"}]
    assert "answers.jsonl: line 3 is damaged" in caplog.text
    append_json(path, [{"a": 4}])
    assert list(read_json_lines(path)) == [{"a": 1}, {"a": "é\u2028"}, {"a": 4}]
    assert list(read_json_lines(tmp_path / "absent")) == []


def test_every_flipped_byte_of_a_ledger_is_noticed(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"completion": "so it is $5$.", "tokens": 12}, {"completion": "2", "tokens": 3}]
    append_json(path, rows)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 32, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            assert all(row in rows for row in read_json_lines(path))


def test_a_ledger_is_cut_back_where_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    append_json(path, [{"a": 1}])
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limit[1]))
    try:
        with pytest.raises(OSError):
            append_json(path, [{"a": "long " * 20}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before


def test_progress_says_how_long_it_will_take(tmp_path, monkeypatch):
    log, clock = tmp_path / "log", iter(range(0, 1000, 3))
    monkeypatch.setenv("STETHOLIB_PROGRESS", str(log))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.progress(range(6), "step")) == list(range(6))
    assert "step: 1/6, 6 s, about 30 s left" in log.read_text()


def test_the_manifest_of_an_artefact_names_its_files(store):
    index = json.loads((store.made(stage, 3).folder / artefacts.INDEX).read_text())
    assert set(index["files"]) == {"extra.txt", "value.t.parquet", "tensors.safetensors"} and index["stage"] == "stage"
    assert index["key"] == store.key(stage, 3) and files.CHECK in index
