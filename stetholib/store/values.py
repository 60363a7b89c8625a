"""Values as keys and as files: who a value is, and how what a stage returns is laid down and read back.

Plain data is its own identity. What has none (a model, a lambda) is a TypeError, never a repr; an `Input` says who it is.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from torch import Tensor

from stetholib.store.code import PACKAGE, code_of

K = TypeVar("K")
T = TypeVar("T")
PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Input(Generic[T]):
    """A heavy input: who it is is known at once (a hash of what it is made of); it is opened only when a stage must run."""

    identity: str
    opened: Callable[[], AbstractContextManager[T]]

    @classmethod
    def of(cls, identity: str, fetch: Callable[[], T]) -> "Input[T]":
        """An input that needs no closing."""
        return cls(identity, lambda: nullcontext(fetch()))


def hashed(value: Any) -> str:
    """A short hash of a value's identity."""
    return hashlib.sha256(json.dumps(identity_of(value)).encode()).hexdigest()[:16]


def identity_of(value: Any) -> Any:
    """Who a value is, in plain JSON. Raises TypeError for what has no identity."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return ["list", *map(identity_of, value)]
    if isinstance(value, Mapping):
        return ["mapping", *([identity_of(key), identity_of(one)] for key, one in value.items())]
    if isinstance(value, Tensor):
        data = value.detach().cpu().reshape(-1).contiguous()
        return ["tensor", str(value.dtype), list(value.shape), _sha(data.view(torch.uint8).numpy().tobytes())]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return ["array", str(value.dtype), list(value.shape), _sha(np.ascontiguousarray(value).tobytes())]
    if isinstance(value, pd.DataFrame):
        rows = pd.util.hash_pandas_object(value, index=True).to_numpy()
        return ["table", *map(str, value.columns), *map(str, value.dtypes), _sha(rows.tobytes())]
    if isinstance(value, FunctionType):
        return ["function", f"{value.__module__}.{value.__qualname__}", code_of(value)]
    if hasattr(value, "identity") and not isinstance(value, type):
        return ["input", value.identity]
    if is_dataclass(value) and not isinstance(value, type):
        parts = [[f.name, identity_of(getattr(value, f.name))] for f in fields(value)]
        return ["object", _name(type(value)), code_of(type(value)), *parts]
    raise TypeError(f"{type(value).__name__} has no identity: give plain data, a function of a module, or an Input")


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


class Lazy(Mapping[K, T]):
    """A mapping whose values are computed, or read from disk, each time they are asked for."""

    def __init__(self, keys: Iterable[K], value: Callable[[K], T]) -> None:
        """keys: all of them, in order; value: gives that of one key."""
        self._keys, self._value = dict.fromkeys(keys), value

    def __getitem__(self, where: K) -> T:
        if where not in self._keys:
            raise KeyError(where)
        return self._value(where)

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def packed(value: Any, tensors: dict[str, Tensor], tables: dict[str, pd.DataFrame], place: str = "value") -> Any:
    """Lay a value down: tensors and tables are put aside under their place in it, the rest is returned as plain JSON."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        tensors[place] = torch.as_tensor(value).detach().cpu().contiguous()
        return {"tensor" if isinstance(value, Tensor) else "array": place}
    if isinstance(value, pd.DataFrame):
        tables[place] = value
        return {"table": place}
    if isinstance(value, list | tuple):
        inner = [packed(one, tensors, tables, f"{place}.{i}") for i, one in enumerate(value)]
        return {"tuple": inner} if isinstance(value, tuple) else inner
    if isinstance(value, Mapping):
        return {"mapping": [[packed(k, {}, {}), packed(one, tensors, tables, f"{place}.{k}")] for k, one in value.items()]}
    if is_dataclass(value) and not isinstance(value, type) and type(value).__module__.partition(".")[0] == PACKAGE:
        parts = {f.name: packed(getattr(value, f.name), tensors, tables, f"{place}.{f.name}") for f in fields(value)}
        return {"object": _name(type(value)), "fields": parts}
    raise TypeError(f"a stage cannot return {type(value).__name__}: give plain data, tensors, tables or dataclasses of them")


def unpacked(node: Any, folder: Path) -> Any:
    """A value as it was laid down; tables and tensors are read now, and belong to the caller."""
    if isinstance(node, PLAIN):
        return node
    if isinstance(node, list):
        return [unpacked(one, folder) for one in node]
    if "tuple" in node:
        return tuple(unpacked(one, folder) for one in node["tuple"])
    if "table" in node:
        return pd.read_parquet(folder / f"{node['table']}.parquet")
    if "mapping" in node:
        pairs = {unpacked(key, folder): one for key, one in node["mapping"]}
        found = Lazy(pairs, lambda key: unpacked(pairs[key], folder))
        return found if _heavy(node) else dict(found)
    if "object" in node:
        module, _, name = node["object"].partition(":")
        kind = getattr(importlib.import_module(module), name)
        return kind(**{field: unpacked(one, folder) for field, one in node["fields"].items()})
    with safe_open(folder / "tensors.safetensors", framework="pt") as handle:
        found = handle.get_tensor(node.get("tensor") or node["array"])
    return found if "tensor" in node else found.numpy()


def _heavy(node: Any) -> bool:
    """Whether tensors stand somewhere below."""
    if isinstance(node, dict):
        return "tensor" in node or any(map(_heavy, node.values()))
    return isinstance(node, list) and any(map(_heavy, node))
