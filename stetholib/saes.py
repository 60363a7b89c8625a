"""Sparse autoencoders by SAELens: trained on the spot, or loaded from a release; one a block.

Either way the result is SAELens' own object, saved and loaded by SAELens, and turned into the plain tensors of a
`Dictionary` for the measurements.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stetholib import hub
from stetholib.errors import UserError
from stetholib.profiles import Sae, nearest
from stetholib.sae_features import Dictionary


def train(activations: Float[Tensor, "token d_model"], spec: Sae, seed: int, folder: Path, device: str = "cpu") -> None:
    """Train a BatchTopK SAE on a block's activations and save it for inference (as a JumpReLU SAE) in `folder`."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    config = BatchTopKTrainingSAEConfig(
        d_in=activations.shape[1],
        d_sae=spec.d_sae,
        k=spec.k,
        device=device,
        normalize_activations="expected_average_only_in",
    )
    steps = max(1, spec.training_tokens // spec.batch_size)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=steps * spec.batch_size,
            train_batch_size_samples=spec.batch_size,
            lr=spec.learning_rate,
            lr_end=spec.learning_rate / 10,
            lr_decay_steps=steps // 5,
            device=device,
            dead_feature_window=max(1, steps // 8),
            n_batches_for_norm_estimate=16,
        ),
        sae=BatchTopKTrainingSAE(config),
        data_provider=_shuffled(activations, spec.batch_size, seed),
    )
    trainer.fit().save_inference_model(folder)


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


def fetch(release: str, sae_id: str | None, layer: int, revision: str | None = None) -> Any:
    """The SAE of one block: of a SAELens release, or of a folder that holds one folder a block, by `sae_id`."""
    name = id_of(sae_id, layer)
    if not Path(release).is_dir():
        return load_release(release, name, revision)
    if not (Path(release) / name / "cfg.json").is_file():
        raise UserError(f"SAE folder {release}: there is no {name}/cfg.json; save each SAE there with SAELens' save_model")
    return load(Path(release) / name)


def id_of(sae_id: str | None, layer: int) -> str:
    """The id of one block's SAE. Raises UserError where `sae_id` does not hold `{layer}`, or another brace."""
    name = (sae_id or "").replace("{layer}", str(layer))
    if name == (sae_id or "") or "{" in name or "}" in name:
        raise UserError(f"sae.sae_id is {sae_id!r}; it must hold {{layer}}, as in layer_{{layer}}_width_16k_l0_small")
    return name


def check_release(release: str, base: str) -> None:
    """Refuse a release whose SAEs were trained on another model than the profile's, where both are known by name."""
    if release == "train" or Path(release).is_dir() or Path(base).is_dir():
        return
    if (model := registered(release).model) != base:
        raise UserError(
            f"SAE release {release} was trained on {model}, the profile's model is {base}; mend sae.release or model.base"
        )


def expected_l0(release: str, sae_id: str, layer: int) -> float | None:
    """The L0 that SAELens' registry gives for a block's SAE; None for a folder of one's own."""
    return None if Path(release).is_dir() else registered(release).expected_l0[id_of(sae_id, layer)]


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


def registered(release: str) -> Any:
    """What SAELens' registry says of a release: repository, model, and for each id its path and expected L0."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    if release not in directory:
        raise UserError(f"SAE release {release!r} is not in SAELens' registry{nearest(release, directory)}; mend sae.release")
    return directory[release]


def gemma_scope_2(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """SAELens' loader for Gemma Scope 2, reading shapes from the fetched file: (config, weights, no sparsity).

    SAELens' own asks the network for the shapes even when the file is in the cache. Raises UserError where the
    folder's config names another site than its block's output.
    """
    path = hub.file(repo_id, f"{folder_name}/params.safetensors", revision)
    said = json.loads(hub.file(repo_id, f"{folder_name}/config.json", revision).read_text(encoding="utf-8"))
    layer = int(re.search(r"layer_(\d+)", folder_name)[1])
    site = f"model.layers.{layer}.output"
    if said.get("hf_hook_point_in") != site or said.get("architecture") != "jump_relu":
        raise UserError(
            f"SAE {repo_id}/{folder_name}: its config says {said.get('architecture')} at {said.get('hf_hook_point_in')}, "
            f"a JumpReLU SAE at {site} is needed; fetch it again or mend sae.sae_id"
        )
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
        hf_hook_name=site,
        prepend_bos=True,
        apply_b_dec_to_input=False,
        normalize_activations="none",
        reshape_activations="none",
        sae_lens_training_version=None,
    )
    return config | (cfg_overrides or {}), {name: raw[theirs] for name, theirs in names.items()}, None


def dictionary(sae: Any) -> Dictionary:
    """The plain tensors of a JumpReLU or ReLU SAE, with a centring of its input folded into the encoder's bias.

    Raises ValueError for other architectures and for inputs that are rescaled at inference, since the formulas of
    `Dictionary` would then not be this SAE's.
    """
    kind = sae.cfg.architecture()
    if kind not in ("jumprelu", "standard"):
        raise UserError(f"SAE: architecture {kind!r} is not supported; save it for inference as JumpReLU")
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
