"""What this machine lacks for a profile: `make doctor PROFILE=paper`. One line a check; `make reproduce` begins with them.

Needs are rules of thumb from the sizes of the weights: they err on the safe side and say what they assume.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stetholib import environment, estimate, hub, sae_features
from stetholib.errors import UserError
from stetholib.estimate import Machine, Size
from stetholib.profiles import Profile
from stetholib.workspace import repository

GIB = hub.GIB
RUNTIME = 1.5 * GIB  # Python with PyTorch and the notebook's kernel


@dataclass(frozen=True)
class Check:
    """One finding; `line` says what is there and, where it is not enough, how to mend it."""

    name: str
    ok: bool
    line: str


def examine(profile: Profile, device: str) -> Iterator[Check]:
    """Every check of a profile, the quick ones first."""
    yield Check("packages", True, _packages())
    sizes: dict[str, tuple[int, int]] = {}
    for name, ask in _sources(profile).items():
        try:
            missing, whole = sizes[name] = ask()
            said = "in the cache" if not missing else f"{missing / GIB:.2g} of {whole / GIB:.2g} GiB are to be fetched"
            yield Check(name, True, said)
        except UserError as error:
            yield Check(name, False, str(error))
    yield from _hub(len(sizes) == len(_sources(profile)) and not any(missing for missing, _ in sizes.values()))
    if "model" not in sizes:
        yield Check("needs", False, "memory and disk cannot be told before the model's files can be seen")
        return
    try:
        known = size(profile)
    except UserError as error:
        yield Check("needs", False, str(error))
        return
    yield _disk(sum(missing for missing, _ in sizes.values()) + _made(profile, known))
    yield _memory(profile, known, device)
    yield _device(profile, known, device)


def refuse(profile: Profile, device: str) -> None:
    """Raise UserError with the first thing that is lacking; nothing has been computed or fetched by then."""
    for check in examine(profile, device):
        if not check.ok:
            raise UserError(f"{check.name}: {check.line}")


def report(profile: Profile, device: str, say: Callable[[str], None]) -> bool:
    """Say every check in a line; True when all is well."""
    found = list(examine(profile, device))
    if all(check.ok for check in found):
        found.append(_hours(profile, device))
    for check in found:
        say(f"{'ok  ' if check.ok else 'MEND'} {check.name:9} {check.line}")
    return all(check.ok for check in found)


def _hub(whole: bool) -> Iterator[Check]:
    """Token and network; neither is wanted where everything is here."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT

    if whole:
        yield Check("Hub", True, "not needed: nothing is to be fetched")
        return
    found = get_token() is not None
    yield Check("token", True, "a Hugging Face token is set" if found else "no Hugging Face token; gated models need one")
    try:
        hub.check_network("what is to be fetched")
        yield Check("network", True, f"the Hub answers at {ENDPOINT}")
    except UserError as error:
        yield Check("network", False, str(error))


def _packages() -> str:
    lock = repository() / "requirements.lock"
    if not lock.is_file():
        return "no requirements.lock here; versions are as they are"
    differing = environment.differences(lock.read_text(encoding="utf-8"))
    return (
        "as locked" if not differing else f"{len(differing)} differ from requirements.lock ({differing[0]}); results may differ"
    )


def _sources(profile: Profile) -> dict[str, Callable[[], tuple[int, int]]]:
    """What the profile reads, each with a function that gives (bytes to be fetched, bytes in all)."""
    found = {"model": lambda: _model_bytes(profile.model.base, profile.model.revision)}
    if profile.finetune.finetuned:
        found["finetuned"] = lambda: _model_bytes(profile.finetune.finetuned, profile.finetune.finetuned_revision)
    if profile.sae.release != "train":
        found["SAEs"] = lambda: _sae_bytes(profile)
    data = profile.data
    for name, repo, revision in (("maths", data.maths, data.maths_revision), ("general", data.general, data.general_revision)):
        if repo != "generated":
            found[name] = lambda repo=repo, revision=revision: _repo_bytes(repo, revision, ["*.parquet"], "dataset")
    return found


def _model_bytes(name: str, revision: str | None) -> tuple[int, int]:
    if name in ("mini", "toy"):
        from stetholib.mini import base

        return 0, _folder_bytes(base.FOLDER)
    return _repo_bytes(name, revision, hub.MODEL_FILES, "model")


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _repo_bytes(name: str, revision: str | None, files: Sequence[str], kind: str) -> tuple[int, int]:
    if Path(name).is_dir():
        return 0, _folder_bytes(Path(name))
    with hub.explained(name, revision, kind):
        cached = hub.cached_folder(name, revision, files, kind)
        if cached is not None and not hub.missing_files(cached):
            return 0, _folder_bytes(cached)
        hub.check_network(name)
        if kind == "model":
            hub.file(name, "config.json", revision)  # a gated repository shows its sizes to all, its files only to some
        return hub.to_fetch(name, revision, files, kind)


def _sae_bytes(profile: Profile) -> tuple[int, int]:
    from stetholib import saes

    spec = profile.sae
    if Path(spec.release).is_dir():
        return 0, sum(path.stat().st_size for path in Path(spec.release).rglob("*.safetensors"))
    entry = saes.registered(spec.release)
    names = [(spec.sae_id or "").format(layer=layer) for layer in range(_layers(profile))]
    if absent := [name for name in names if name not in entry.saes_map]:
        raise UserError(f"release {spec.release} has no {absent[0]!r}; mend sae.sae_id or model.base")
    paths = [entry.saes_map[name] for name in names]
    with hub.explained(entry.repo_id, spec.revision):
        files = [f"{path}/*" for path in paths]
        cached = hub.cached_folder(entry.repo_id, spec.revision, files, "model")
        if cached is not None and all((cached / path / "params.safetensors").is_file() for path in paths):
            return 0, sum((cached / path / "params.safetensors").stat().st_size for path in paths)
        hub.check_network(entry.repo_id)
        return hub.to_fetch(entry.repo_id, spec.revision, files)


