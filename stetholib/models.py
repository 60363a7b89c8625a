"""Models: load one, name the seven matrices of each block, tap the residual stream, and take losses.

A weight's canonical name is `(layer, matrix)`, with matrix one of q, k, v, o, gate, up, down. It is the same for a
text-only Gemma 3, for the language half of `Gemma3ForConditionalGeneration` and for the Llama family. Everything
that is not one of these seven (embeddings, norms, biases, a vision tower) is never edited here.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stetholib.errors import UserError
from stetholib.hub import missing_files

Key = tuple[int, str]
READERS = ("q", "k", "v", "gate", "up")
WRITERS = ("o", "down")
MATRICES = READERS + WRITERS
SIDE = {matrix: "reader" if matrix in READERS else "writer" for matrix in MATRICES}
BLOCK_WEIGHT = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight$")
NORM_WEIGHT = re.compile(r"(?:^|\.)layers\.(\d+)\.(\w+_layernorm)\.weight$")
# The RMSNorm that stands between each matrix and the residual stream, by architecture. Gemma 3 stores its gains
# minus one and normalises what a writer wrote as well; Llama does neither.
GEMMA_NORMS = dict.fromkeys("qkv", "input_layernorm") | dict.fromkeys(("gate", "up"), "pre_feedforward_layernorm")
GEMMA_NORMS |= {"o": "post_attention_layernorm", "down": "post_feedforward_layernorm"}
LLAMA_NORMS = dict.fromkeys("qkv", "input_layernorm") | dict.fromkeys(("gate", "up"), "post_attention_layernorm")


class ModelError(UserError):
    """A model or checkpoint that cannot be used; its message is one line."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode on its device."""

    model: nn.Module
    tokenizer: object

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """The longest sequence it was made for, in tokens; None where its configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True)
class Batch:
    """Left-aligned token ids with their mask; `scored` marks the tokens whose loss, or features, count."""

    documents: tuple[int, ...]
    input_ids: Int[Tensor, "doc seq"]
    attention_mask: Int[Tensor, "doc seq"]
    scored: Int[Tensor, "doc seq"]


def load(folder: Path, dtype: str = "float32", device: str = "cpu", attention: str = "eager") -> LanguageModel:
    """Load a model and its tokenizer from a local folder, weights from safetensors only.

    attention: `eager`, faster at the miniature's size, or `sdpa`, PyTorch's fused kernels, which need less memory.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_stored(Checkpoint(folder))
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(f"model {folder}: there is no config.json; give a folder as transformers saves it, or a Hub id")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused below, in one line
        output_loading_info=True,
    )
    for what, said in (
        ("mismatched_keys", "has another shape than the configuration says"),
        ("missing_keys", "is missing from the checkpoint"),
        ("unexpected_keys", "is not a weight of this architecture"),
    ):
        if odd := sorted(info[what], key=str):
            name = odd[0] if isinstance(odd[0], str) else odd[0][0]
            raise ModelError(f"model {folder}: {name} {said}; take the checkpoint as it was released, or save it again")
    check_finite({f"model {folder}: {name}": weight for name, weight in model.named_parameters()})
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:120]
        raise ModelError(f"model {folder}: its tokenizer cannot be read ({said}); save it into the same folder") from None
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return LanguageModel(model.to(device).eval().requires_grad_(False), tokenizer)


def check_stored(checkpoint: "Checkpoint") -> None:
    """Refuse weights in float16, which Gemma 3's activations overflow, and any checkpoint whose blocks are incomplete."""
    for name in weight_names(checkpoint).values():
        if checkpoint.dtype(name) == "F16":
            raise ModelError(f"model {checkpoint.folder}: {name} is float16, which overflows; use float32 or bfloat16 weights")


def weight_names(names: Iterable[str]) -> dict[Key, str]:
    """Map `(layer, matrix)` to the name it has in a checkpoint or module; raises where a block is incomplete."""
    found: dict[Key, str] = {}
    for name in names:
        match = BLOCK_WEIGHT.search(name)
        if match is None or "vision" in name:
            continue
        where = (int(match[1]), match[2])
        if where in found:
            raise ModelError(f"weights: {found[where]} and {name} both claim to be {where[1]} of layer {where[0]}")
        found[where] = name
    layers = 1 + max((layer for layer, _ in found), default=-1)
    missing = [(layer, matrix) for layer in range(layers) for matrix in MATRICES if (layer, matrix) not in found]
    if missing or not found:
        what = f"{missing[0][1]}_proj of layer {missing[0][0]} is missing" if missing else "no decoder block was found"
        raise ModelError(f"weights: {what}; expected names like model.layers.0.self_attn.q_proj.weight")
    return dict(sorted(found.items()))


def edit_weights(model: nn.Module) -> dict[Key, Tensor]:
    """The seven matrices of each block, by canonical name; views, not copies."""
    parameters = dict(model.named_parameters())
    return {where: parameters[name] for where, name in weight_names(parameters).items()}


