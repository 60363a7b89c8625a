"""Fetching from the Hub, against a Hub on loopback, each in a process of its own."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from hashlib import sha256

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from hub import LICENSED, Hub, Repository
from rungs import environment, fabricated, repositories, small_profile, with_small
from safetensors.torch import save

from stetholib.data.hub import files_key, missing_files
from stetholib.data.source import Source
from stetholib.errors import UserError

BODY = bytes(range(256)) * 100_000  # 25 MB: more than one chunk of the client's
FETCH = """
import sys
from stetholib.data import hub
from stetholib.errors import UserError
try:
    print((hub.snapshot(*sys.argv[1:]) / "model.safetensors").stat().st_size)
except UserError as error:
    print(error)
"""
FETCH_ONLY = "import sys; from stetholib.data import hub; hub.snapshot(*sys.argv[1:])"


@pytest.fixture()
def hub():
    files = {"config.json": b"{}", "model.safetensors": BODY, "weights.bin": b"a pickle"}
    with Hub({"google/gemma": Repository(files, gated=True), "open/model": Repository(files)}) as hub:
        yield hub


def fetch(cache, url, *arguments, token=LICENSED, script=FETCH):
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment(ROOT, url, cache, token), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_is_fetched_once_and_read_from_the_cache_without_a_network(hub, tmp_path):
    assert fetch(tmp_path, hub.url, "google/gemma") == str(len(BODY))
    served = [file for _, file, _ in hub.served]
    assert sorted(served) == ["config.json", "model.safetensors"]  # never a pickle
    fetch(tmp_path, hub.url, "google/gemma", token=None)
    fetch(tmp_path, "http://127.0.0.1:9", "google/gemma", token=None)
    assert len(hub.served) == len(served)


def test_a_broken_connection_is_resumed_and_no_byte_is_lost(hub, tmp_path):
    hub.breaks = [12_000_000, 3_000_000]
    assert fetch(tmp_path, hub.url, "open/model") == str(len(BODY))
    (found,) = tmp_path.rglob("model.safetensors")
    assert found.read_bytes() == BODY
    asked = [size for _, file, size in hub.served if file == "model.safetensors"]
    assert len(asked) == 3 and asked[-1] < len(BODY)


def test_a_download_that_never_ends_leaves_no_file_and_goes_on_later(hub, tmp_path):
    hub.breaks = [1_000] * 40
    said = fetch(tmp_path, hub.url, "open/model")
    assert "run the same command again" in said and "\n" not in said
    assert not list(tmp_path.rglob("model.safetensors"))
    hub.breaks.clear()
    assert fetch(tmp_path, hub.url, "open/model") == str(len(BODY))


SAE, TABLE = "resid_post_all/layer_0_width_16k_l0_small", "algebra/test-00000-of-00001.parquet"
FETCH_SAE = f"""
import sys
from stetholib.adapters import saes
raw = saes.gemma_scope_2(sys.argv[1], "{SAE}")[1]
print(float(raw["W_enc"].sum()), tuple(raw["W_enc"].shape))
"""
FETCH_TABLE = """
import sys
from dataclasses import replace
from stetholib import profiles
from stetholib.data import corpora
data = replace(profiles.load("gemma-3-270m").data, maths=sys.argv[1], maths_revision=None, test_problems={"algebra": 20_000})
print(len(corpora.problems(data, "test", 0)))
"""


def large_sae():
    tensors = dict(w_enc=torch.randn(64, 4096), w_dec=torch.randn(4096, 64))
    tensors |= dict(b_enc=torch.zeros(4096), b_dec=torch.zeros(64), threshold=torch.ones(4096))
    said = dict(architecture="jump_relu", model_name="m", hf_hook_point_in="model.layers.0.output")
    return {f"{SAE}/params.safetensors": save(tensors), f"{SAE}/config.json": json.dumps(said).encode()}, tensors


def test_a_broken_connection_in_an_sae_is_resumed(tmp_path):
    files, tensors = large_sae()
    with Hub({"google/scope": Repository(files)}, breaks=[1_500_000, 200_000]) as hub:
        said = fetch(tmp_path, hub.url, "google/scope", script=FETCH_SAE)
        assert said == f"{float(tensors['w_enc'].sum())} (64, 4096)"
        assert len([name for _, name, _ in hub.served if name.endswith("params.safetensors")]) == 3


OURS_AND_THEIRS = """
import sys, torch
from sae_lens import SAE
from stetholib.adapters import saes
release, sae_id = "gemma-scope-2-270m-it-res-all", "layer_0_width_16k_l0_small"
ours, theirs = saes.load_release(release, sae_id), SAE.from_pretrained(release, sae_id)
x = torch.randn(5, 64)
one = saes.dictionary(ours)
mine, own = one.encode(x), theirs.encode(x)
same = all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
fields = "d_in d_sae dtype apply_b_dec_to_input normalize_activations reshape_activations".split()
fields = all(getattr(ours.cfg, name) == getattr(theirs.cfg, name) for name in fields) and ours.cfg.architecture() == theirs.cfg.architecture()
hooks = ours.cfg.metadata.hook_name == theirs.cfg.metadata.hook_name and ours.cfg.metadata.hf_hook_name == theirs.cfg.metadata.hf_hook_name
print(same, fields, hooks, float((mine - own).abs().max()) < 1e-5, bool(mine.any()))
"""


def test_gemma_scope_2_is_read_as_saelens_own_loader_reads_it(tmp_path):
    files, _ = large_sae()
    with Hub({"google/gemma-scope-2-270m-it": Repository(files)}) as hub:
        assert fetch(tmp_path, hub.url, script=OURS_AND_THEIRS).splitlines()[-1] == "True True True True True"


FETCH_AT = """
import sys
from pathlib import Path
from stetholib.adapters import saes
from stetholib.errors import UserError
from dataclasses import replace
from stetholib import profiles
release, sae_id, home = "gemma-scope-2-270m-it-res-all", "layer_{layer}_width_16k_l0_small", Path(sys.argv[1])
commit = saes.fetched_sae(release, sae_id, 0, None, "google/gemma-3-270m-it", [], folder=home / "sae")
print(commit)
try:
    saes.check_commit(home, replace(profiles.load("mini").sae, release=release), commit)
