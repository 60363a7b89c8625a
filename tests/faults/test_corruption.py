"""Flipped bytes, full disks and kills: nothing that was finished is lost, nothing altered is taken for good. Slow."""

import os
import random
import re
import resource
import shutil
import signal
import time
from itertools import pairwise

import pytest
import runs

from stetholib.study import Study

pytestmark = pytest.mark.slow
FLIPS = 200


def tables(study):
    """The contract's tables."""
    return {
        "01_task_vectors": study.task_vectors.table(),
        "02_sae_features": study.sae_features.table(),
        "03_subspace_projection": study.subspace_projection.table(),
        "04_layer_selection": study.layer_selection.table(),
        "04_layer_sets": study.layer_selection.sets(),
        "05_minerva_math": study.minerva_math.table(),
        "06_significance": study.significance.table(),
        "06_published": study.significance.published(),
        "06_claims": study.significance.claims(),
    }


def everything(folder):
    """All tables of a study, from the store where it holds, each written."""
    one = Study.open("smoke", root=folder)
    for stem, table in tables(one).items():
        one.keep(stem, table)
    one.subspace_projection.energy_or_direction(), one.minerva_math.checks(), one.minerva_math.noise()
    return {path.name: path.read_bytes() for path in sorted((folder / "figures" / "smoke").glob("*.csv"))}


