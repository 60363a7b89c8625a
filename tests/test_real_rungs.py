"""The profiles of the real rungs, run by their real code on fabricated repositories from a Hub on loopback. Slow."""

import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from hub import Hub
from rungs import SCALE, SMALL, environment, repositories, reproduce, small_profile
from safetensors.torch import load_file, save_file

from stetholib import profiles
from stetholib.commands import fabricate
from stetholib.commands.notebooks import STEPS
from stetholib.store.tables import CONTRACTS

pytestmark = pytest.mark.slow


def tables(home, name):
    return {path.name: path.read_bytes() for path in sorted((home / "figures" / name).glob("*.csv"))}


@pytest.mark.parametrize("name", ["gemma-3-270m", pytest.param("gemma-3-1b", marks=pytest.mark.campaign), "paper"])
def test_a_rung_runs_from_a_cold_cache_and_again_with_the_hub_gone(name, tmp_path):
    """The rungs share their code: the paper's, of 34 blocks, runs once."""
    profile = small_profile(name, tmp_path)
    with Hub(repositories(profile, tmp_path / "made")) as hub:
        url = hub.url
        done = reproduce(tmp_path / "cold", profile, environment(tmp_path / "cold", url, tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert any(file.endswith("params.safetensors") for _, file, _ in hub.served)
    cold = tables(tmp_path / "cold", name)
    assert set(cold) == {f"{stem}.csv" for stem in CONTRACTS}
    if name != "paper":
        again = reproduce(tmp_path / "offline", profile, environment(tmp_path / "offline", url, tmp_path / "cache", token=None))
        assert again.returncode == 0, again.stderr
        assert cold == tables(tmp_path / "offline", name)
    claims = pd.read_csv(tmp_path / "cold" / "figures" / name / "06_claims.csv")
    assert ("reproduced" in set(claims["verdict"])) == (name == "paper")
    said = json.loads((tmp_path / "cold" / "figures" / name / "manifest.json").read_text())
    assert said["model"]["revision"] and said["data"]["maths_revision"] and said["finetune"]["lora_rank"] == 4
    assert said["threads"] == 2 and said["sae"]["release"].endswith("-it-res-all")
    assert re.fullmatch("[0-9a-f]{40}", said["sae"]["commit"]) and said["sae"]["revision"] in (None, said["sae"]["commit"])
    assert (
        json.loads(next((tmp_path / "cold").glob("runs/*/store/sae-commits.json")).read_text()).popitem()[1]
        == said["sae"]["commit"]
    )


def test_a_rung_with_its_chat_template_answers_and_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("STETHOLIB_HOME", str(tmp_path))
    from stetholib.minerva_math import Variant
    from stetholib.study import Study

    profile = small_profile(
        "gemma-3-270m", tmp_path, evaluation=SMALL["evaluation"] | dict(chat_template=True, variants=["base"])
    )
    for name, place in fabricate.everything(profiles.load(str(profile)), tmp_path / "made", SCALE).items():
        profile.write_text(profile.read_text().replace(f" {name}\n", f" {place}\n"))
    study = Study.open(str(profile), root=tmp_path)
    step = study.minerva_math
    assert all(text.startswith("<start_of_turn>user\nProblem:") for text in step._asked.prompts.values())
    records = step._records(Variant("base"))
    assert len(records) == 14 and records["prompt_tokens"].min() > 100 and set(records["stopped_by"]) <= {"length", "eos", "stop"}


WRONG = r"SAEs of 3 of 6 layers cannot be believed; layer 2: .*(are declared|of the variance unexplained)"


def test_a_wrong_sae_set_is_refused_before_any_result(tmp_path):
    profile = small_profile("gemma-3-270m", tmp_path)
    served = repositories(profile, tmp_path / "made")
    saes = served["google/gemma-scope-2-270m-it"]
    part = "resid_post_all/layer_{}_width_16k_l0_small/params.safetensors"
    with Hub(served) as hub:
        files = dict(saes.files)
        for layer in range(5):
            saes.files[part.format(layer)] = files[part.format(layer + 1)]  # the set shifted by one block
        home = tmp_path / "shifted"
        done = reproduce(home, profile, environment(home, hub.url, tmp_path / "cache"))
        assert done.returncode == 2 and "better than its own" in done.stderr and "Traceback" not in done.stderr
        assert not list((home / "figures").rglob("02_*"))
        store = tmp_path / "shifted" / "runs" / "gemma-3-270m" / "store"
        saes.files.update(files)
        made = tmp_path / "made" / "google" / "gemma-scope-2-270m-it"
        for layer in (2, 3, 4):  # blocks of another release, at the same names: many times as many features fire
            file = made / part.format(layer)
            tensors = load_file(file)
            tensors["threshold"] = tensors["threshold"] * 0
            save_file(tensors, file)
            saes.files[part.format(layer)] = file.read_bytes()
        shutil.rmtree(store)
        done = reproduce(home, profile, environment(home, hub.url, tmp_path / "cache2"))
        assert done.returncode == 2 and re.search(WRONG, done.stderr), done.stderr
        assert not list((home / "figures").rglob("02_*"))


def test_a_rehearsal_measures_each_step_on_fabricated_weights(tmp_path):
    profile = small_profile("gemma-3-270m", tmp_path)
    command = [sys.executable, "-m", "stetholib", "rehearse", "--profile", str(profile), "--scale", "0.05"]
    env = environment(tmp_path / "home", "http://127.0.0.1:9", tmp_path / "cache", token=None)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if ", peak " in line]
    assert [line.split(":")[0] for line in lines] == list(STEPS)
    assert all(re.search(r"\d s, peak \d+\.\d GiB$", line) for line in lines)
    home = tmp_path / "home" / "runs" / "gemma-3-270m-rehearsal"
    claims = pd.read_csv(home / "figures" / "gemma-3-270m" / "06_claims.csv")
    assert len(claims) == 13 and not (tmp_path / "home" / "figures").exists()
    assert not list(tmp_path.glob("cache/**/*.safetensors"))
