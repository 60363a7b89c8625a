"""A model that leaves: the base's own files with an edit in them, or the added tensors alone, whole or not at all.

Files are copied as they are and only the bytes of edited matrices are replaced, one matrix at a time, so shards, names, dtypes
and metadata stay the base's. An edited matrix is what `editing.edited` makes of it, (base.float() + alpha * delta).to(dtype).
A safetensors file is 8 bytes of length, little-endian, a JSON header of so many bytes, and the data."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from stetholib.data.hub import GIB, MODEL_FILES
from stetholib.editing import Edit, Lazy
from stetholib.errors import UserError
from stetholib.models.weights import Checkpoint, ModelError, weight_names
from stetholib.store.files import INDEX

PROVENANCE, CARD, RECIPE, DELTA = "provenance.json", "README.md", "recipe.yaml", "delta.safetensors"
FILES = (*MODEL_FILES, "vocab*", "merges.txt", "LICENSE*", "NOTICE*")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a safetensors file, each with dtype, shape and data_offsets, and the byte at which the data begin."""
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        tensors = json.loads(handle.read(size))
    tensors.pop("__metadata__", None)
    return tensors, 8 + size


def dtypes(base: Path) -> set[str]:
    """The dtypes of a checkpoint's tensors, as PyTorch names them."""
    checkpoint = Checkpoint(base)
    return {DTYPES.get(dtype, dtype) for dtype in map(checkpoint.dtype, checkpoint)}


def files_of(base: Path) -> list[Path]:
    """The files that make a model: weights, configuration, tokenizer, chat template, index, licence."""
    found = {path for pattern in FILES for path in base.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in (PROVENANCE, CARD, RECIPE, INDEX))


def added(base: Path, edit: Edit) -> Mapping[str, Any]:
    """alpha * delta in float32 by the base's name of the matrix, each computed when it is asked for. Raises ModelError where the
    base lacks a matrix, and, once that is asked for, where it has another shape there or is not stored as floats."""
    checkpoint, deltas = Checkpoint(base), {} if edit.is_empty else edit.vector.restrict(edit.layers, edit.matrices).deltas
    names = weight_names(checkpoint)
    if absent := [where for where in deltas if where not in names]:
        raise ModelError(f"export: the base has no {absent[0][1]} in layer {absent[0][0]}")
    keys = {names[where]: where for where in deltas}

    def one(name: str) -> Tensor:
        delta, shape, dtype = deltas[keys[name]].cpu(), checkpoint.shape(name), checkpoint.dtype(name)
        if tuple(delta.shape) != shape or dtype not in DTYPES:
            said = f"{list(shape)} {dtype} in the base; the edit needs {list(delta.shape)} and {' or '.join(DTYPES)}"
            raise ModelError(f"export: {name} is {said}")
        return edit.scaled(delta)

    return Lazy(keys, one)


def write_model(base: Path, edit: Edit, into: Path) -> None:
    """Write the edited model into a folder: every file of the base, with the bytes of edited matrices replaced."""
    deltas, checkpoint = added(base, edit), Checkpoint(base)
    for path in files_of(base):
        shutil.copyfile(path, into / path.name)
    for path in (into / one.name for one in checkpoint.files):
        tensors, start = header(path)
        with path.open("r+b") as handle:
            for name in sorted({*deltas} & {*tensors}):
                before = checkpoint[name]
                handle.seek(start + tensors[name]["data_offsets"][0])
                handle.write(_bytes(before.float().add_(deltas[name]).to(before.dtype)))


def write_delta(base: Path, edit: Edit, into: Path) -> None:
    """Write the added tensors alone, in float32: added to the base in float32 and rounded once, they give the edited model's
    bits; rounded to a narrower dtype beforehand they would not."""
    deltas, checkpoint = added(base, edit), Checkpoint(base)
    tensors: dict[str, Any] = {}
    end = 0
    for name in deltas:
        shape = checkpoint.shape(name)
        begin, end = end, end + 4 * prod(shape)
        tensors[name] = dict(dtype="F32", shape=shape, data_offsets=(begin, end))
    head = json.dumps({"__metadata__": {"format": "pt"}} | tensors).encode()
    head += b" " * (-len(head) % 8)
    with (into / DELTA).open("wb") as handle:
        handle.write(len(head).to_bytes(8, "little") + head)
        for name in deltas:
            handle.write(_bytes(deltas[name]))


def bytes_wanted(base: Path, edit: Edit, delta: bool) -> int:
    """How many bytes either of the above will write."""
    if delta:
        return sum(4 * prod(shape) for shape in map(Checkpoint(base).shape, added(base, edit)))
    return sum(path.stat().st_size for path in files_of(base))


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy().data


def recipe(base: str, finetuned: str, layers: Iterable[int], alpha: float, dtype: str) -> str:
    """The same model as a recipe of mergekit, whose filters are parts of a tensor's name and the first that fits counts:
    task arithmetic of the raw vector with weight alpha in the matrices of some layers and 0 elsewhere.

    base, finetuned: folders or Hub ids with their revision; dtype: of the base's tensors. Without a tokenizer_source
    mergekit copies the base's tokenizer, and keeps rows of the embedding that no token has."""
    weight: list[dict[str, Any]] = [dict(filter=word, value=0.0) for word in ("norm", ".bias")]
    weight += [dict(filter=f"model.layers.{layer}.", value=float(alpha)) for layer in layers] + [dict(value=0.0)]
    models = [dict(model=base), dict(model=finetuned, parameters=dict(weight=weight))]
    config = dict(merge_method="task_arithmetic", base_model=base, models=models, dtype="float32", out_dtype=dtype)
    return "# mergekit-yaml recipe.yaml FOLDER\n" + yaml.safe_dump(config, sort_keys=False)


def check_place(into: Path) -> None:
    """Refuse a place that holds anything but an earlier export: a file, or a folder with a file that no export wrote."""
    if into.is_file():
        raise UserError(f"export: {into} is a file; give a folder that is new, or an earlier export")
    held = {path.name for path in into.iterdir()} if into.exists() else set()
    known: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = {*json.loads((into / PROVENANCE).read_text(encoding="utf-8"))["written"], PROVENANCE}
    if odd := sorted(held - known):
        raise UserError(f"export: {into} holds {odd[0]}, which no export wrote; move it away, or give another folder")


@contextmanager
def whole(into: Path, wanted: int) -> Iterator[Path]:
    """A draft folder beside `into`, which takes its place when the block ends well and is removed when it does not.

    wanted: bytes that will be written. Raises UserError, before anything is written, where the place holds something else or
    its disk too little room. What a kill left is mended by the next call."""
    into = into.resolve()
    draft, old = (into.with_name(f".{into.name}.export-{part}") for part in ("draft", "old"))

    def settle() -> None:
        if old.exists() and not into.exists():
            old.rename(into)
        for left in (draft, old):
            shutil.rmtree(left, ignore_errors=True)

    check_place(into)
    settle()
    place = next(parent for parent in into.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if wanted > free:
        needed = f"{wanted / GIB:.2f} GiB are to be written and {free / GIB:.2f} GiB are free in {place}"
        raise UserError(f"export: {needed}; free some space, or give a folder on a larger disk")
    draft.mkdir(parents=True)
    try:
        yield draft
        if into.exists():
            into.rename(old)
        draft.rename(into)
    finally:
        settle()