def _layers(profile: Profile) -> int:
    """How many blocks the model has."""
    return int(_config(profile)["num_hidden_layers"])


def _config(profile: Profile) -> dict[str, Any]:
    """The configuration of the model's language half."""
    from stetholib.mini import base

    name = profile.model.base
    folder = base.FOLDER if name in ("mini", "toy") else Path(name)
    path = folder / "config.json" if folder.is_dir() else hub.file(name, "config.json", profile.model.revision)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        found = {"dtype": said.get("dtype") or said.get("torch_dtype")} | said.get("text_config", said)
        return {key: found[key] for key in ("dtype", "num_hidden_layers", "hidden_size", "vocab_size")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"model {name}: there is no config.json that names its blocks and width; give a folder as transformers saves it"
        ) from None


def size(profile: Profile) -> Size:
    """What the profile's time depends on, by the model's configuration and its files' sizes."""
    config, each = _config(profile), {"float32": 4, "bfloat16": 2}[profile.model.dtype]
    weights = _model_bytes(profile.model.base, profile.model.revision)[1]
    stored = 4 if config["dtype"] == "float32" else 2
    return Size(weights // stored, each, config["num_hidden_layers"], config["hidden_size"], profile.sae.d_sae)


def _hours(profile: Profile, device: str) -> Check:
    machine = Machine.measured(device, profile.model.dtype)
    hours = sum(estimate.seconds(profile, size(profile), machine).values()) / 3600
    said = f"about {hours:.1f} h, by the sizes and by {machine.flops / 1e12:.2g} TFLOP/s and {machine.bandwidth / GIB:.0f} GiB/s"
    return Check("time", True, f"{said} measured here; within a factor of a few, `make rehearse` tells it better")


def _sums(profile: Profile, size: Size) -> int:
    """Bytes of one block's per-document feature sums, under both contrasts."""
    data = profile.data
    documents = len(data.subjects) * data.feature_problems + data.general_documents
    return sae_features.sums_bytes(size.d_sae, documents, 1 + len(data.subjects))


def _made(profile: Profile, size: Size) -> int:
    """Bytes that a run leaves: the fine-tune and its checkpoints, SAEs as saved and as plain tensors, sums, records."""
    tuned = 0 if profile.finetune.finetuned else 3 * size.parameters * size.bytes_each
    return tuned + size.layers * (16 * size.d_sae * size.width + _sums(profile, size)) + GIB // 4


def _disk(wanted: int) -> Check:
    place = repository()
    free = shutil.disk_usage(place).free
    line = f"{free / GIB:.1f} GiB are free, about {wanted / GIB:.1f} are wanted for what is fetched and made"
    return Check("disk", free >= wanted, line if free >= wanted else f"{line}; free {(wanted - free) / GIB:.1f} GiB")


def _held(profile: Profile, size: Size) -> int:
    """Bytes of the feature sums held at once, of SAEs and their random doubles."""
    return int(min(profile.features.memory_gib * GIB, 2 * size.layers * _sums(profile, size)))


def _working(profile: Profile, size: Size) -> int:
    """Bytes on the device beside the weights: the largest of what training, hearing and answering take."""
    p, vocabulary = profile, _config(profile)["vocab_size"]
    losses = 14 * vocabulary * max(p.data.max_tokens * p.finetune.batch_size, p.selection.batch_tokens)
    trained = losses + (16 * size.parameters if p.finetune.method == "full" and not p.finetune.finetuned else GIB)
    together = max(1, _held(p, size) // (2 * _sums(p, size)))
    hearing = 16 * size.d_sae * size.width * together + 4 * 20_000 * size.width * (together + 2) + 5 * GIB // 4
    answering = (
        2 * size.layers * size.width * size.bytes_each * p.evaluation.batch_size * (900 + p.evaluation.max_new_tokens) // 2
    )
    return max(trained, hearing, answering) if size.parameters > 10**7 else GIB // 2


def _memory(profile: Profile, size: Size, device: str) -> Check:
    total, weights = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), size.parameters * size.bytes_each
    wanted = int(RUNTIME + 2 * weights + _held(profile, size) + (_working(profile, size) if device == "cpu" else 0))
    line = f"{total / GIB:.1f} GiB, about {wanted / GIB:.1f} are wanted"
    return Check("memory", total >= wanted, line if total >= wanted else f"{line}; take a larger machine or a smaller profile")


def _device(profile: Profile, size: Size, device: str) -> Check:
    weights = size.parameters * size.bytes_each
    if device == "cpu":
        enough = size.parameters < 2 * 10**9
        line = f"CPU with {os.cpu_count()} cores, {profile.threads} threads are pinned"
        return Check("device", enough, line if enough else f"{line}; this model wants a GPU: DEVICE=cuda")
    import torch

    if not torch.cuda.is_available():
        return Check("device", False, "PyTorch sees no CUDA GPU; check the driver with nvidia-smi, or use DEVICE=cpu")
    total, wanted = torch.cuda.get_device_properties(0).total_memory, int(1.05 * weights + _working(profile, size) + GIB)
    line = f"{torch.cuda.get_device_name(0)}, {total / GIB:.0f} GiB, about {wanted / GIB:.0f} are wanted"
    mend = "lower finetune.batch_size, selection.batch_tokens or evaluation.batch_size, or take a larger GPU"
    return Check("device", total >= wanted, line if total >= wanted else f"{line}; {mend}")
