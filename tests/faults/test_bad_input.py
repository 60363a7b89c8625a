"""Bad input, case by case: each is refused in one line that says what, where and how to mend it, and nothing is lost.

Cases of the command line run as a process; cases of models, SAEs and texts run the wiring itself, on a small world of
one's own, up to the step that must refuse them. Slow.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import runs
import torch
import toys
import yaml
from conftest import ROOT
from safetensors.torch import load_file, save_file

from stetholib.errors import UserError
from stetholib.study import Study

pytestmark = pytest.mark.slow
QUANTITY = 40


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return toys.world(tmp_path_factory.mktemp("sound"))


def weights(name, act):
    """Change the tensors of one checkpoint."""

    def change(mine, values):
        path = mine / name / "model.safetensors"
        tensors = load_file(path)
        act(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"format": "pt"})

    return change


def sae(layers, act):
    def change(mine, values):
        for layer in layers:
            path = mine / "saes" / f"block_{layer}" / "sae_weights.safetensors"
            tensors = load_file(path)
            act(tensors)
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)

    return change


def key(dotted, value):
    def change(mine, values):
        section, name = dotted.split(".")
        values.setdefault(section, {})[name] = value

    return change


def both(one, other):
    return lambda mine, values: (one(mine, values), other(mine, values))


def files(act):
    return lambda mine, values: act(mine)


def config(name, **changes):
    def change(mine, values):
        path = mine / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def to_pickle(path):
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def shifted(mine):
    folders = [mine / "saes" / f"block_{layer}" for layer in range(4)]
    shutil.rmtree(folders[0])
    for to, start in pairwise(folders):
        start.rename(to)
    shutil.copytree(folders[2], folders[3])


def other_width(mine, values):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=1024, **shape)).save_pretrained(mine / "finetuned")


def parquet(relative, change):
    def act(mine, values):
        path = mine / relative
        change(pd.read_parquet(path)).to_parquet(path)

    return act


GATE = "model.layers.1.mlp.gate_proj.weight"
TRAIN = "problems/sums/train-0.parquet"
GENERAL = "general/data/validation-0.parquet"
# name -> (what is wrong, the step that must refuse it, what its line says)
CASES = {
    "base in float16": (weights("base", lambda t: t.update({k: v.half() for k, v in t.items()})), "01", "float16, which overflows"),
    "base with a renamed key": (weights("base", lambda t: t.update({"model.layers.1.mlp.g.weight": t.pop(GATE)})), "01", "gate_proj of layer 1 is missing"),
    "base with a renamed norm": (weights("base", lambda t: t.update({"model.n.weight": t.pop("model.norm.weight")})), "01", "model.n(orm)?.weight is (missing|in only one)"),
    "base with a leftover key": (weights("base", lambda t: t.update({"extra.weight": torch.ones(2)})), "01", "extra.weight is"),
    "base with a transposed matrix": (weights("base", lambda t: t.update({GATE: t[GATE].T})), "01", "gate_proj.weight (is|has)"),
    "base with NaN": (weights("base", lambda t: t[GATE].fill_(float("nan"))), "01", "NaN or Inf"),
    "base with Inf in its activations": (weights("base", lambda t: t["model.embed_tokens.weight"].fill_(3e38)), "02", "NaN or Inf"),
    "base whose shard is missing": (files(lambda m: (m / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}))), "01", "00002.safetensors is missing"),
    "base cut short": (files(lambda m: cut(m / "base" / "model.safetensors")), "01", "not a whole safetensors file"),
    "base as a pickle": (files(lambda m: to_pickle(m / "base" / "model.safetensors")), "01", "read from safetensors only"),
    "base without config.json": (files(lambda m: (m / "base" / "config.json").unlink()), "01", "no config.json"),
    "base without a tokenizer": (files(lambda m: [p.unlink() for p in (m / "base").glob("tokenizer*")]), "02", "tokenizer cannot be read"),
    "base that is no folder and no id": (key("model.base", "mine/bose"), "01", "not whole in the cache|not on the Hub|is not a"),
    "base of an architecture that is not known": (config("base", model_type="olmo2"), "01", "'olmo2'. is not known here"),
    "base with quantised weights": (config("base", quantization_config={"quant_method": "fp8"}), "01", "quantization_config .fp8"),
    "a fine-tune of an architecture that is not known": (config("finetuned", model_type="cohere"), "01", "'cohere'. is not known here"),
    "a fine-tune in FP8": (weights("finetuned", lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})), "01", "stored as F8_E4M3"),
    "a fine-tune that is an adapter": (files(lambda m: (m / "finetuned" / "adapter_config.json").write_text("{}")), "01", "merge_and_unload"),
    "a fine-tune of another width": (other_width, "01", "both must be of one model"),
    "a fine-tune of another dtype": (weights("finetuned", lambda t: t.update({k: v.bfloat16() for k, v in t.items()})), "01", "F32 in the base and .* BF16"),
    "a fine-tune with a renamed key": (weights("finetuned", lambda t: t.update({"model.layers.1.mlp.g.weight": t.pop(GATE)})), "01", "gate_proj of layer 1 is missing"),
    "a fine-tune with a leftover key": (weights("finetuned", lambda t: t.update({"extra.weight": torch.ones(2)})), "01", "extra.weight is in only one"),
    "a fine-tune with NaN": (weights("finetuned", lambda t: t[GATE].fill_(float("nan"))), "01", "NaN or Inf"),
    "a fine-tune that changed nothing": (files(lambda m: shutil.copy(m / "base" / "model.safetensors", m / "finetuned")), "01", "the two models are the same"),
    "a fine-tune with a token more": (weights("finetuned", lambda t: t.update({k: torch.cat([v, v[:1]]) for k, v in t.items() if "embed" in k or "lm_head" in k})), "01", "both must be of one model"),
    "SAEs that never fire, in half of the layers": (sae([1, 2], lambda t: t["threshold"].fill_(1e9)), "02", "SAEs of 2 of 4 layers cannot be believed; layer 1: no feature fires"),
    "an sae_id with another brace": (key("sae.sae_id", "block_{layer}_{width}"), "02", "must hold {layer}"),
    "gradients that are Inf": (weights("base", lambda t: t["lm_head.weight"].mul_(1e38)), "03", "gradient at layer .* NaN or Inf"),
    "general text with a row that is empty": (parquet(GENERAL, lambda t: t.assign(text=[None, *t["text"][1:]])), "02", "some rows have no 'text'"),
    "a variant that the claims need": (key("evaluation.variants", ["base", "full", "scalpel"]), "05", "full_shrunk is not there"),
    "SAEs of which one is missing": (files(lambda m: shutil.rmtree(m / "saes" / "block_2")), "02", "no block_2/cfg.json"),
    "SAEs of another width": (sae([1], lambda t: t.update(W_enc=torch.randn(48, 128), W_dec=torch.randn(128, 48), b_dec=torch.zeros(48))), "02", "size|width|shape"),
    "an SAE with NaN": (sae([1], lambda t: t["W_dec"].fill_(float("nan"))), "02", "W_dec holds NaN"),
    "SAEs shifted by one block": (files(shifted), "02", "better than its own"),
    "an SAE as a pickle": (files(lambda m: to_pickle(m / "saes" / "block_1" / "sae_weights.safetensors")), "02", "safetensors"),
    "an SAE cut short": (files(lambda m: cut(m / "saes" / "block_1" / "sae_weights.safetensors")), "02", "cannot be read"),
    "an sae_id without its layer": (key("sae.sae_id", "block"), "02", "must hold {layer}"),
    "a release that is not registered": (key("sae.release", "gemma-scope-2-1b-it-res-al"), "02", "did you mean"),
    "features that hardly ever fire": (key("features.minimum_firing", 0.99), "02", "fire often enough"),
    "a rank above what fires": (both(key("projection.rank_share", 1.0), key("features.minimum_firing", 0.12)), "03", "fire often enough|linearly dependent|above the width"),
    "an empty general corpus": (parquet(GENERAL, lambda t: t[:0]), "02", "holds no rows"),
    "a general corpus of one document": (parquet(GENERAL, lambda t: t[:1]), "02", "general documents for validation"),
    "general text without its column": (parquet(GENERAL, lambda t: t.rename(columns={"text": "txt"})), "02", "has no column 'text'"),
    "problems without solutions": (parquet(TRAIN, lambda t: t.drop(columns="solution")), "02", "has no column 'solution'"),
    "fewer problems than wanted": (parquet(TRAIN, lambda t: t[:2]), "02", "2 validation problems of sums"),
    "a subject without a folder": (key("data.test_problems", {"sums": 8, "limits": 8}), "02", "has no limits/train"),
    "a table cut short": (files(lambda m: cut(m / TRAIN)), "02", "not a whole parquet file"),
    "solutions without a boxed answer": (key("finetune.target", "minerva"), "02", "are wanted; lower data|no .boxed answer"),
    "texts longer than the context": (key("data.max_tokens", 10**6), "02", "context is 2048; lower data.max_tokens"),
    "answers longer than the context": (key("evaluation.max_new_tokens", 5000), "05", "exceed the model's context"),
    "subjects that Minerva Math does not have": (key("evaluation.task", "minerva_math"), "01", "has no subject 'products'"),
    "a variant that does not exist": (key("evaluation.variants", ["base", "ful"]), "05", "unknown variant 'ful'"),
    "a task file that is not there": (key("evaluation.task", "mine/tusk.yaml"), "05", "there is no file"),
    "a task without exact_match": (files(lambda m: (m / "task.yaml").write_text(toys.TASK.replace("metric: exact_match", "metric: acc"))), "05", "the metric exact_match"),
    "a tokenizer that adds BOS twice": (files(lambda m: toys.opening(m / "base", "<bos>", "<bos>")), "02", "<bos> exactly once, found 2"),
}  # fmt: skip
STEPS = {
    "01": [lambda study: study.world.base, lambda study: study.task_vectors.table()],
    "02": [lambda study: study.task_vectors.table(), lambda study: study.sae_features.table()],
    "03": [lambda study: study.subspace_projection.table()],
    "05": [lambda study: study.layer_selection.table(), lambda study: study.minerva_math.table()],
}


@pytest.mark.parametrize("name", CASES)
def test_bad_models_saes_texts_and_tasks_are_refused_in_one_line(sound, tmp_path, monkeypatch, name):
    change, step, said = CASES[name]
    shutil.copytree(sound / "mine", tmp_path / "mine")
    values = toys.profile()
    change(tmp_path / "mine", values)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as refused:
        study = Study.open("mine.yaml", root=tmp_path)
        for ask in STEPS[step]:
            ask(study)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    assert not list((tmp_path / "figures").rglob(f"{step}_*.csv")), "a result was written"


def values_of(**changes):
    values = yaml.safe_load((ROOT / "stetholib" / "profiles" / "smoke.yaml").read_text())
    for dotted, value in changes.items():
        section, _, name = dotted.partition("__")
        (values[section] if name else values)[name or section] = value
    return yaml.safe_dump(values)


def notebook(change):
    def act(folder):
        path = folder / "notebooks" / "03_subspace_projection.ipynb"
        content = json.loads(path.read_text())
        change(content["cells"])
        path.write_text(json.dumps(content))

    return act


def profile_text(text):
    return lambda folder: (folder / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())


def swap(cells):
    cells[4], cells[6] = cells[6], cells[4]


def parameters(cells):
    return next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))


MINE = ["reproduce", "--profile", "mine.yaml"]
SMOKE = ["reproduce", "--profile", "smoke"]
# name -> (arguments, what is wrong in the clone, what its line says)
COMMANDS = {
    "an unknown profile": (["reproduce", "--profile", "mimi"], None, "did you mean 'mini'"),
    "a profile file that is not there": (["reproduce", "--profile", "no.yaml"], None, "unknown profile"),
    "a misspelt key": (MINE, profile_text(values_of(sed=1)), "unknown key 'sed' .did you mean 'seed'"),
    "a misspelt key of a section": (MINE, profile_text(values_of(selection__grredy=True)), "did you mean 'greedy'"),
    "a missing key": (MINE, profile_text(values_of().replace("\nthreads: 2\n", "\n", 1)), "missing key"),
    "a value out of range": (MINE, profile_text(values_of(selection__score_share=1.5)), "between 0 and 1"),
    "a value of another type": (MINE, profile_text(values_of(threads="two")), "expected int"),
    "a value that is no choice": (MINE, profile_text(values_of(features__specificity="cohens_d")), "did you mean 'cohen_d'"),
    "a profile that is no YAML": (MINE, profile_text("a: [1, 2"), "not a readable YAML"),
    "a profile in another encoding": (MINE, profile_text("name: é".encode("latin-1")), "not a readable YAML"),
    "a profile that extends nothing": (MINE, profile_text("extends: minni\n"), "does not ship with the package"),
    "a profile without a name of its own": (MINE, profile_text("extends: mini\ntitle: t\n"), "missing key 'name'"),
    "a subject that is not generated": (MINE, profile_text(values_of(data__test_problems={"alchemy": 3})), "has no subject 'alchemy'"),
    "a GPU that is not there": ([*SMOKE, "--device", "cuda"], None, "no CUDA GPU"),
    "an unknown device": ([*SMOKE, "--device", "tpu"], None, "invalid choice: 'tpu'"),
    "no processes": ([*SMOKE, "--processes", "0"], None, "1 or more"),
    "no worlds": (["seeds", "--count", "0"], None, "1 or more"),
    "worlds in no process": (["seeds", "--processes", "0"], None, "PROCESSES is 0"),
    "worlds at once on a GPU": (["seeds", "--processes", "2", "--device", "cuda"], None, "PROCESSES is 2"),
    "a rehearsal above true size": (["rehearse", "--profile", "paper", "--scale", "2"], None, "at most 1"),
    "a rehearsal of what fetches nothing": (["rehearse", "--profile", "mini"], None, "fetches nothing"),
    "a notebook that is missing": (SMOKE, lambda f: (f / "notebooks" / "04_layer_selection.ipynb").unlink(), "missing or not a notebook"),
    "a notebook that is not one": (SMOKE, lambda f: (f / "notebooks" / "04_layer_selection.ipynb").write_text("{}"), "missing or not a notebook"),
    "a notebook without parameters": (SMOKE, notebook(lambda cells: parameters(cells)["metadata"].clear()), "no cell tagged `parameters`"),
    "a notebook with an unknown parameter": (SMOKE, notebook(lambda cells: parameters(cells)["source"].append("\nprofil = 1")), "mend 'profil'"),
    "a notebook out of order": (SMOKE, notebook(swap), "out of order"),
    "a notebook with overrides": (SMOKE, notebook(lambda cells: parameters(cells).update(source=[line.replace("overrides = {}", "overrides = {'seed': 1}") for line in parameters(cells)["source"]])), "has overrides"),
    "too little memory": (MINE, profile_text(values_of(features__memory_gib=10.0**6, data__general_documents=10**9)), "memory: .*take a larger machine"),
    "a place that cannot be written": (SMOKE, lambda f: (f / "runs").write_text("a file"), "runs"),
}  # fmt: skip


def command(folder, arguments):
    """What a command says to the end, with its exit status."""
    process = runs.launch(folder, arguments, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    return process.communicate()[1], process.returncode


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_commands_profiles_and_notebooks_are_refused_in_one_line(tmp_path, name):
    arguments, change, said = COMMANDS[name]
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    if change:
        change(tmp_path)
    told, status = command(tmp_path, arguments)
    assert status == 2 and "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("stetholib: ")]
    assert re.search(said, line), line
    assert not list(tmp_path.glob("figures/*/*.csv"))


def test_an_error_within_a_notebook_reaches_the_command_line_as_one_line(sound, tmp_path):
    shutil.copytree(sound / "mine", tmp_path / "mine")
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    CASES["SAEs shifted by one block"][0](tmp_path / "mine", {})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(toys.profile()))
    said, status = command(tmp_path, MINE)
    assert status == 2 and "Traceback" not in said
    assert [line for line in said.splitlines() if "better than its own" in line and line.startswith("stetholib: 02_")]
    assert (tmp_path / "figures" / "mine" / "01_task_vectors.csv").is_file()  # what was finished is kept


def test_a_foreign_locale_an_odd_path_other_threads_and_a_home_that_cannot_be_written_change_nothing(undisturbed, tmp_path):
    folder = runs.clone(tmp_path / "mit Lücke é")
    runs.run(folder, HOME="/proc/nowhere", OMP_NUM_THREADS="1", **german(tmp_path))
    assert runs.made(folder) == runs.made(undisturbed) and len(runs.made(folder)) > 20
    assert json.loads(runs.made(folder)["manifest.json"])["threads"] == 2  # the profile's, whatever the environment says


def german(folder):
    """A locale with decimal commas, built where the machine can; its name alone where it cannot."""
    named = dict(LC_ALL="de_DE.UTF-8", LANG="de_DE.UTF-8")
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/locales/de_DE").is_file():
        return named
    subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", str(folder / "de_DE.UTF-8")], check=True, capture_output=True)
    named |= dict(LOCPATH=str(folder))
    point = "import locale; locale.setlocale(locale.LC_ALL, ''); print(locale.localeconv()['decimal_point'])"
    asked = [sys.executable, "-c", point]
    assert subprocess.run(asked, env=os.environ | named, capture_output=True, text=True).stdout.strip() == ","
    return named


def test_another_number_of_threads_is_another_profile_and_the_manifest_says_so(undisturbed, tmp_path):
    folder = runs.clone(tmp_path)
    (folder / "stetholib" / "profiles" / "smoke.yaml").write_text(values_of(threads=1))
    runs.run(folder)
    one, two = (json.loads(runs.made(where)["manifest.json"]) for where in (folder, undisturbed))
    assert (one.pop("threads"), two.pop("threads")) == (1, 2) and one.pop("profile_hash") != two.pop("profile_hash")
    assert one == two


def test_two_runs_in_one_clone_do_not_meet(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    first = runs.launch(tmp_path, SMOKE, PYTHONPATH=str(ROOT))
    try:
        assert "running" in first.stderr.readline()
        said, status = command(tmp_path, SMOKE)
        assert status == 2 and "another run of profile smoke is under way" in said
    finally:
        runs.kill(first)


def test_the_list_is_as_long_as_promised(covered):
    assert len(CASES) + len(COMMANDS) >= QUANTITY
    covered(
        f"bad input: {len(CASES)} cases of models, SAEs, texts and tasks, {len(COMMANDS)} of commands, profiles and notebooks"
    )
