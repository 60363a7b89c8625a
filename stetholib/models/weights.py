"""Weights by their canonical names: the seven matrices of each block, and checkpoints on disk.

A weight's canonical name is `(layer, matrix)`, with matrix one of q, k, v, o, gate, up, down. It is the same for a
text-only Gemma 3, for the language half of `Gemma3ForConditionalGeneration` and for the others of `architectures`. Everything
that is not one of these seven (embeddings, norms, biases, a vision tower) is never edited here."""

import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stetholib.data.hub import AGAIN, missing_files, named_by
from stetholib.errors import ModelError

Key = tuple[int, str]
if TYPE_CHECKING:
    Weights = Mapping[Key, Tensor]  # each [d_out, d_in]
else:  # whoever checks types at run time would look into it, and compute a matrix of a lazy one
    Weights = Mapping
READERS = ("q", "k", "v", "gate", "up")
WRITERS = ("o", "down")
MATRICES = READERS + WRITERS
SIDE = {matrix: "reader" if matrix in READERS else "writer" for matrix in MATRICES}
BLOCK_WEIGHT = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight$")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order."""
    first = weight_names(name for name, _ in model.named_parameters())[0, "q"]
    blocks = model.get_submodule(first.rsplit(".0.self_attn", 1)[0])
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def weight_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter's name and bytes: equal only when nothing at all differs."""
    digest = sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files, of those that its index names where it has one, read one at a time when asked
    for: what transformers reads, or a refusal."""

    def __init__(self, folder: Path) -> None:
        """Index the folder's tensors by name without reading them."""
        self.folder = Path(folder)
        self._file: dict[str, Path] = {}
        self._dtype: dict[str, str] = {}
        if absent := missing_files(self.folder):
            raise ModelError(f"checkpoint {folder}: {absent[0]} is missing; weights are read from safetensors only")
        for path in self._chosen():
            try:
                with safe_open(path, framework="pt") as handle:
                    dtypes = {name: str(handle.get_slice(name).get_dtype()) for name in handle.keys()}  # noqa: SIM118 - no dict
            except (SafetensorError, OSError) as error:
                said = " ".join(str(error).split())[:160]
                raise ModelError(f"checkpoint {path}: it is not a whole safetensors file ({said}); {AGAIN}") from None
            if odd := [name for name in dtypes if not name.isprintable()]:
                raise ModelError(f"checkpoint {path}: {odd[0]!r} is no name of a tensor; {AGAIN}")
            if double := sorted(dtypes.keys() & self._file.keys()):
                raise ModelError(
                    f"checkpoint {folder}: {double[0]} is in {self._file[double[0]].name} and in {path.name}; "
                    f"keep the files of one checkpoint, with its {INDEX}"
                )
            self._file |= dict.fromkeys(dtypes, path)
            self._dtype |= dtypes

    def _chosen(self) -> list[Path]:
        """The files to read, in order."""
        found, index = sorted(self.folder.glob("*.safetensors")), self.folder / INDEX
        if index.is_file():
            named = named_by(index)
            if WEIGHTS not in named and self.folder / WEIGHTS in found:
                raise ModelError(
                    f"checkpoint {self.folder}: {WEIGHTS} lies beside {INDEX}, which names others; remove one of them"
                )
            found = [path for path in found if path.name in named]
        if lost := [path for path in found if not path.is_file()]:
            raise ModelError(f"checkpoint {lost[0]}: it is a link to a file that is not there; {AGAIN}")
        return found

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return sorted(set(self._file.values()))

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
        return self._dtype[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)
