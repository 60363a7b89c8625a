"""Ours beside its peers: what the README quotes is what was measured, and how it is timed and kept."""

import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from conftest import ROOT

from bench import __main__ as command
from bench import inputs, results, size, timing, works
from stetholib.commands import readme
from stetholib.editing import Edit, edited
from stetholib.errors import UserError
from stetholib.models import loading
from stetholib.models.weights import Checkpoint, edit_weights, weight_names

FOLDER = ROOT / "figures" / "bench"


def ticking(*seconds):
    """A clock in which the works take so many seconds, one after the other."""
    times = [0.0]
    for took in seconds:
        times += [times[-1], times[-1] + took]
    return iter(times[1:]).__next__


def test_the_readme_quotes_the_committed_table():
    (path, text), table = readme.written(ROOT, "bench"), pd.read_csv(FOLDER / "bench.csv")
    assert path.read_text() == text, "run: make readme"
    block = readme.part(text, "bench")
    quoted = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| [^|]+ \|$", block, re.M)
    assert [work for work, _ in quoted] == table["work"].tolist()
    ratios = [float("nan" if ratio == "-" else ratio) for _, ratio in quoted]
    assert ratios == pytest.approx(table["ratio"].tolist(), rel=0.005, nan_ok=True)


def test_the_committed_tables_hold_works_and_sizes_that_are_known_and_the_readme_says_which_are_not_measured():
    table = pd.read_csv(FOLDER / "bench.csv")
    assert list(table) == results.COLUMNS and table["work"].is_unique and set(table["work"]) <= set(results.ORDER)
    said = (ROOT / "bench" / "README.md").read_text().split("<!-- /bench -->")[1].split("\n\n")[1]
    for work in (*command.DEFAULT, "export_memory"):
        measured = (FOLDER / "size.csv").is_file() if work == "size" else work in set(table["work"])
        assert measured != (f"`{work}`" in said), work
    beside = table.dropna(subset=["theirs"])
    assert (beside["ratio"] / (beside["theirs"] / beside["ours"])).between(0.99, 1.01).all()
    if (FOLDER / "size.csv").is_file():
        for kind, part in pd.read_csv(FOLDER / "size.csv").groupby("of"):
            assert kind in results.KINDS and len(part) >= 4 and part["slope"].nunique() == 1, kind
            assert timing.slope(part["size"], part["seconds"]) == pytest.approx(part["slope"].iloc[0], abs=0.01)


def test_runs_alternate_and_their_medians_are_taken():
    order = []
    before = lambda side: order.append(f"before {side}")  # noqa: E731
    ours, theirs = (lambda run, name=name: order.append(f"{name} {run}") or run for name in ("ours", "theirs"))
    pair = timing.alternating(ours, theirs, 3, before, ticking(1, 10, 3, 30, 2, 90))
    assert order[:4] == ["before ours", "ours 0", "before theirs", "theirs 0"] and order[-1] == "theirs 2"
    assert pair.ours == [1, 3, 2] and pair.theirs == [10, 30, 90] and pair.our_results == [0, 1, 2]
    assert pair.row("a", "b", "yes") == dict(work="a", peer="b", ours=2, theirs=30, ratio=15, equal="yes")
    assert timing.share(3, 3) == "yes" and timing.share(2, 3) == "2 of 3"


def test_the_slope_of_a_power_law_is_its_power():
    assert timing.slope([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)
    clock = ticking(2, 4, 8, 2, 4, 8)
    rows = size.grown("problems", dict.fromkeys((10, 20, 40), lambda: None), 2, clock)
    assert [row["seconds"] for row in rows] == [2, 4, 8] and all(row["slope"] == pytest.approx(1) for row in rows)


def test_a_work_measured_again_replaces_its_rows_and_no_others(tmp_path):
    row = lambda work, ours: dict(work=work, peer="p", ours=ours, theirs=2.0, ratio=2.0 / ours, equal="yes")  # noqa: E731
    keep = lambda *rows: results.keep(tmp_path / "bench.csv", rows, results.COLUMNS, results.ORDER)  # noqa: E731
    keep(row("edit", 1.0))
    keep(row("export", 1.0), row("export_memory", 4.0))
    keep(row("export", 0.5), row("export_memory", 8.0))
    table = pd.read_csv(tmp_path / "bench.csv")
    assert table["work"].tolist() == ["export", "export_memory", "edit"] and table["ours"].tolist() == [0.5, 8.0, 1.0]
    sizes = [dict(of=kind, size=n, seconds=n / 10, slope=1.0) for kind in results.KINDS for n in (1, 2, 4, 8)]
    results.keep(tmp_path / "size.csv", sizes, results.SIZES, [*results.KINDS])
    results.draw(tmp_path)
    plt.close("all")
    assert {path.name for path in tmp_path.iterdir()} == {"bench.csv", "size.csv", "bench.png", "bench.svg"}


@pytest.mark.parametrize(
    "asked, said",
    [
        (["--works", "anser"], "WORKS: there is no work 'anser' (did you mean 'answer'?); there are: answer,"),
        (["--runs", "0"], "RUNS is 0"),
        (["--scale", "2"], "SCALE is 2"),
        (["--run", "x"], "--help"),
    ],
)
def test_bad_input_is_one_line(asked, said, capsys):
    assert command.main(asked) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and said in error and error.count("\n") == 1


def test_what_is_asked_runs_in_the_order_of_the_works_and_reproduce_only_when_wanted():
    assert command.parsed(["--works", "size", "answer"]).works == ["answer", "size"]
    assert "reproduce" not in command.parsed([]).works and "reproduce" in command.parsed(["--reproduce"]).works


def test_a_command_that_fails_is_one_line(tmp_path):
    log = timing.ROOT / "runs" / "bench" / "logs" / "test.log"
    with pytest.raises(UserError, match=r"bench: false failed \(it said nothing\); see runs/bench/logs/test.log"):
        timing.process(["false"], log)
    log.unlink()
    assert timing.process(["true"], tmp_path / "log") > 0 and timing.peak(lambda: None) < 64


def test_the_fine_tune_differs_in_every_matrix_and_the_edit_takes_a_third_of_the_layers(tmp_path):
    two = inputs.miniature(inputs.Plan(1, 1.0, tmp_path))
    base, other = Checkpoint(two.base), Checkpoint(two.finetuned)
    matrices = set(weight_names(base).values())
    assert all((base[name] != other[name]).any() == (name in matrices) for name in base)
    assert len(two.third()) == 4 and two.third()[0] == 0 and two.third()[-1] == 11
    model = loading.load(two.base).model
    with edited(model, Edit(two.vector(), two.third())):
        weight = edit_weights(model)[0, "q"]
        assert weight.allclose(other[weight_names(other)[0, "q"]]) and not weight.equal(base[weight_names(base)[0, "q"]])
    sets = works.layer_sets(12, 4, 12)
    assert len(sets) == 12 and all(len(set(one)) == 4 for one in sets) and sets == works.layer_sets(12, 4, 12)


def test_problems_are_of_all_subjects_alike():
    found = [row["subject"] for row in inputs.rows(21)]
    assert len(found) == 21 and {found.count(subject) for subject in found} == {3}


def test_the_machine_has_no_name_and_no_path():
    said = results.machine()
    assert said["cores"] >= 1 and said["peers"].keys() >= {"mergekit", "lm_eval"}
    assert set(said) == {"cores", "processor", "memory_gib", "system", "python", "libraries", "peers"}
    assert "/" not in str(said | {"processor": ""})