except UserError as error:
    print(error)
"""


def test_the_commit_that_saes_are_fetched_at_is_held_to(tmp_path):
    files, _ = large_sae()
    with Hub({"google/gemma-scope-2-270m-it": Repository(files)}) as hub:
        served = hub.repositories["google/gemma-scope-2-270m-it"]
        first = served.commit
        assert fetch(tmp_path / "cache", hub.url, str(tmp_path), script=FETCH_AT).splitlines()[-1] == first
        files["README.md"] = b"another commit"
        assert fetch(tmp_path / "cache", hub.url, str(tmp_path), script=FETCH_AT).splitlines()[-1] == first
        said = fetch(tmp_path / "cache2", hub.url, str(tmp_path), script=FETCH_AT).splitlines()[-2:]
    assert said[0] == served.commit != first
    assert f"fetched at commit {first}, and now the Hub gives {served.commit}; set sae.revision" in said[1]


def test_a_broken_connection_in_a_data_set_is_resumed(tmp_path):
    rows = [
        dict(problem=f"{i} + {i}?", level="1", type="a", solution=rf"It is $\boxed{{{i}}}$" + os.urandom(40).hex())
        for i in range(20_000)
    ]
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    with Hub({"org/maths": Repository({TABLE: buffer.getvalue()})}, breaks=[700_000, 100_000]) as hub:
        assert fetch(tmp_path, hub.url, "org/maths", script=FETCH_TABLE) == "20000"
        assert len(hub.served) == 3 and len({size for *_, size in hub.served}) == 3


@pytest.mark.parametrize(
    ("repo", "revision", "token", "said"),
    [
        ("google/gemma", None, None, "no Hugging Face token; accept its licence at https://huggingface.co/google/gemma"),
        ("google/gemma", None, "hf_other", "has not accepted its licence; do so at https://huggingface.co/google/gemma"),
        ("google/gemma", "0" * 40, LICENSED, "see https://huggingface.co/google/gemma/commits/main"),
        ("google/gema", None, LICENSED, "google/gema is not on the Hub"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_page_to_visit(hub, tmp_path, repo, revision, token, said):
    found = fetch(tmp_path, hub.url, repo, *([revision] if revision else []), token=token)
    assert said in found and "\n" not in found


def test_without_a_network_and_a_cache_the_line_says_so(tmp_path):
    found = fetch(tmp_path, "http://127.0.0.1:9", "open/model")
    assert "not whole in the cache and the Hub cannot be reached" in found and "\n" not in found


def test_a_full_disk_is_seen_before_the_download_with_the_gigabytes_to_free(hub, tmp_path):
    small = FETCH.replace("import sys", "import sys, shutil\nshutil.disk_usage = lambda p: type('U', (), dict(free=10**7))", 1)
    found = fetch(tmp_path, hub.url, "open/model", script=small)
    assert "free 0.0 GiB" in found and "HF_HOME" in found and "\n" not in found
    assert not [file for _, file, _ in hub.served if file == "model.safetensors"]


def test_a_disk_that_fills_on_the_way_is_one_line_and_leaves_no_whole_name(hub, tmp_path):
    limit = FETCH.replace(
        "import sys",
        "import sys, resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))",
        1,
    )
    found = fetch(tmp_path, hub.url, "open/model", script=limit)
    assert "disk" in found and "\n" not in found, found
    assert not list(tmp_path.rglob("model.safetensors"))
    assert os.environ.get("HF_TOKEN") != LICENSED


def test_a_file_of_the_cache_that_was_altered_is_refused_by_name(hub, tmp_path):
    script = "import sys; from stetholib.data import hub\nfrom stetholib.errors import UserError\n"
    script += "try:\n    print(len(hub.files_key(hub.snapshot(sys.argv[1]), '*.safetensors')))\nexcept UserError as error:\n    print(error)"
    assert fetch(tmp_path, hub.url, "open/model", script=script) == "1"
    (file,) = tmp_path.rglob("model.safetensors")
    content = bytearray(file.read_bytes())
    content[1_000_000] ^= 4
    file.resolve().write_bytes(content)
    said = fetch(tmp_path, hub.url, "open/model", script=script)
    assert "not those that the Hub gave; delete" in said and "\n" not in said


def test_a_data_set_of_which_another_config_is_cached_is_not_taken_for_whole(tmp_path):
    body = io.BytesIO()
    pd.DataFrame(dict(text=["a"])).to_parquet(body)
    files = {f"{config}/validation-00000-of-00001.parquet": body.getvalue() for config in ("one", "other")}
    script = "import sys; from stetholib.data import hub\n"
    script += "print(len(list(hub.snapshot(sys.argv[1], None, [sys.argv[2]], 'dataset').glob(sys.argv[2]))))"
    with Hub({"org/texts": Repository(files)}) as hub:
        assert fetch(tmp_path, hub.url, "org/texts", "one/validation-*.parquet", script=script) == "1"
        for tree in tmp_path.rglob("*"):  # as an older client, which kept no list of the repository's files, would leave it
            if tree.is_file() and "snapshots" not in tree.parts and "blobs" not in tree.parts and "refs" not in tree.parts:
                tree.unlink()
        assert fetch(tmp_path, hub.url, "org/texts", "other/validation-*.parquet", script=script) == "1"
        (half,) = tmp_path.rglob("one/validation-00000-of-00001.parquet")
        shutil.copy(half, half.with_name("train-00000-of-00002.parquet"))  # a part of what nobody asks for
    assert fetch(tmp_path, "http://127.0.0.1:9", "org/texts", "one/validation-*.parquet", script=script) == "1"


def test_offline_by_choice_is_said_so(hub, tmp_path):
    script = FETCH.replace("import sys", "import os, sys\nos.environ['HF_HUB_OFFLINE'] = '1'", 1)
    found = fetch(tmp_path, hub.url, "open/model", script=script)
    assert "HF_HUB_OFFLINE is set; unset it" in found and "\n" not in found and not hub.served


def doctor(profile, url, cache, token=LICENSED):
    command = [sys.executable, "-m", "stetholib", "doctor", "--profile", str(profile)]
    done = subprocess.run(command, env=environment(cache.parent, url, cache, token), capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    lines = {line[5:].split()[0]: line for line in done.stdout.splitlines()}
    assert all(line.startswith(("ok  ", "MEND")) for line in lines.values())
    assert (done.returncode == 0) == all(line.startswith("ok") for line in lines.values())
    return lines


def test_the_doctor_says_what_is_cached_what_is_to_be_fetched_and_what_is_lacking(tmp_path):
    profile = small_profile("gemma-3-270m", tmp_path)
    served = repositories(profile, tmp_path / "made")
    with Hub(served) as hub:
        cold = doctor(profile, hub.url, tmp_path / "cache")
        assert all(line.startswith("ok") for line in cold.values()), cold
        assert all("are to be fetched" in cold[name] for name in ("model", "SAEs", "maths", "general"))
        assert not [file for _, file, _ in hub.served if file.endswith((".safetensors", ".parquet"))]
        assert "token is set" in cold["token"] and hub.url in cold["network"]
        without = doctor(profile, hub.url, tmp_path / "other", token=None)
        assert (
            "no Hugging Face token" in without["token"]
            and "accept its licence at" in without["model"]
            and "cannot be told" in without["needs"]
        )
        fetch(tmp_path / "cache", hub.url, "google/gemma-3-270m-it", served["google/gemma-3-270m-it"].revision, script=FETCH_ONLY)
        assert "in the cache" in doctor(profile, hub.url, tmp_path / "cache")["model"]
    gone = doctor(profile, "http://127.0.0.1:9", tmp_path / "other")
    assert all("the Hub cannot be reached" in gone[name] for name in ("model", "SAEs", "maths", "general", "network"))


def test_the_doctor_finds_nothing_lacking_for_the_miniature(tmp_path):
    found = doctor("mini", "http://127.0.0.1:9", tmp_path)
    assert all(line.startswith("ok") for line in found.values())
    assert all("ships with the package" in found[name] for name in ("model", "SAEs", "maths", "general"))


def test_the_doctor_finds_nothing_lacking_for_the_readmes_folder_of_weights(tmp_path):
    served = fabricated(small_profile("gemma-3-270m", tmp_path), tmp_path / "made")
    (said,) = re.findall(
        r"```yaml\n(extends: gemma-3-270m\n.*?)```", (ROOT / "stetholib" / "profiles" / "README.md").read_text(), re.S
    )
    for name, folder in {"google/gemma-3-270m-it": "weights", "EleutherAI/hendrycks_math": "problems"}.items():
        served[name].rename(tmp_path / folder)
    values = with_small(yaml.safe_load(said.replace("folder/of", str(tmp_path))))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    found = doctor(tmp_path / "mine.yaml", "http://127.0.0.1:9", tmp_path / "cache", token=None)
    assert all(line.startswith("ok") for line in found.values()), found
    assert all("in a folder of this machine" in found[name] for name in ("model", "maths"))


def test_the_doctor_counts_what_a_run_has_left_already_and_each_disk_for_itself(tmp_path, monkeypatch):
    from stetholib import profiles
    from stetholib.commands import doctor as examined

    monkeypatch.setenv("STETHOLIB_HOME", str(tmp_path))
    profile, size = profiles.load("mini"), examined.Size(10**9, 4, 26, 1152, 262144, 16384)
    whole = examined._made(profile, size)
    kept = tmp_path / "runs" / "mini" / "store" / "sae-1" / "weights"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(10**6))
    assert whole - examined._made(profile, size) == 10**6
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (one,) = examined._disks(10**18, 10**18)
    assert one.name == "disk" and not one.ok and "free 18" in one.line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/dev/shm/hub")
    here, cache = examined._disks(10**18, 0)
    assert here.ok and not cache.ok and cache.name == "cache" and "/dev/shm" in cache.line


def test_the_doctor_asks_more_memory_for_more_processes_and_knows_of_limits(monkeypatch):
    from stetholib import profiles
    from stetholib.commands import doctor as examined

    profile, size = profiles.load("paper"), examined.Size(4 * 10**9, 2, 34, 2560, 262208, 16384)
    monkeypatch.setattr(examined, "_main_memory", lambda: 40 * 2**30)
    assert examined._memory(profile, size, "cuda", 1).ok and not examined._memory(profile, size, "cuda", 4).ok
    monkeypatch.undo()
    assert 0 < examined._main_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_where_a_thing_lies_is_told_by_its_name_what_ships_first_then_a_folder_then_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mini", "org", "org/here"):
        (tmp_path / name).mkdir()
    where = lambda *asked: Source.of(*asked).where  # noqa: E731
    assert [where(name) for name in ("mini", "toy", "org/here", str(tmp_path), "org/there")] == [
        "shipped", "shipped", "folder", "folder", "hub",
    ]  # fmt: skip
    assert [where(name, None, "dataset") for name in ("generated", "mini", "org/there")] == ["shipped", "folder", "hub"]
    assert [where(name, None, "sae") for name in ("train", "org", "gemma-scope")] == ["shipped", "folder", "hub"]
    for name in ("", "/no/such/folder", "a/b/c", "../x"):
        with pytest.raises(UserError, match="there is no such folder here, and it is not a name on the Hub"):
            Source.of(name)


def test_what_ships_and_what_lies_in_a_folder_is_never_to_be_fetched(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    (tmp_path / "config.json").write_bytes(bytes(10))
    assert Source.of(str(tmp_path)).bytes_to_fetch() == (0, 110)
    assert Source.of(str(tmp_path)).bytes_to_fetch(["*.safetensors"]) == (0, 100)
    assert Source.of(str(tmp_path)).folder() == tmp_path and (Source.of("mini").folder() / "model.safetensors").is_file()
    nothing, shipped = Source.of("mini").bytes_to_fetch(["*.safetensors"])
    assert nothing == 0 and shipped == (Source.of("mini").folder() / "model.safetensors").stat().st_size
    assert Source.of("train", kind="sae").bytes_to_fetch() == Source.of("toy").bytes_to_fetch() == (0, 0)
    with pytest.raises(ValueError, match="it has no folder"):
        Source.of("toy").folder()


def test_a_folders_files_are_known_by_their_bytes_and_the_stores_own_does_not_count(tmp_path):
    for name in ("b.safetensors", "a.json", "artefact.json", "else.bin"):
        (tmp_path / name).write_bytes(name.encode())
    found = files_key(tmp_path, "*.json", "*.safetensors", "*.json")
    assert found == [f"{name} {sha256(name.encode()).hexdigest()}" for name in ("a.json", "b.safetensors")]


def test_a_repository_folder_without_a_large_file_is_not_whole(tmp_path):
    for layer, name in ((0, "params.safetensors"), (0, "config.json"), (1, "config.json")):
        (tmp_path / f"layer_{layer}").mkdir(exist_ok=True)
        (tmp_path / f"layer_{layer}" / name).write_bytes(b"x")
    assert missing_files(tmp_path, ["layer_0/*"]) == [] and missing_files(tmp_path, ["layer_0/*", "layer_1/*"]) == ["layer_1/*"]
