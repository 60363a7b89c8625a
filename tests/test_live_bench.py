"""The live bench: what it measures is what the study measures, its panel follows the controls, and without a reader it is a figure."""

import re
from types import SimpleNamespace

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pytest
from statsmodels.stats.proportion import proportion_confint
from test_steps import SMALL

from stetholib import plots
from stetholib.plots import bench_panel
from stetholib.study import Study, live_bench
from stetholib.study.live_bench import LiveBench, Setting

GIVEN = SMALL | {"data.validation_problems": 4, "selection.loss_problems": 3}
ALL = (0, 1, 2)


@pytest.fixture(autouse=True)
def no_figure_is_open():
    """Those of tests before these are none of theirs."""
    plt.close("all")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Study.open("smoke", GIVEN, root=tmp_path_factory.mktemp("bench"))


@pytest.fixture()
def bench(study):
    return LiveBench(study.minerva_math)


@pytest.fixture()
def panel(bench):
    made = bench_panel.BenchPanel(bench)
    made.open()
    return made


def shown(panel):
    """What the table of losses says: the solution's loss by row."""
    rows = re.findall(r"<th>([^<]+)</th>\s*<td>([^<]+)</td>", panel.loss.value)
    return {name: float(value) for name, value in rows}


def said(panel):
    return re.sub("<[^>]+>", "", panel.status.value)


@pytest.mark.parametrize(("layers", "alpha"), [((), 1.0), ((1,), 1.0), ((0, 2), 0.5), (ALL, 1.0)])
def test_the_loss_is_the_studys_loss_of_the_same_set(bench, study, layers, alpha):
    ours, theirs = bench.losses(Setting("x", "raw", layers, alpha)), study.losses.of(layers, alpha)
    assert bench.loss_problems == 21 and (ours.tokens == theirs.tokens).all()
    for part in ("solution", "closing"):
        assert ours.nats(part) == pytest.approx(theirs.nats(part), rel=1e-5)
    table = bench.loss_table(Setting("x", "raw", layers, alpha))
    assert table.loc["base", "solution"] == pytest.approx(study.losses.of(()).mean())
    assert table.loc["full", "closing"] == pytest.approx(study.losses.of(ALL).mean("closing"))


def test_a_fixed_few_of_each_subject_are_measured_where_there_are_more(bench, study, monkeypatch):
    monkeypatch.setattr(live_bench, "LOSS_PROBLEMS", 15)
    few = live_bench.balanced(study.losses.subjects, 15)
    assert bench.loss_problems == few.sum() == 14 and few.reshape(7, 3).tolist() == [[True, True, False]] * 7
    ours, theirs = bench.loss_table(Setting("x", "raw", (0, 1))), study.losses.of((0, 1))
    assert ours.loc["setting", "solution"] == pytest.approx(theirs.mean("solution", few), rel=1e-5)
    assert ours.loc["setting", "solution"] != pytest.approx(theirs.mean("solution"), rel=1e-5)
    assert live_bench.balanced(["a", "b", "a"], 1).tolist() == [True, True, False]


def test_scale_zero_and_no_layers_are_the_base(bench, study):
    base, edited = study.losses.of(()), bench.losses(Setting("x", "raw", ALL))
    for empty in (Setting("x", "raw", ALL, 0.0), Setting("x", "projected", ALL, 0.0), Setting("x", "raw", ())):
        assert bench.losses(empty).solution == pytest.approx(base.solution, rel=1e-5)
        assert {one.problem_id: one for one in bench.answers(empty)} == study.minerva_math.answers(bench.variants["base"])
    assert edited.mean() != pytest.approx(base.mean(), rel=1e-3)


@pytest.mark.parametrize("name", ["full", "stethoscope", "scalpel", "full_shrunk"])
def test_answers_and_accuracies_are_those_of_the_records_of_the_same_variant(bench, study, name):
    step, variant = study.minerva_math, bench.variants[name]
    assert {one.problem_id: one for one in bench.answers(variant)} == step.answers(variant)
    records, verdicts = step.records([name]).set_index("problem_id"), bench.verdicts(variant)
    assert len(bench.asked) == len(records) == 14 and (verdicts["extracted"] == records.loc[verdicts.index, "extracted"]).all()
    assert bench.accuracy_table(variant).equals(bench.accuracy_table(name))
    assert step.answers(variant) != step.answers(bench.variants["base"]), "an edit that answers as the base would show nothing"


