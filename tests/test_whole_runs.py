"""Whole runs of `make reproduce` on the smoke profile, in copies of the checkout. Slow."""

import json
import shutil
import time

import pandas as pd
import pytest
import runs
from conftest import ROOT
from runs import answers, clone, made, records, run

from stetholib.commands.notebooks import STEPS
from stetholib.data import prompts
from stetholib.models import answering
from stetholib.store.tables import CONTRACTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(undisturbed, tmp_path_factory):
    return shutil.copytree(undisturbed, tmp_path_factory.mktemp("first") / "clone")


def test_a_run_leaves_every_contract_file_and_a_picture_for_each_step(first):
    for stem, (keys, columns) in CONTRACTS.items():
        table = pd.read_csv(first / "figures" / "smoke" / f"{stem}.csv")
        assert (keys + columns) == list(table.columns)[: len(keys + columns)] and len(table), stem
    names = set(made(first))
    assert all(f"{step}.{kind}" in names for step in STEPS for kind in ("png", "svg", "csv")) and "manifest.json" in names


def test_every_answer_is_on_record_with_the_contracts_fields(first):
    path = first / "runs" / "smoke" / "records" / "stethoscope.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    fields = (
        "variant subject level problem_id prompt_tokens completion completion_tokens stopped_by extracted exact_match math_verify"
    )
    assert len(rows) == 30 and all(set(fields.split()) == set(row) for row in rows)
    assert len({row["problem_id"] for row in rows}) == 30


def test_again_runs_nothing_and_changes_no_byte(first):
    before = made(first)
    assert run(first).count("unchanged") == 6 and made(first) == before


def test_after_a_change_of_prose_that_notebook_alone_runs_from_the_store(first):
    before, store = made(first), sorted(p.name for p in (first / "runs" / "smoke" / "store").iterdir())
    path = first / "notebooks" / "03_subspace_projection.ipynb"
    path.write_text(path.read_text().replace("What is the scalpel?", "What, then, is the scalpel?"))
    said = run(first)
    assert said.count("unchanged") == 5 and "03_subspace_projection: running" in said
    assert made(first) == before and sorted(p.name for p in (first / "runs" / "smoke" / "store").iterdir()) == store


def test_several_worlds_go_on_after_a_kill_and_end_as_undisturbed_ones(first, tmp_path):
    def start(folder, processes=1):
        asked = ["--count", "2", "--into", "seeds", "--processes", str(processes)]
        return runs.launch(folder, ["seeds", "--profile", "smoke", *asked])

    folder = clone(tmp_path)
    killed = start(folder)
    for line in killed.stderr:
        if line.startswith("world 1"):
            time.sleep(4)
            runs.kill(killed)
            break
    kept = runs.stages(folder)
    assert kept and not (folder / "figures" / "seeds").exists()
    both = start(folder, processes=2)
    assert both.wait() == 0, both.communicate()[1]
    one_by_one = start(first)
    peaks, said = runs.memory_by_world(one_by_one)
    assert one_by_one.wait() == 0, said
    assert set(peaks) == {"world 0", "world 1"} and max(peaks.values()) < 3
    assert kept.items() <= runs.stages(folder).items()
    one, other = ({path.name: path.read_bytes() for path in (where / "figures" / "seeds").iterdir()} for where in (folder, first))
    tables = {f"{stem}.csv" for stem in ("claims", "worlds", "stability", "spread", "selectors")}
    assert one == other and set(one) == tables | {"manifest.json", "seeds.png", "seeds.svg"}
    manifest = json.loads(one["manifest.json"])
    assert manifest["seeds"] == [0, 1] and manifest == json.loads(made(first)["manifest.json"]) | dict(seeds=[0, 1])
    table = pd.read_csv(folder / "figures" / "seeds" / "claims.csv", keep_default_na=False)
    default = pd.read_csv(first / "figures" / "smoke" / "06_claims.csv", keep_default_na=False)
    zero = table[table["world"] == 0].drop(columns="world").reset_index(drop=True)
    assert table.groupby(["claim", "contrast"])["world"].apply(list).map(lambda seen: seen == [0, 1]).all()
    assert zero[list(default)].equals(default)


