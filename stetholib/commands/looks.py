"""What a look at files of one's own tells before anything is computed: enough texts, the task, tokenizer, context and SAEs.

What ships with the package needs none, and of what is still to be fetched nothing is said."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from types import SimpleNamespace

from stetholib import layer_sets
from stetholib.adapters import harness, own_code, saes
from stetholib.data import corpora
from stetholib.data.source import Source
from stetholib.errors import UserError
from stetholib.models.answering import planned
from stetholib.models.loading import LanguageModel, check_room, opens_with_bos, read_tokenizer
from stetholib.models.streams import tokenize
from stetholib.profiles import OWN, Profile


def looks(profile: Profile, here: Collection[str], layers: Callable[[], int]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Each look by name: it says what was found, or raises UserError. here: what needs no fetching; layers: of the model."""
    data, own_task = profile.data, profile.evaluation.task != harness.MINERVA
    yield "task file" if own_task else "subjects", partial(harness.check_task, data.subjects, profile.evaluation.task)
    maths = "maths" in here and data.maths != "generated"
    model = "model" in here and Source.of(profile.model.base).where != "shipped"
    if profile.edit.layers and "model" in here:
        yield "own edit", lambda: _own_edit(profile.edit.layers or (), layers())
    if OWN.fullmatch(profile.features.specificity):
        yield "specificity", partial(_own_specificity, profile.features.specificity)
    if maths:
        yield "problems", partial(_problems, profile)
    if "general" in here and data.general != "generated":
        yield "documents", partial(_documents, profile)
    if model:
        yield "tokenizer", partial(_tokenizer, profile)
    if "maths" in here and (own_task or (maths and model)):
        yield "prompts", partial(_prompts, profile, model)
    if "model" in here and "SAEs" in here and Source.of(profile.sae.release, kind="sae").where == "folder":
        yield "SAE files", partial(_sae_files, profile, layers)


def _own_edit(wanted: Sequence[int], layers: int) -> str:
    layer_sets.check_layers(wanted, layers)
    return f"layers {' '.join(map(str, sorted(wanted)))} of {layers}"


def _own_specificity(kind: str) -> str:
    own_code.specificity(kind)
    return f"{kind} is code that runs; it was read and defines what it must"


def _problems(profile: Profile) -> str:
    data, boxed = profile.data, profile.finetune.target == "minerva"
    least = {}
    for split in ("train", "validation", "test"):
        subjects = [row["subject"] for row in corpora.problems(data, split, profile.seed, boxed)]
        least[split] = min(subjects.count(subject) for subject in data.subjects)
    for key, wanted, split in (
        ("data.feature_problems", data.feature_problems, "validation"),
        ("selection.loss_problems", profile.selection.loss_problems, "validation"),
        ("projection.gradient_problems", profile.projection.gradient_problems, "train"),
    ):
        if wanted > least[split]:
            raise UserError(f"{key}: {wanted} {split} problems of a subject are wanted, one has {least[split]}; lower {key}")
    return f"{least['train']} train, {least['validation']} validation and {least['test']} test problems of each subject, or more"


def _documents(profile: Profile) -> str:
    own, other = profile.data.general_documents, profile.evaluation.general_documents
    for split, key, count in (("validation", "data", own), ("validation", "evaluation", other), ("test", "evaluation", other)):
        corpora.general(profile.data, split, count, profile.seed, key=f"{key}.general_documents")
    return "enough for every key that wants them"


def _tokenizer(profile: Profile) -> str:
    model, longest = _without_weights(profile), profile.data.max_tokens
    tokenize(model, [("", "a")], longest)
    check_room(model, longest)
    opened = "with one" if opens_with_bos(model.tokenizer) else "without"
    return f"{len(model.tokenizer)} tokens, texts open {opened} BOS, the context is {model.context}"


def _without_weights(profile: Profile) -> LanguageModel:
    """The tokenizer, and of the model its configuration alone."""
    from transformers import AutoConfig

    folder = Source.of(profile.model.base, profile.model.revision).folder()
    tokenizer = read_tokenizer(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:120]
        raise UserError(f"model {folder}: its configuration cannot be read ({said}); save it into the same folder") from None
    return LanguageModel(SimpleNamespace(config=config), tokenizer)


def _prompts(profile: Profile, model: bool) -> str:
    """The longest problem of each subject as the task asks it; with the model here, whether its context has room for it."""
    p, longest = profile.evaluation, dict[str, corpora.Row]()
    for row in corpora.problems(profile.data, "test", profile.seed):
        longest[row["subject"]] = max(row, longest.get(row["subject"], row), key=lambda one: len(one["problem"]))
    known = _without_weights(profile) if model else None
    tasks = harness.Tasks(list(longest.values()), p.num_fewshot, p.task)
    prompts = harness.asked(tasks, known if p.chat_template else None).prompts
    if known:
        planned(known, prompts, p.max_new_tokens)
    return f"the longest has {max(map(len, prompts.values()))} characters"


def _sae_files(profile: Profile, layers: Callable[[], int]) -> str:
    for layer in range(layers()):
        saes.checked_folder(profile.sae.release, profile.sae.sae_id, layer, profile.model.base)
    return f"one for each of {layers()} blocks"