def test_accuracies_have_wilsons_intervals_and_gains_are_paired(bench, monkeypatch):
    records = {
        name: bench._step.records([name]).assign(exact_match=right, math_verify=[1] * 14)
        for name, right in (("base", [0, 1] * 7), ("full", [1] * 14))
    }
    verdicts = records["base"].set_index("problem_id").assign(exact_match=[1, 1] + [0, 1] * 6)
    monkeypatch.setattr(bench._step, "records", lambda names: records[names[0]])
    monkeypatch.setattr(bench, "verdicts", lambda setting: verdicts.sample(frac=1, random_state=0))
    table = bench.accuracy_table(Setting("x", "raw", (0,))).set_index(["metric", "variant"])
    row = table.loc[("exact_match", "setting")]
    assert row["accuracy"] == pytest.approx(8 / 14) and row["gain"] == pytest.approx(1 / 14)
    assert (row["low"], row["high"]) == pytest.approx(proportion_confint(8, 14, method="wilson"))
    assert row["gain_low"] < 0 < row["gain_high"] and table.loc[("exact_match", "full"), "gain_low"] > 0
    assert table.loc[("math_verify", "setting"), "accuracy"] == 1
    bench._beside["base"] = bench._beside["base"].assign(math_verify=None)  # a task of one's own may not have it
    assert set(bench.accuracy_table(Setting("x", "raw", (0,)))["metric"]) == {"exact_match"}


def test_the_panel_follows_its_controls_and_a_second_look_is_from_memory(bench, panel, study, monkeypatch):
    assert shown(panel)["this setting"] == pytest.approx(study.losses.of(panel.setting.layers).mean(), abs=6e-5)
    panel.start.value = "full"
    assert panel.setting.layers == ALL and shown(panel)["this setting"] == shown(panel)["whole vector"]
    panel.layers[0].value = False
    assert shown(panel)["this setting"] == pytest.approx(study.losses.of((1, 2)).mean(), abs=6e-5)
    panel.alpha.value = 0.0
    assert shown(panel)["this setting"] == shown(panel)["base"] and "Not answered yet" in panel.accuracy.value
    panel.answer.click()
    assert "accuracy of 14 problems" in panel.accuracy.value and "measured in" in said(panel)
    monkeypatch.setattr(bench._step, "edited_model", None)
    panel.alpha.value = 1.0
    assert shown(panel)["this setting"] == pytest.approx(study.losses.of((1, 2)).mean(), abs=6e-5)
    panel.alpha.value = 0.0
    panel.answer.click()
    assert "known from before" in said(panel) and "accuracy of 14 problems" in panel.accuracy.value
    assert not plt.get_fignums(), "a figure left open would be shown below the cell"


def test_what_cannot_be_is_one_line(bench, panel, study, monkeypatch):
    monkeypatch.setattr(type(study.subspace_projection), "layers", property(lambda step: [0, 1]))
    panel.start.value = "full"
    panel.vector.value = "projected"
    assert said(panel).startswith("live bench: layer 2 has no SAE that is believed") and "\n" not in said(panel)
    panel.layers[2].value = False
    assert said(panel).startswith("Projected vector, layers 0, 1, scale 1.00: loss")


def test_where_measuring_takes_minutes_the_buttons_say_so_and_nothing_follows_by_itself(bench, panel):
    assert panel.measure.layout.display == "none" and re.search(r"Answer 14 problems \(about \d+ s\)", panel.answer.description)
    bench.seconds.update(losses=300.0, answers=1000.0, verdicts=200.0)
    panel._label()
    assert panel.measure.layout.display is None and "about 5 minutes" in panel.measure.description
    assert "about 20 minutes" in panel.answer.description
    panel.start.value = "full"
    assert "Not measured yet" in panel.loss.value and not bench.knows("losses", panel.setting)
    panel.measure.click()
    assert shown(panel)["this setting"] == shown(panel)["whole vector"] and panel.measure.layout.display == "none"


def test_every_control_has_a_label_and_every_picture_words(panel):
    controls = [panel.start, *panel.layers, panel.alpha, panel.vector, panel.measure, panel.answer]
    assert all(isinstance(one, widgets.ValueWidget | widgets.Button) and one.description for one in controls)
    for picture in (panel.loss.value, panel.accuracy.value):
        (words,) = re.findall(r'<img alt="([^"]+)"', picture)
        assert "this setting" in words and len(words) > 80


def test_without_a_reader_it_is_one_figure_of_the_default_setting_from_the_record(bench, study, monkeypatch):
    monkeypatch.setattr(bench_panel, "display", None)
    monkeypatch.setattr(type(study.world), "base", property(lambda world: pytest.fail("a model was loaded")))
    assert bench_panel.show(bench) is None
    (number,) = plt.get_fignums()
    words = plots.described(plt.figure(number))
    change = study.losses.of(bench.variants["stethoscope"].layers).mean() - study.losses.of(()).mean()
    assert f"The stethoscope: {change:+.4f}" in words and "accuracy of 14 problems" in words and "Ours, smoke test" in words
    assert f"Ours, {study.world.whose}" in words
    plt.close("all")


@pytest.mark.parametrize("asks", [True, False, None])
def test_a_reader_is_a_front_end_that_can_be_asked(asks, monkeypatch):
    content = {} if asks is None else dict(allow_stdin=asks)
    kernel = SimpleNamespace(get_parent=lambda channel: dict(content=content))
    monkeypatch.setattr(bench_panel, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    assert bench_panel.touched_by_a_reader() is bool(asks)
    monkeypatch.setattr(bench_panel, "get_ipython", lambda: None)
    assert not bench_panel.touched_by_a_reader()