def norm_gains(model: nn.Module) -> dict[Key, Float[Tensor, " d_model"]]:
    """The gain between each matrix and the residual stream, 1 + w for Gemma and w for Llama; ones where none stands."""
    parameters = dict(model.named_parameters())
    gains = {(int(m[1]), m[2]): p for name, p in parameters.items() if (m := NORM_WEIGHT.search(name)) and "vision" not in name}
    gemma = (0, "pre_feedforward_layernorm") in gains
    norms = GEMMA_NORMS if gemma else LLAMA_NORMS
    width = gains[0, "input_layernorm"].shape[0]
    found = {}
    for layer, matrix in weight_names(parameters):
        stored = gains[layer, norms[matrix]].detach().float() if matrix in norms else torch.ones(width)
        found[layer, matrix] = stored + 1 if gemma else stored
    return found


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order."""
    first = weight_names(name for name, _ in model.named_parameters())[0, "q"]
    return model.get_submodule(first.rsplit(".0.self_attn", 1)[0])


def weight_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter's name and bytes: equal only when nothing at all differs."""
    digest = sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def residual_stream(model: nn.Module) -> Iterator[dict[int, Float[Tensor, "doc seq d_model"]]]:
    """Tap the residual stream: inside, every forward pass fills the dict with each block's output.

    The block's own output is what Gemma Scope's SAEs read; `hidden_states[-1]` would be after the final norm.
    """
    taken: dict[int, Tensor] = {}
    hooks = []
    for layer, block in enumerate(decoder_blocks(model)):

        def keep(module: nn.Module, args: tuple, output: object, layer: int = layer) -> None:
            taken[layer] = output[0] if isinstance(output, tuple) else output

        hooks.append(block.register_forward_hook(keep))
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def tokenize(model: LanguageModel, texts: Sequence[tuple[str, str]], max_tokens: int) -> list[tuple[list[int], int]]:
    """Token ids of each (context, scored text) pair and how many of them are context, BOS exactly once.

    Raises where the tokenizer adds no BOS, or a second one. Texts are cut at `max_tokens`.
    """
    tokenizer = model.tokenizer
    pairs = []
    for context, text in texts:
        ids = tokenizer(context + text).input_ids
        held = tokenizer(context).input_ids
        if ids[0] != tokenizer.bos_token_id or ids[:2].count(tokenizer.bos_token_id) != 1:
            raise ModelError(f"tokenizer: a text must open with {tokenizer.bos_token} exactly once, got ids {ids[:3]}")
        shared = next((i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids)))
        pairs.append((ids[:max_tokens], min(shared, max_tokens)))
    return pairs


def batches(pairs: Sequence[tuple[list[int], int]], batch_tokens: int, device: torch.device | str) -> list[Batch]:
    """Padded batches of at most `batch_tokens` tokens, texts of like length together; order is by length, then index."""
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), i))
    groups: list[list[int]] = []
    for index in order:
        if groups and (len(groups[-1]) + 1) * len(pairs[index][0]) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_batch(pairs, group, device) for group in groups]


def _batch(pairs: Sequence[tuple[list[int], int]], group: list[int], device: torch.device | str) -> Batch:
    width = max(len(pairs[i][0]) for i in group)
    ids, mask, scored = (torch.zeros(len(group), width, dtype=torch.long) for _ in range(3))
    for row, index in enumerate(group):
        tokens, context = pairs[index]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        scored[row, max(context, 1) : len(tokens)] = 1
    return Batch(tuple(group), ids.to(device), mask.to(device), scored.to(device))


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and Inf, by the name of what holds them."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{name} holds NaN or Inf; check the weights and model.dtype (float16 would overflow)")


def run_blocks(model: nn.Module, batch: Batch) -> None:
    """A forward pass for what the taps of `residual_stream` take: logits of the last position only."""
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)


def token_losses(model: nn.Module, batch: Batch) -> Float[Tensor, "doc seq"]:
    """Cross-entropy of each scored token, in nats; zero elsewhere. Position t is the loss of predicting token t."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), batch.input_ids[:, 1:], reduction="none")
    return nn.functional.pad(losses, (1, 0)) * batch.scored


@torch.no_grad()
def document_losses(model: nn.Module, pool: Sequence[Batch]) -> tuple[Float[Tensor, " doc"], Float[Tensor, " doc"]]:
    """Summed loss (nats) and number of scored tokens of every document, in document order."""
    total = sum(len(batch.documents) for batch in pool)
    losses, counts = torch.zeros(total, dtype=torch.float64), torch.zeros(total, dtype=torch.float64)
    for batch in pool:
        where = torch.tensor(batch.documents)
        losses[where] = token_losses(model, batch).sum(1).double().cpu()
        counts[where] = batch.scored.sum(1).double().cpu()
    return losses, counts


def mean_loss(model: nn.Module, pool: Sequence[Batch]) -> float:
    """Mean loss over all scored tokens, in nats a token."""
    losses, counts = document_losses(model, pool)
    return float(losses.sum() / counts.sum())


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files, read one at a time when asked for."""

    def __init__(self, folder: Path) -> None:
        """Index the folder's tensors by name without reading them."""
        self.folder = Path(folder)
        self._file: dict[str, Path] = {}
        if absent := missing_files(self.folder):
            raise ModelError(f"checkpoint {folder}: {absent[0]} is missing; weights are read from safetensors only")
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - not a dict
                        self._file[name] = path
            except SafetensorError as error:
                raise ModelError(
                    f"checkpoint {path}: it is not a whole safetensors file ({error}); fetch or save it again"
                ) from None

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of a tensor along its first dimension; what lies outside is not read."""
        with safe_open(self._file[name], framework="pt") as handle:
            return handle.get_slice(name)[start:stop]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        with safe_open(self._file[name], framework="pt") as handle:
            return tuple(handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors names it (F32, BF16, F16), without reading it."""
        with safe_open(self._file[name], framework="pt") as handle:
            return str(handle.get_slice(name).get_dtype())

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)
