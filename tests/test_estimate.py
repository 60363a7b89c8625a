"""The forecast's arithmetic, by hand; it promises no more than a factor of a few."""

from dataclasses import replace

import pytest

from stetholib import estimate, profiles, rehearse
from stetholib.estimate import Machine, Size

SIZE = Size(parameters=10**9, bytes_each=2, layers=10, width=1000, d_sae=16_000)
MACHINE = Machine(flops=1e13, bandwidth=1e11, cpu_flops=1e11)
PAPER = profiles.load("paper")


def test_a_speed_is_measured_and_positive():
    found = Machine.measured("cpu", "float32", size=128)
    assert 1e7 < found.flops < 1e16 and 1e7 < found.bandwidth < 1e14


def test_answering_by_hand():
    seconds = estimate.seconds(PAPER, SIZE, MACHINE)["05_minerva_math"]
    prompt = 90 + 4 * estimate.SHOT_TOKENS
    one = 5000 * (prompt + 256) * 2e-4 + 157 * 256 * (0.02 + 10 * estimate.STEP)
    assert seconds == pytest.approx(estimate.FIXED + 13 * (one + 8 * 0.02))


def test_more_work_takes_longer_and_a_given_fine_tune_takes_no_training():
    base = estimate.seconds(PAPER, SIZE, MACHINE)
    for section, changes, step in (
        ("selection", dict(random_sets=400), "04_layer_selection"),
        ("evaluation", dict(max_new_tokens=512), "05_minerva_math"),
        ("finetune", dict(epochs=2.0), "01_task_vectors"),
        ("data", dict(general_documents=640), "02_sae_features"),
    ):
        more = replace(PAPER, **{section: replace(getattr(PAPER, section), **changes)})
        found = estimate.seconds(more, SIZE, MACHINE)
        assert {name for name in found if found[name] > base[name]} == {step}
    given = replace(PAPER, finetune=replace(PAPER.finetune, finetuned="mine/finetuned"))
    assert estimate.seconds(given, SIZE, MACHINE)["01_task_vectors"] < 20


def test_a_forecast_scales_what_was_measured_and_sums_it_up():
    run = dict(seconds={"01_task_vectors": 20.0, "06_significance": 12.0}, peak_gib={"01_task_vectors": 3.2})
    size = replace(SIZE, text_tokens=90.0)
    lines = rehearse.forecast((PAPER, SIZE), (PAPER, size), run, MACHINE)
    assert lines[0].startswith("01_task_vectors: 20 s, peak 3.2 GiB; the full run about") and len(lines) == 3
    longer = estimate.seconds(PAPER, SIZE, MACHINE)["01_task_vectors"] / estimate.seconds(PAPER, size, MACHINE)["01_task_vectors"]
    hours = float(lines[0].split("about ")[1].split()[0])
    assert hours == pytest.approx(20 * longer / 3600, abs=0.05) and "a forecast" in lines[2]
