"""What this machine lacks for a profile: `make doctor PROFILE=paper`. One line a check; `make reproduce` begins with them.

Needs are rules of thumb from the sizes of the weights: they err on the safe side and say what they assume.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stetholib import environment, estimate, hub, sae_features, texts
from stetholib.errors import UserError
from stetholib.estimate import Machine, Size
from stetholib.profiles import Profile
from stetholib.workspace import Workspace, repository

GIB = hub.GIB
RUNTIME = 1.5 * GIB  # Python with PyTorch and the notebook's kernel


@dataclass(frozen=True)
class Check:
    """One finding; `line` says what is there and, where it is not enough, how to mend it."""

    name: str
    ok: bool
    line: str


def examine(profile: Profile, device: str, processes: int = 1) -> Iterator[Check]:
    """Every check of a profile, the quick ones first; `processes` answer the test together."""
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
    yield _memory(profile, known, device, processes)
    yield from _disks(sum(missing for missing, _ in sizes.values()), _made(profile, known))
    yield from _devices(profile, known, device, processes)


def refuse(profile: Profile, device: str, processes: int = 1) -> None:
    """Raise UserError with the first thing that is lacking; nothing has been computed or fetched by then."""
    for check in examine(profile, device, processes):
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
            files = texts.patterns(data)[name]
            found[name] = lambda repo=repo, revision=revision, files=files: _repo_bytes(repo, revision, files, "dataset")
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
        if cached is not None and not hub.missing_files(cached, files):
            return 0, _folder_bytes(cached)
        hub.check_network(name)
        if kind == "model":
            hub.check_access(name, revision)
        return hub.to_fetch(name, revision, files, kind)


def _sae_bytes(profile: Profile) -> tuple[int, int]:
    from stetholib import saes

    spec = profile.sae
    if Path(spec.release).is_dir():
        return 0, sum(path.stat().st_size for path in Path(spec.release).rglob("*.safetensors"))
    entry = saes.registered(spec.release)
    names = [saes.id_of(spec.sae_id, layer) for layer in range(_layers(profile))]
    if absent := [name for name in names if name not in entry.saes_map]:
        raise UserError(f"release {spec.release} has no {absent[0]!r}; mend sae.sae_id or model.base")
    paths = [entry.saes_map[name] for name in names]
    with hub.explained(entry.repo_id, spec.revision):
        files = [f"{path}/*" for path in paths]
        cached = hub.cached_folder(entry.repo_id, spec.revision, files, "model")
        weights = [list((cached / path).glob("*.safetensors")) for path in paths] if cached else [[]]
        if all(weights):
            return 0, sum(file.stat().st_size for found in weights for file in found)
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
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(path.parent, local_files_only=True)  # it knows the defaults that files leave out
        text = whole.get_text_config()
        found = {key: int(getattr(text, key)) for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
        return found | {"dtype": str(whole.dtype or text.dtype).removeprefix("torch.")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(
            f"model {name}: there is no config.json that transformers can read ({said}); give a folder as transformers saves it"
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
    """Bytes that a run has yet to leave: fine-tune and checkpoints, SAEs as saved and as plain tensors, sums, records."""
    tuned = 0 if profile.finetune.finetuned else 3 * size.parameters * size.bytes_each
    heard = size.layers * (16 * size.d_sae * size.width + _sums(profile, size))
    left = max(0, tuned - _stored(profile, "finetuned-*", "unfinished-finetuned-*"))
    return left + max(0, heard - _stored(profile, "sae-*", "dictionary-*", "features-*")) + GIB // 4


def _stored(profile: Profile, *kinds: str) -> int:
    """Bytes of some kinds of stages that the profile's store holds, whatever made them."""
    total, store = 0, Workspace(profile.name).store
    for path in (path for kind in kinds for path in store.glob(f"{kind}/**/*")):
        with suppress(OSError):  # a run under way may move it
            total += path.stat().st_size if path.is_file() else 0
    return total


def _disks(fetched: int, made: int) -> Iterator[Check]:
    """Room for what is fetched and made, on one disk or on two."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache, here = hub.existing(Path(HF_HUB_CACHE)), repository()
    if cache.stat().st_dev == here.stat().st_dev:
        yield _disk("disk", here, fetched + made, "what is fetched and made")
        return
    yield _disk("disk", here, made, "what is made")
    yield _disk("cache", cache, fetched, "what is fetched")


def _disk(name: str, place: Path, wanted: int, purpose: str) -> Check:
    free = shutil.disk_usage(place).free
    line = f"{free / GIB:.1f} GiB are free, about {wanted / GIB:.1f} are wanted for {purpose}"
    return Check(name, free >= wanted, line if free >= wanted else f"{line}; free {(wanted - free) / GIB:.1f} GiB in {place}")


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


def _main_memory() -> int:
    """Bytes of main memory that this process may have: the machine's, or less by a container's limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, below = line.split(":", 2)
            root = Path("/sys/fs/cgroup", "memory" if "memory" in kinds else "")
            own = root / below.strip("/")
            for place in (own, *(above for above in own.parents if above.is_relative_to(root))):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    with suppress(OSError, ValueError):
                        limits.append(int((place / name).read_text(encoding="utf-8")))
    return min(limits)


def _memory(profile: Profile, size: Size, device: str, processes: int) -> Check:
    total, weights = _main_memory(), size.parameters * size.bytes_each
    alone = RUNTIME + 2 * weights + _held(profile, size) + (_working(profile, size) if device == "cpu" else 0)
    together = processes * (RUNTIME + 2 * weights) if processes > 1 else 0  # each holds the model and the fine-tune
    wanted = int(max(alone, together))
    line = f"{total / GIB:.1f} GiB, about {wanted / GIB:.1f} are wanted"
    return Check("memory", total >= wanted, line if total >= wanted else f"{line}; take a larger machine or a smaller profile")


def _devices(profile: Profile, size: Size, device: str, processes: int) -> Iterator[Check]:
    weights = size.parameters * size.bytes_each
    if device == "cpu":
        enough = size.parameters < 2 * 10**9
        line = f"CPU with {os.cpu_count()} cores, {profile.threads} threads are pinned"
        yield Check("device", enough, line if enough else f"{line}; this model wants a GPU: DEVICE=cuda")
        return
    import torch

    if not torch.cuda.is_available():
        yield Check("device", False, "PyTorch sees no CUDA GPU; check the driver with nvidia-smi, or use DEVICE=cpu")
        return
    wanted = int(1.05 * weights + _working(profile, size) + GIB)
    mend = "lower finetune.batch_size, selection.batch_tokens or evaluation.batch_size, or take a larger GPU"
    for index in range(processes):
        total = torch.cuda.get_device_properties(index).total_memory
        line = f"{torch.cuda.get_device_name(index)}, {total / GIB:.0f} GiB, about {wanted / GIB:.0f} are wanted"
        yield Check("device", total >= wanted, line if total >= wanted else f"{line}; {mend}")