def test_two_hundred_flipped_bytes_are_each_noticed_or_harmless(undisturbed, tmp_path, caplog, covered):
    """Eight rounds of 25 flips over artefacts, ledgers, records, marks and executed notebooks; after each round all tables
    are the same, and after the last `make reproduce` brings back every file, records too.
    """
    folder = tmp_path / "flipped"
    shutil.copytree(undisturbed, folder)
    wanted, made, records = everything(folder), runs.made(folder), runs.records(folder)
    chance, noticed = random.Random(0), 0
    for number in range(8):
        places = sorted(
            p for p in (folder / "runs" / "smoke").rglob("*") if p.is_file() and p.stat().st_size and p.suffix != ".lock"
        )
        places = [p for p in places if "damaged-" not in str(p) and "tasks" not in p.parts[-4:-1]]
        for path in chance.sample(places, FLIPS // 8):
            content = bytearray(path.read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
        caplog.clear()
        if number == 7:
            runs.run(folder)
            assert runs.made(folder) == made and runs.records(folder) == records
        assert everything(folder) == wanted
        noticed += sum("damaged" in message for message in caplog.messages)
    assert noticed > FLIPS // 4
    covered(f"byte flips: {FLIPS}, of which {noticed} were noticed and made anew; all tables the same after each round")


@pytest.mark.parametrize("place", ["artefact.json", "tensors.safetensors", "tables", "ledger"])
def test_each_kind_of_damage_is_named_and_set_aside(undisturbed, tmp_path, caplog, place):
    folder = tmp_path / "damaged"
    shutil.copytree(undisturbed, folder)
    store, wanted = folder / "runs" / "smoke" / "store", runs.made(folder)
    found = {"tables": "measure-*/value.parquet", "ledger": "losses-*.jsonl"}.get(place, f"score_layers-*/{place}")
    spoiled = sorted(store.glob(found))[: None if place == "tables" else 1]  # the tables below read most of the measures, not all
    for path in spoiled:
        path.write_bytes(path.read_bytes()[:-7])
    everything(folder)
    assert "damaged" in caplog.text and runs.made(folder) == wanted
    set_aside = [p.name for p in store.glob("damaged-*")]
    assert place == "ledger" or any(name.startswith(f"damaged-{p.parent.name}") for name in set_aside for p in spoiled)


def test_a_table_that_was_altered_is_written_anew(undisturbed, tmp_path):
    folder = tmp_path / "altered"
    shutil.copytree(undisturbed, folder)
    wanted, table = runs.made(folder), folder / "figures" / "smoke" / "04_layer_sets.csv"
    table.write_text(table.read_text().replace("random", "rundom"))
    (folder / "figures" / "smoke" / "05_minerva_math.png").unlink()
    (folder / "runs" / "smoke" / "run.json").write_text("{ not json")
    (folder / "figures" / "smoke" / ".4711.left_by_a_kill.csv").write_text("half")
    said = runs.run(folder)
    assert said.count("unchanged") == 4 and runs.made(folder) == wanted
    records = runs.records(folder)
    (folder / "runs" / "smoke" / "records" / "full.jsonl").write_text("cut")
    assert runs.run(folder).count("unchanged") == 5 and runs.records(folder) == records


@pytest.mark.parametrize(("step", "limit"), [("01", 120_000), ("02", 400_000), ("05", 400_000)])
def test_a_full_disk_is_told_in_a_line_leaves_no_part_of_a_file_and_is_gone_on_from(undisturbed, tmp_path, step, limit):
    """RLIMIT_FSIZE stands for the disk: no file of the run may grow above it."""
    folder = tmp_path / "full"
    if step == "01":
        runs.clone(folder)
    else:  # what came before is there, this step's is not
        shutil.copytree(undisturbed, folder)
        for path in (folder / "runs" / "smoke" / "store").iterdir():
            names = {"02": ("trained_sae", "dictionary_of", "hear"), "05": ("records", "text_loss")}[step]
            if path.name.startswith(names):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for mark in (folder / "runs" / "smoke" / "notebooks").glob("*.json"):
            if mark.name >= step:
                mark.unlink()
        for ledger in (folder / "runs" / "smoke" / "store").glob("answers-*.jsonl") if step == "05" else ():
            ledger.write_bytes(b"x" * (limit - 2) + b"\n")  # a line that is no answer, up to where the disk is full
    before = set(runs.stages(folder))
    process = limited(folder, limit)
    said = process.communicate()[1]
    lines = [line for line in said.splitlines() if line.startswith("stetholib: ")]
    assert process.returncode == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert "File too large" in lines[0] and "free some space" in lines[0] and lines[0].startswith(f"stetholib: {step}_"), lines
    store = folder / "runs" / "smoke" / "store"
    assert not [path for path in store.iterdir() if path.name.startswith(".")], "a draft was left behind"
    if step == "05":
        assert {path.stat().st_size for path in store.glob("answers-*.jsonl")} == {limit - 1}, (
            "a part of an answer was left behind"
        )
    assert before <= set(runs.stages(folder))
    kept = runs.stages(folder)
    runs.run(folder)
    assert runs.made(folder) == runs.made(undisturbed)
    assert all(runs.stages(folder)[name] == at for name, at in kept.items())


def limited(folder, limit):
    """A run none of whose files may grow above a limit."""

    def lower():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return runs.launch(folder, ["reproduce", "--profile", "smoke"], lower, PYTHONDONTWRITEBYTECODE="1")


def test_interrupted_by_hand_it_says_so_and_goes_on(tmp_path):
    folder = runs.clone(tmp_path)
    process = runs.start(folder, "smoke")
    runs.wait_for(lambda: len(runs.stages(folder)) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "what was finished is kept" in said and "Traceback" not in said
    kept = runs.stages(folder)
    runs.run(folder)
    assert all(runs.stages(folder)[name] == at for name, at in kept.items())


def campaign(folder, undisturbed, profile, moments):
    """Kill a cold run at each of the moments, run it once more, and hold the end against an undisturbed one."""
    ends = []
    for number, seconds in enumerate(moments):
        one = runs.clone(folder / str(number))
        was_killed = runs.killed_after(one, profile, seconds)
        stages, asked = runs.stages(one, profile), runs.answers(one, profile)
        started = time.monotonic()
        runs.run(one, profile)
        again, answered = runs.stages(one, profile), runs.answers(one, profile)
        assert runs.made(one, profile) == runs.made(undisturbed, profile), f"killed after {seconds:.1f} s"
        assert all(again[name] == at for name, at in stages.items()), "a finished stage was made twice"
        assert all(answered[name][: len(ids)] == ids for name, ids in asked.items()), "an answer was lost"
        assert all(len(ids) == len(set(ids)) for ids in answered.values()), "a problem was answered twice"
        how = f"killed after {seconds:.1f} s" if was_killed else f"had ended before {seconds:.1f} s"
        ends.append(
            f"{profile} {how} with {len(stages)} stages finished, then {time.monotonic() - started:.0f} s to the same end"
        )
        print(ends[-1], flush=True)
        shutil.rmtree(one)
    return ends


def test_killed_at_a_random_moment_it_ends_as_if_it_had_not_been(undisturbed, tmp_path, covered):
    for end in campaign(tmp_path, undisturbed, "smoke", [random.Random(1).uniform(15, 60)]):
        covered(end)


@pytest.mark.campaign
def test_three_worlds_of_the_miniature_in_flat_memory(tmp_path):
    process = runs.launch(runs.clone(tmp_path), ["seeds", "--count", "3"])
    peaks, said = runs.memory_by_world(process)
    print({name: f"{peak:.2f} GiB" for name, peak in peaks.items()}, flush=True)
    assert process.wait() == 0, said
    assert len(peaks) == 3 and max(peaks.values()) < 6 and max(peaks.values()) < 1.1 * peaks["world 0"]


@pytest.mark.campaign  # and so neither in `make test` nor in `make test-all`
@pytest.mark.parametrize(("profile", "kills"), [("smoke", 20), ("mini", 5)])
def test_the_campaign_of_kills(tmp_path, profile, kills):
    whole, started = runs.clone(tmp_path / "whole"), time.monotonic()
    runs.run(whole, profile)
    took, chance = time.monotonic() - started, random.Random(f"{profile} kills")
    print(f"\n{profile} undisturbed: {took:.0f} s", flush=True)
    ends = campaign(tmp_path, whole, profile, [chance.uniform(0.03, 0.85) * took for _ in range(kills)])
    assert sum("killed" in end for end in ends) == kills


@pytest.mark.campaign
@pytest.mark.parametrize("profile", ["smoke", "mini"])
def test_kills_in_each_of_the_last_three_steps_and_two_runs_at_once(tmp_path, profile):
    """One world is killed in steps 04, 05 and 06 in turn, each at a moment drawn by seed; then two clones run side by side, and a
    third run in one of their folders is refused."""
    whole, chance = runs.clone(tmp_path / "whole"), random.Random(f"{profile} last steps")
    took = {step: float(seconds) for step, seconds in re.findall(r"^(\w+): (\d+) s, ", runs.run(whole, profile), re.M)}
    steps, one = sorted(took), runs.clone(tmp_path / "killed")
    for before, step in pairwise(steps[2:]):
        process, mark = runs.start(one, profile), one / "runs" / profile / "notebooks" / f"{before}.json"
        runs.wait_for(mark.is_file, process)
        time.sleep(chance.uniform(0.05, 0.8) * took[step])
        runs.kill(process)
        print(f"{profile} killed in {step}, with {len(runs.stages(one, profile))} stages finished", flush=True)
        assert not mark.with_name(f"{step}.json").exists()
    runs.run(one, profile)
    pair = [runs.start(runs.clone(tmp_path / name), profile) for name in ("left", "right")]
    runs.wait_for((tmp_path / "left" / "runs" / profile / "reproduce.lock").is_file, pair[0])
    third = runs.start(tmp_path / "left", profile)
    assert f"another run of profile {profile} is under way" in third.communicate()[1] and third.returncode == 2
    assert [process.communicate()[0] or process.returncode for process in pair] == [0, 0]
    for name in ("killed", "left", "right"):
        assert runs.made(tmp_path / name, profile) == runs.made(whole, profile), name
        assert runs.records(tmp_path / name, profile) == runs.records(whole, profile), name
