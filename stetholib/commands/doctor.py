"""What this machine lacks for a profile: `make doctor PROFILE=paper`. One line a check; `make reproduce` begins with them.

Needs are rules of thumb from the sizes of the weights: they err on the safe side and say what they assume."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stetholib import profiles
from stetholib.adapters import harness, saes
from stetholib.commands import environment
from stetholib.commands.looks import looks
from stetholib.data import corpora, hub
from stetholib.data.source import Source
from stetholib.errors import UserError
from stetholib.models.architectures import check_folder
from stetholib.models.sums import sums_bytes
from stetholib.profiles import Profile
from stetholib.store.files import repository
from stetholib.store.tables import Workspace

GIB = hub.GIB
THERE = {
    "shipped": "ships with the package, is made by it, or is installed",
    "folder": "in a folder of this machine",
    "hub": "in the cache",
}
RUNTIME = 1.5 * GIB  # Python with PyTorch and the notebook's kernel


class Check(NamedTuple):
    """One finding; `line` says what is there and, where it is not enough, how to mend it."""

    name: str
    ok: bool
    line: str


class Size(NamedTuple):
    """What memory and disk depend on: weights, bytes of one, blocks, width, tokens that are known, features of an SAE."""

    parameters: int
    bytes_each: int
    layers: int
    width: int
    vocabulary: int
    d_sae: int

    @property
    def weights(self) -> int:
        """Bytes of all weights, in the type that they are computed with."""
        return self.parameters * self.bytes_each


def examine(profile: Profile, device: str, processes: int = 1) -> Iterator[Check]:
    """Every check of a profile, the quick ones first; `processes` answer the test together."""
    yield Check("packages", True, _packages())
    if (task := profile.evaluation.task) != harness.MINERVA:
        yield Check("task", True, f"{task} is code that will run (!function and templates); read it first, with what it includes")
    sources = _sources(profile)
    absent: dict[str, int] = {}
    for name, find in sources.items():
        try:
            source, patterns = find()
            _check_model(source)
            absent[name], whole = source.bytes_to_fetch(patterns)
            said = f"{absent[name] / GIB:.2g} of {whole / GIB:.2g} GiB are to be fetched"
            yield Check(name, True, said if absent[name] else THERE[source.where])
        except UserError as error:
            yield Check(name, False, str(error))
    yield from _hub(absent.keys() == sources.keys() and not any(absent.values()))
    here = [name for name, left in absent.items() if not left]
    for name, look in looks(profile, here, lambda: _config(profile)["num_hidden_layers"]):
        try:
            yield Check(name, True, look())
        except UserError as error:
            yield Check(name, False, str(error))
    if "model" not in absent:
        yield Check("needs", False, "memory and disk cannot be told before the model's files can be seen")
        return
    try:
        known = size(profile)
    except UserError as error:
        yield Check("needs", False, str(error))
        return
    yield _memory(profile, known, device, processes)
    yield from _disks(sum(absent.values()), _made(profile, known))
    yield from _devices(profile, known, device, processes)


def refuse(profile: Profile, device: str, processes: int = 1) -> None:
    """Raise UserError with the first thing that is lacking; nothing has been computed or fetched by then."""
    for check in examine(profile, device, processes):
        if not check.ok:
            raise UserError(f"{check.name}: {check.line}")


def report(name: str, device: str, say: Callable[[str], None], overrides: Mapping[str, Any] | None = None) -> bool:
    """Say every check of a profile in a line; True when all is well."""
    found = list(examine(profiles.load(name, overrides), device))
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
    if not differing:
        return "as locked"
    return f"{len(differing)} differ from requirements.lock ({differing[0]}); results may differ"


def _sources(profile: Profile) -> dict[str, Callable[[], tuple[Source, Sequence[str]]]]:
    """What the profile reads, each with a function that says where it is and the patterns of its files there."""
    data, tuned = profile.data, profile.finetune
    files = corpora.patterns(data)
    found: dict[str, Callable[[], tuple[Source, Sequence[str]]]] = {"model": lambda: (_model(profile), hub.MODEL_FILES)}
    if tuned.finetuned:
        found["finetuned"] = lambda: (Source.of(str(tuned.finetuned), tuned.finetuned_revision), hub.MODEL_FILES)
    found["SAEs"] = lambda: saes.files_of(profile.sae, profile.model.base, lambda: _config(profile)["num_hidden_layers"])
    found["maths"] = lambda: (Source.of(data.maths, data.maths_revision, "dataset"), files["maths"])
    found["general"] = lambda: (Source.of(data.general, data.general_revision, "dataset"), files["general"])
    return found


def _model(profile: Profile) -> Source:
    """Where the model is; for the toy, which is made and has no files, the miniature stands in."""
    source = Source.of(profile.model.base, profile.model.revision)
    return Source.of("mini") if source.name == "toy" else source


def _check_model(source: Source) -> None:
    """Refuse a model that no step can use, by its small files alone, before its weights are fetched."""
    if source.kind != "model" or source.name == "toy":
        return
    try:
        folder = source.file("config.json").parent
    except hub.HubError:
        with suppress(hub.HubError):  # an adapter has no configuration of its own
            check_folder(source.file("adapter_config.json").parent)
        raise
    check_folder(folder)


def _config(profile: Profile) -> dict[str, Any]:
    """The configuration of the model's language half."""
    path = _model(profile).file("config.json")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        # it knows the defaults that files leave out
        whole = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
        text = whole.get_text_config()
        found = {key: int(getattr(text, key)) for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
        return found | {"dtype": str(whole.dtype or text.dtype).removeprefix("torch.")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(
            f"model {profile.model.base}: there is no config.json that transformers can read ({said}); give a folder as transformers saves it"
        ) from None


def size(profile: Profile) -> Size:
    """What memory and disk depend on, by the model's configuration and its files' sizes."""
    config, each = _config(profile), {"float32": 4, "bfloat16": 2}[profile.model.dtype]
    parameters = _model(profile).bytes_to_fetch(["*.safetensors"])[1] // (4 if config["dtype"] == "float32" else 2)
    layers, width, vocabulary = (config[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    return Size(parameters, each, layers, width, vocabulary, profile.sae.d_sae)


def _sums(profile: Profile, size: Size) -> int:
    """Bytes of one block's per-document feature sums, under both contrasts."""
    data = profile.data
    documents = len(data.subjects) * data.feature_problems + data.general_documents
    return sums_bytes(size.d_sae, documents, 1 + len(data.subjects))


def _made(profile: Profile, size: Size) -> int:
    """Bytes that a run has yet to leave: fine-tune and checkpoints, SAEs as saved and as plain tensors, sums, records."""
    tuned = 0 if profile.finetune.finetuned else 3 * size.weights
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
    cache, here = hub.cache_place(), repository()
    needs = [("disk", here, made, "what is made"), ("cache", cache, fetched, "what is fetched")]
    if cache.stat().st_dev == here.stat().st_dev:
        needs = [("disk", here, fetched + made, "what is fetched and made")]
    for name, place, wanted, purpose in needs:
        free = shutil.disk_usage(place).free
        line = f"{free / GIB:.1f} GiB are free, about {wanted / GIB:.1f} are wanted for {purpose}"
        mend = f"; free {(wanted - free) / GIB:.1f} GiB in {place}" if free < wanted else ""
        yield Check(name, free >= wanted, line + mend)


def _held(profile: Profile, size: Size) -> int:
    """Bytes of the feature sums held at once, of SAEs and their random doubles."""
    return int(min(profile.features.memory_gib * GIB, 2 * size.layers * _sums(profile, size)))


def _working(p: Profile, size: Size) -> int:
    """Bytes on the device beside the weights: the largest of what training, hearing and answering take."""
    losses = 14 * size.vocabulary * max(p.data.max_tokens * p.finetune.batch_size, p.selection.batch_tokens)
    trained = losses + (16 * size.parameters if p.finetune.method == "full" and not p.finetune.finetuned else GIB)
    together = max(1, _held(p, size) // (2 * _sums(p, size)))
    hearing = 16 * size.d_sae * size.width * together + 4 * 20_000 * size.width * (together + 2) + 5 * GIB // 4
    answering = size.layers * size.width * size.bytes_each * p.evaluation.batch_size * (900 + p.evaluation.max_new_tokens)
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
    total, weights = _main_memory(), size.weights
    alone = RUNTIME + 2 * weights + _held(profile, size) + (_working(profile, size) if device == "cpu" else 0)
    together = processes * (RUNTIME + 2 * weights) if processes > 1 else 0  # each holds the model and the fine-tune
    wanted = int(max(alone, together))
    line = f"{total / GIB:.1f} GiB, about {wanted / GIB:.1f} are wanted"
    return Check("memory", total >= wanted, line if total >= wanted else f"{line}; take a larger machine or a smaller profile")


def _devices(profile: Profile, size: Size, device: str, processes: int) -> Iterator[Check]:
    if device == "cpu":
        enough = size.parameters < 2 * 10**9
        line = f"CPU with {os.cpu_count()} cores, {profile.threads} threads are pinned"
        yield Check("device", enough, line if enough else f"{line}; this model wants a GPU: DEVICE=cuda")
        return
    if not torch.cuda.is_available():
        yield Check("device", False, "PyTorch sees no CUDA GPU; check the driver with nvidia-smi, or use DEVICE=cpu")
        return
    wanted = int(1.05 * size.weights + _working(profile, size) + GIB)
    mend = "lower finetune.batch_size, selection.batch_tokens or evaluation.batch_size, or take a larger GPU"
    for index in range(processes):
        total = torch.cuda.get_device_properties(index).total_memory
        line = f"{torch.cuda.get_device_name(index)}, {total / GIB:.0f} GiB, about {wanted / GIB:.0f} are wanted"
        yield Check("device", total >= wanted, line if total >= wanted else f"{line}; {mend}")
