"""Sparse autoencoders by SAELens: trained on the spot, or loaded from a release; one a block.

Either way it is SAELens' own object, saved and loaded by SAELens, and turned into a `Dictionary` for the measurements."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stetholib.belief import Declared
from stetholib.data import hub
from stetholib.data.source import HUB_ID, Source
from stetholib.errors import UserError
from stetholib.models.dictionary import Dictionary, ordinary
from stetholib.models.loading import LanguageModel
from stetholib.models.streams import Texts, Watch, collected, tokenize, unwatched, up_to
from stetholib.profiles import Sae, nearest
from stetholib.store.files import atomic

COMMITS = "sae-commits.json"  # in a store: the commits that its fetched SAEs are of


def train(
    activations: Float[Tensor, "token d_model"], spec: Sae, seed: int, folder: Path, device: str = "cpu", **said: Any
) -> pd.DataFrame:
    """Train a BatchTopK SAE on a block's activations and save it for inference (as a JumpReLU SAE) in `folder`.
    said: what it shall say of itself. Returns how it went, of `_watched`."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig

    torch.manual_seed(seed)
    steps = max(1, spec.training_tokens // spec.batch_size)
    config = BatchTopKTrainingSAEConfig(
        d_in=activations.shape[1],
        d_sae=spec.d_sae,
        k=spec.k,
        device=device,
        normalize_activations="expected_average_only_in",
        # the threshold's average starts at 0: a short run would end far below it, at many times k
        topk_threshold_lr=max(0.01, min(1.0, 2 / steps)),
    )
    vars(config.metadata).update(said)
    sae = BatchTopKTrainingSAE(config)
    sae.W_dec.requires_grad_(not spec.frozen_decoder)
    trainer = _watched(
        cfg=SAETrainerConfig(
            total_training_samples=steps * spec.batch_size,
            train_batch_size_samples=spec.batch_size,
            lr=spec.learning_rate,
            lr_end=spec.learning_rate / 10,
            lr_warm_up_steps=round(spec.warm_up * steps),
            lr_decay_steps=steps // 5,
            device=device,
            dead_feature_window=max(1, steps // 8),
            n_batches_for_norm_estimate=16,
        ),
        sae=sae,
        data_provider=_shuffled(activations, spec.batch_size, seed),
    )
    trainer.fit().save_inference_model(folder)
    return pd.DataFrame(trainer.curve, columns=["tokens", "fvu", "l0", "dead"])


def _watched(**arguments: Any) -> Any:
    """SAELens' trainer, which keeps how training goes on its own batches, about forty times: the variance left unexplained, the
    L0 that the threshold would give, and the share of features that have not fired for an eighth of the run."""
    from sae_lens.training.sae_trainer import SAETrainer

    class Watched(SAETrainer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.curve: list[tuple[float, ...]] = []

        def step(self, batch: Tensor) -> Any:
            found = super().step(batch)
            if self.n_training_steps % max(1, self.cfg.total_training_steps // 40) == 0:
                self.curve.append((self.n_training_samples, *self._now(found)))
            return found

        @torch.no_grad()
        def _now(self, found: Any) -> tuple[float, ...]:
            left = (found.sae_in - found.sae_out).square().sum() / (found.sae_in - found.sae_in.mean(0)).square().sum()
            firing = found.hidden_pre > self.sae.topk_threshold
            return float(left), float(firing.sum(1).float().mean()), float(self.dead_neurons.float().mean())

    return Watched(**arguments)


def _shuffled(activations: Float[Tensor, "token d_model"], batch: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(activations), generator=generator)
        for start in range(0, max(1, len(order) - batch + 1), batch):
            yield activations[order[start : start + batch]]


def load(folder: Path, device: str = "cpu") -> Any:
    """A SAELens SAE from a local folder."""
    from sae_lens import SAE

    try:
        return SAE.load_from_disk(folder, device=device, dtype="float32")
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"SAE {folder}: it cannot be read ({said}); save it as safetensors with SAELens' save_model") from None


def fetch(release: str, sae_id: str | None, layer: int, revision: str | None = None, base: str | None = None) -> Any:
    """The SAE of one block: of a SAELens release, or of a folder that holds one folder a block, by `sae_id`.
    base: the model's name. Raises UserError where the SAE says that it is of another place or model."""
    if Source.of(release, revision, "sae").where == "folder":
        return load(checked_folder(release, sae_id, layer, base))
    found = load_release(release, name := id_of(sae_id, layer), revision)
    check_statement(found.cfg.metadata.to_dict(), f"{release}/{name}", layer)  # of the model the registry speaks
    return found


def checked_folder(release: str, sae_id: str | None, layer: int, base: str | None = None) -> Path:
    """One block's folder of a folder of SAEs. Raises UserError where a file is missing, or says that it is not of this block."""
    folder = Path(release) / id_of(sae_id, layer)
    for file in (folder / "cfg.json", folder / "sae_weights.safetensors"):
        if not file.is_file():
            name = file.relative_to(release)
            raise UserError(f"SAE folder {release}: there is no {name}; save each SAE there with SAELens' save_model")
    try:
        said = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        said = said | said.get("metadata", {})
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"SAE {folder}: its cfg.json cannot be read; save it with SAELens' save_model") from None
    check_statement(said, str(folder), layer, base)
    return folder


def check_statement(said: Mapping[str, Any], name: str, layer: int, base: str | None = None) -> None:
    """Hold an SAE to what it says of itself in its configuration or metadata: the output of its block, of the model `base`.
    What it does not say is not held against it. Raises UserError for another place or model."""
    output = rf"blocks\.({layer}\.hook_resid_post|{layer + 1}\.hook_resid_pre)|((language_)?model\.)*layers\.{layer}(\.output)?"
    for site in filter(None, map(said.get, ("hook_point", "hook_name", "hf_hook_name"))):
        if not re.fullmatch(output, str(site)):
            needed = f"the output of block {layer} is needed (blocks.{layer}.hook_resid_post)"
            raise UserError(
                f"SAE {name}: it says that it reads {site}; {needed}; take the SAE of that place, or mend its cfg.json"
            )
    _check_model(said.get("model_name"), base, f"SAE {name}: it")


def _check_model(of: Any, base: str | None, what: str) -> None:
    """Hold SAEs to the model that they were trained on, by its name on the Hub; whose copy of the model it is does not matter.
    A folder's name says nothing, nor does one without an owner, which is a library's own."""
    theirs, ours = str(of).lower().split("/"), str(base).lower().split("/")
    named = len(theirs) == 2 and HUB_ID.fullmatch(str(of)) and base and Source.of(base).where != "folder"
    if named and theirs[-1] != ours[-1]:
        raise UserError(f"{what} was trained on {of}, the model is {base}; mend sae.release or model.base")


def id_of(sae_id: str | None, layer: int) -> str:
    """The id of one block's SAE. Raises UserError where `sae_id` does not hold `{layer}`, or another brace."""
    name = (sae_id or "").replace("{layer}", str(layer))
    if name == (sae_id or "") or "{" in name or "}" in name:
        raise UserError(f"sae.sae_id is {sae_id!r}; it must hold {{layer}}, as in layer_{{layer}}_width_16k_l0_small")
    return name


def declared(spec: Sae, layers: int) -> Declared:
    """The L0 that SAELens' registry gives for each block's SAE; nothing for a folder of one's own."""
    if Source.of(spec.release, kind="sae").where != "hub":
        return Declared()
    expected = registered(spec.release).expected_l0
    return Declared({layer: expected[id_of(spec.sae_id, layer)] for layer in range(layers)})


def files_of(spec: Sae, base: str, layers: Callable[[], int]) -> tuple[Source, list[str]]:
    """Where the SAEs are, and the patterns of their files there. Raises UserError where a release is not of the model `base`,
    or lacks a block's. layers: tells how many blocks the model has; asked for a release only, since the Hub may have to tell."""
    source = Source.of(spec.release, spec.revision, "sae")
    if source.where != "hub":
        return source, ["**/*.safetensors"]
    entry, names = registered(spec.release, base), [id_of(spec.sae_id, layer) for layer in range(layers())]
    if absent := [name for name in names if name not in entry.saes_map]:
        raise UserError(f"release {spec.release} has no {absent[0]!r}; mend sae.sae_id or model.base")
    return Source(entry.repo_id, spec.revision, "sae", "hub"), [f"{entry.saes_map[name]}/*" for name in names]


def load_release(release: str, sae_id: str, revision: str | None = None) -> Any:
    """A SAELens SAE by release and id, from the Hub or its cache. Raises UserError for an id that the release lacks."""
    from sae_lens import SAE

    entry = registered(release)
    if sae_id not in entry.saes_map:
        raise UserError(f"SAE release {release} has no {sae_id!r}{nearest(sae_id, entry.saes_map)}; mend sae.sae_id")
    if entry.conversion_func == "gemma_3":
        return SAE.from_pretrained(release, sae_id, converter=partial(gemma_scope_2, revision=revision))
    if revision:
        raise UserError(f"sae.revision is {revision!r}, which SAELens' loader of {release} cannot ask for; set it to null")
    with hub.explained(entry.repo_id):
        return SAE.from_pretrained(release, sae_id)


def registered(release: str, base: str | None = None) -> Any:
    """What SAELens' registry says of a release: repository, model, and for each id its path and expected L0.
    Raises UserError where it is of another model than `base`."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise UserError(f"SAE release {release!r} is not in SAELens' registry{nearest(release, directory)}; mend sae.release")
    _check_model(directory[release].model, base, f"SAE release {release}")
    return directory[release]


def gemma_scope_2(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """(config, weights, no sparsity) of Gemma Scope 2, shapes read from the fetched file: SAELens' own asks the network for
    them though it is cached. Raises UserError for another architecture; the place that it says is checked by `fetch`."""
    path = hub.file(repo_id, f"{folder_name}/params.safetensors", revision)
    said = json.loads(hub.file(repo_id, f"{folder_name}/config.json", revision).read_text(encoding="utf-8"))
    layer = int(re.findall(r"layer_(\d+)", folder_name)[0])
    if (kind := said.get("architecture")) != "jump_relu":
        raise UserError(f"SAE {repo_id}/{folder_name}: its config says {kind}, jump_relu is needed; mend sae.sae_id")
    hub.checked_hash(path)
    raw = load_file(path)
    names = dict(W_enc="w_enc", W_dec="w_dec", b_enc="b_enc", b_dec="b_dec", threshold="threshold")
    if missing := [name for name in names.values() if name not in raw]:
        raise UserError(f"SAE {repo_id}/{folder_name}: params.safetensors lacks {missing[0]}; fetch it again")
    d_in, d_sae = raw["w_enc"].shape
    config = dict(
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        dtype="float32",
        device=device,
        model_name=said["model_name"],
        hook_name=f"blocks.{layer}.hook_resid_post",
        hook_head_index=None,
        hf_hook_name=said.get("hf_hook_point_in"),
        prepend_bos=True,
        apply_b_dec_to_input=False,
        normalize_activations="none",
        reshape_activations="none",
        sae_lens_training_version=None,
    )
    return config | (cfg_overrides or {}), {name: raw[theirs] for name, theirs in names.items()}, None


def dictionary(sae: Any) -> Dictionary:
    """The plain tensors of a JumpReLU or ReLU SAE, with a centring of its input folded into the encoder's bias.
    Raises UserError for what the formulas of `Dictionary` do not hold for: other architectures, inputs that are rescaled."""
    kind = sae.cfg.architecture()
    if kind not in ("jumprelu", "standard"):
        how = "train it as a BatchTopKTrainingSAE of SAELens, whose save_inference_model() writes JumpReLU"
        raise UserError(f"SAE: architecture {kind!r} is not supported; JumpReLU and ReLU are; {how}")
    if sae.cfg.normalize_activations != "none":
        raise UserError(f"SAE: inputs are normalised at inference ({sae.cfg.normalize_activations}); fold that into the weights")
    tensors = {name: value.detach().float() for name, value in sae.state_dict().items()}
    if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        raise UserError(f"SAE: {bad[0]} holds NaN or Inf; fetch or train it again")
    bias = tensors["b_enc"]
    if sae.cfg.apply_b_dec_to_input:
        bias = bias - tensors["b_dec"] @ tensors["W_enc"]
    threshold = tensors.get("threshold", torch.zeros_like(bias))
    return Dictionary(tensors["W_enc"], bias, tensors["W_dec"], tensors["b_dec"], threshold)


def activations(
    base: LanguageModel, texts: Texts, wanted: int, max_tokens: int, batch_tokens: int, *, watch: Watch = unwatched
) -> dict[int, Float[Tensor, "token d_model"]]:
    """Residual streams of at least `wanted` content tokens to train SAEs on, by layer, without the outliers among them; texts are
    (context, scored text). Raises UserError where the texts hold fewer."""
    kept, total = up_to([(ids, 1) for ids, _ in tokenize(base, texts, max_tokens)], wanted)
    if total < wanted:
        raise UserError(f"sae.training_tokens is {wanted}, but the texts to train SAEs on hold {total}; lower it")
    layers = range(base.model.config.get_text_config().num_hidden_layers)
    heard = collected(base, kept, batch_tokens, layers, watch, "02 activations for SAEs", device="cpu")
    for layer, x in heard.items():
        usual = ordinary(x)
        heard[layer] = x if usual.all() else x[usual]
    return heard


def trained_sae(
    heard: Mapping[int, Tensor], layer: int, spec: Sae, seed: int, device: str, model: str | None, *, folder: Path
) -> pd.DataFrame:
    """A layer's SAE trained on its activations, in `folder` in SAELens' own format; model: the base's name on the Hub. Returns
    how training went."""
    return train(heard[layer], spec, seed, folder, device, hook_name=f"blocks.{layer}.hook_resid_post", model_name=model)


def fetched_sae(
    release: str, sae_id: str, layer: int, revision: str | None, model: str, files: Sequence[str], *, folder: Path
) -> str | None:
    """A layer's SAE of a release or of a folder, in `folder` in SAELens' own format; returns the commit that it was fetched at.
    model: the base model's name, which the release must be of; files: hashes of the files, where they are in a folder."""
    entry = registered(release, model) if Source.of(release, kind="sae").where == "hub" else None
    fetch(release, sae_id, layer, revision, model).save_model(folder)
    return hub.resolved(entry.repo_id, revision) if entry else None


def _commits(store: Path, spec: Sae) -> tuple[dict[str, str], str]:
    """The commits that a store's fetched SAEs are of, by release@revision, and which of these the SAEs' is."""
    name = f"{spec.release}@{spec.revision or 'main'}"
    with suppress(OSError, ValueError):  # not there yet, or damaged
        return json.loads((store / COMMITS).read_text(encoding="utf-8")), name
    return {}, name


def commit_of(store: Path, spec: Sae) -> dict[str, str]:
    """The `commit` of the Hub that a store's SAEs were fetched at; empty where they were not fetched."""
    known, name = _commits(store, spec)
    return {"commit": known[name]} if known.get(name) else {}


def check_commit(store: Path, spec: Sae, commit: str | None) -> None:
    """Hold fetched SAEs to the commit that a store's first ones were of: the first writes it down.
    Raises UserError where the Hub has given another since."""
    known, name = _commits(store, spec)
    if commit and name not in known:
        text = json.dumps(known | {name: commit}, indent=1)
        atomic(store / COMMITS, lambda draft: draft.write_text(text, encoding="utf-8"))
    elif commit and known[name] != commit:
        raise UserError(
            f"SAEs of {name} were fetched at commit {known[name]}, and now the Hub gives {commit}; "
            "set sae.revision to the first to go on, or to the second to begin anew with it"
        )


def dictionary_of(folder: Path) -> Dictionary:
    """Plain tensors of an SAE in SAELens' own format, kept so that SAELens is imported only where one is made."""
    return dictionary(load(folder))
