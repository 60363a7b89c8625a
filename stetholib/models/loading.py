"""A causal language model with its tokenizer, loaded from a folder: weights from safetensors only, whole and finite."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stetholib.models.architectures import architecture, check_folder
from stetholib.models.weights import Checkpoint, Key, ModelError, weight_names

FLOATS = ("F32", "BF16", "F64")
LOCAL: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
NORM_WEIGHT = re.compile(r"(?:^|\.)layers\.(\d+)\.(\w+_layernorm)\.weight$")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode on its device."""

    model: Any  # transformers puts its methods on a class that it picks at run time
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """The longest sequence it was made for, in tokens; None where its configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load(folder: Path, dtype: str = "float32", device: str = "cpu", attention: str = "eager") -> LanguageModel:
    """Load a model and its tokenizer from a local folder, weights from safetensors only. attention: `eager`, faster at the
    miniature's size, or `sdpa`, PyTorch's fused kernels, which need less memory."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_stored(Checkpoint(folder))
    # mismatched sizes are refused below, in one line
    how: dict[str, Any] = dict(use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **LOCAL)
    kind: dict[str, Any] = dict(dtype=getattr(torch, dtype), attn_implementation=attention)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **kind, **how)
    model, info = loaded
    for what, said in (
        ("mismatched_keys", "has another shape than the configuration says"),
        ("missing_keys", "is missing from the checkpoint"),
        ("unexpected_keys", "is not a weight of this architecture"),
    ):
        if odd := sorted(info[what], key=str):
            name = odd[0] if isinstance(odd[0], str) else odd[0][0]
            raise ModelError(f"model {folder}: {name} {said}; take the checkpoint as it was released, or save it again")
    check_finite({f"model {folder}: {name}": weight for name, weight in model.named_parameters()})
    return LanguageModel(model.to(device).eval().requires_grad_(False), read_tokenizer(folder))


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder, without any code that the folder brings."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:120]
        mend = "save it into the same folder, as one that needs no code of its own"
        raise ModelError(f"model {folder}: its tokenizer cannot be read ({said}); {mend}") from None
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def opens_with_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer's own post-processor opens texts with BOS; many name a BOS and add none."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def token_ids(tokenizer: Any, texts: Collection[str], whole: bool = False) -> list[list[int]]:
    """Token ids of each text, opened as the tokenizer itself opens texts: with BOS once, or without where it adds none, unless all
    of the texts bring their own, as a chat template's do. whole: hold all of a text to one BOS, not its opening alone, where
    the tokenizer adds it. Raises ModelError for a BOS too many, or missing, which would quietly cost accuracy."""
    found, bos = [tokenizer(text).input_ids for text in texts], tokenizer.bos_token_id
    if bos is None:
        return found
    adds = opens_with_bos(tokenizer)
    wanted = int(adds or all(text.startswith(tokenizer.bos_token) for text in texts))
    for text, ids in zip(texts, found, strict=True):
        held = ids[: None if whole and adds else 2].count(bos) if ids[:1] == [bos] else 0
        if held != wanted:
            raise ModelError(
                f"tokenizer: a text must open with {tokenizer.bos_token} {'exactly once' if wanted else 'never'}, found {held} in "
                f"{text[:40]!r}; take it out of the text, or mend the tokenizer's post-processor"
            )
    return found


def check_room(model: LanguageModel, max_tokens: int) -> None:
    """Refuse texts of more tokens than the model was made for."""
    if model.context is not None and max_tokens > model.context:
        raise ModelError(f"data.max_tokens is {max_tokens}, the model's context is {model.context}; lower data.max_tokens")


def check_stored(checkpoint: Checkpoint) -> None:
    """Refuse what `check_folder` does, weights that are not stored as plain floats (quantised ones, and float16, which Gemma 3's
    activations overflow), and any checkpoint whose blocks are incomplete."""
    check_folder(checkpoint.folder)
    for name in checkpoint:
        if (dtype := checkpoint.dtype(name)) not in FLOATS:
            said = "float16, which overflows" if dtype == "F16" else f"stored as {dtype}, which is not taken as weights"
            raise ModelError(f"model {checkpoint.folder}: {name} is {said}; use float32 or bfloat16 weights")
    weight_names(checkpoint)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and Inf, by the name of what holds them."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds NaN or Inf; check the weights and model.dtype (float16 would overflow)")


def gains_of(base: LanguageModel) -> dict[Key, Float[Tensor, " d_model"]]:
    """The gain between each matrix and the residual stream, 1 + w or w by its architecture; ones where no norm stands."""
    known, parameters = architecture(base.model.config.model_type, "model"), dict(base.model.named_parameters())
    gains = {(int(m[1]), m[2]): p for name, p in parameters.items() if (m := NORM_WEIGHT.search(name)) and "vision" not in name}
    found: dict[Key, Tensor] = {}
    width = gains[0, "input_layernorm"].shape[0]
    for layer, matrix in weight_names(parameters):
        norm = known.norms.get(matrix)
        stored = gains[layer, norm].detach().float() if norm else torch.ones(width)
        found[layer, matrix] = stored + 1 if norm and known.one_plus else stored
    return found
