"""Sparse autoencoders by SAELens: trained on the spot, or loaded from a release; one a block.

Either way the result is SAELens' own object, saved and loaded by SAELens, and turned into the plain tensors of a
`Dictionary` for the measurements.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stetholib.errors import UserError
from stetholib.profiles import Sae
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

    return SAE.load_from_disk(folder, device=device, dtype="float32")


def load_release(release: str, sae_id: str, device: str = "cpu") -> Any:
    """A SAELens SAE by release and id, from the Hub or its cache."""
    from sae_lens import SAE

    return SAE.from_pretrained(release, sae_id, device=device)


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