def in_chunks(folder):
    """The smoke profile in a clone whose chunks hold four problems, in two slots: (folder, the profile)."""
    text = (ROOT / "stetholib" / "profiles" / "smoke.yaml").read_text()
    start = text.index("evaluation:")
    path = clone(folder) / "stetholib" / "profiles" / "smoke.yaml"
    path.write_text(text[:start] + text[start:].replace("batch_size: 256", "batch_size: 2"))
    code = folder / "stetholib" / "models" / "answering.py"
    assert "\nCHUNK = 512 " in code.read_text()
    code.write_text(code.read_text().replace("\nCHUNK = 512 ", "\nCHUNK = 4 "))
    return folder, "smoke"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder, profile = in_chunks(tmp_path_factory.mktemp("one"))
    run(folder, profile)
    return folder


def test_two_processes_answer_as_one_does(one_process, tmp_path):
    folder, profile = in_chunks(tmp_path)
    run(folder, profile, "--processes", "2")
    shared = answers(folder)
    assert sum(name.endswith(".1.jsonl") for name in shared) == len(shared) / 2
    assert all(0 < len(ids) < 30 for ids in shared.values())
    assert records(folder) == records(one_process) and made(folder) == made(one_process)


def test_killed_while_answering_it_goes_on_and_asks_nothing_twice(one_process, tmp_path):
    folder, profile = in_chunks(tmp_path)
    killed = runs.start(folder, profile)

    def halfway():  # in the middle of the third variant, or of one after it
        sizes = [len(ids) for ids in answers(folder).values()]
        return sum(sizes) >= 70 and any(0 < size < 30 for size in sizes)

    runs.wait_for(lambda: halfway() and runs.held(killed, halfway), killed)
    runs.kill(killed)
    before = answers(folder)
    assert any(0 < len(ids) < 30 for ids in before.values())
    run(folder, profile)
    after = answers(folder)
    assert all(after[name][: len(ids)] == ids for name, ids in before.items())
    assert all(len(ids) == len(set(ids)) == 30 for ids in after.values())
    assert records(folder) == records(one_process) and made(folder) == made(one_process)


def test_any_notebook_can_be_opened_first(tmp_path, monkeypatch):
    import papermill

    folder = clone(tmp_path)
    monkeypatch.setenv("STETHOLIB_HOME", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))  # the kernel's package is the folder's own
    papermill.execute_notebook(
        str(folder / "notebooks" / "04_layer_selection.ipynb"),
        str(tmp_path / "out.ipynb"),
        parameters={"profile": "smoke"},
        cwd=str(folder),
        progress_bar=False,
    )
    assert (folder / "figures" / "smoke" / "04_layer_selection.csv").is_file()


def test_no_test_problem_is_read_before_step_05(tmp_path, monkeypatch):
    """Steps 01 to 04 run with a data source that refuses the test split."""
    from stetholib.data import corpora
    from stetholib.study import Study

    real = corpora.problems

    def guarded(spec, split, *rest):
        assert split != "test", "a test problem was read before step 05"
        return real(spec, split, *rest)

    monkeypatch.setattr(corpora, "problems", guarded)
    study = Study.open("smoke", root=tmp_path)
    study.task_vectors.table(), study.sae_features.table()
    study.subspace_projection.table(), study.subspace_projection.mechanism(), study.subspace_projection.energy_or_direction()
    stethoscope = study.layer_selection
    stethoscope.table(), stethoscope.agreement(), stethoscope.relations(), stethoscope.reliability()
    with pytest.raises(AssertionError, match="test problem"):
        study.minerva_math.table()


def test_no_family_of_problems_is_nearly_solved_by_the_shipped_base(mini):
    from stetholib.study import Study

    rows = Study.open("mini").world.problems("test")  # the very problems that the default world is measured on
    by_id = {prompts.problem_id(row["subject"], row["problem"]): row for row in rows}
    found = []
    asked = {name: prompts.prompt(row["problem"]) for name, row in by_id.items()}
    answering.answer_all(mini, asked, answering.plan(mini.tokenizer, asked), answering.Limits(96, 256), found.extend)
    closing = "The final answer is $"
    right = pd.DataFrame(
        dict(
            family=by_id[a.problem_id]["family"],
            right=a.completion.rpartition(closing)[2].partition("$")[0] == prompts.boxed_answer(by_id[a.problem_id]["solution"]),
        )
        for a in found
    )
    assert right.groupby("family")["right"].mean().max() <= 0.85
