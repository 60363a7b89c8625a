"""Artefacts: what a stage made, under a key that is what the stage was given.

    store.made(score_layers, sums, corpus_of, rule, 4)      # from this process, from the disk, or made now

A stage is a plain function. It can read only what it is handed, and what it is handed is its key: plain data by value,
a heavy input by the hash of its content, so that an input made anew with the same result disturbs nobody. An artefact
is written beside its place and moved there whole, with a hash of every file: one that is half written or altered is
never taken for good, but set aside and made anew. Nothing is unpickled.
"""

import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from stetholib.store.code import code_of
from stetholib.store.files import CHECK, INDEX, LOG, append_json, digest_of, file_hash, read_json_lines
from stetholib.store.progress import libraries_quiet, progress
from stetholib.store.values import Input, hashed, packed, unpacked


@dataclass(frozen=True)
class Artefact:
    """What a stage left. `identity` is a hash of its content; `folder` holds the files that other libraries wrote."""

    name: str
    folder: Path
    identity: str
    _node: Any

    @property
    def value(self) -> Any:
        """What the stage returned, read anew: it belongs to the caller."""
        return unpacked(self._node, self.folder)

    @property
    def files(self) -> Input[Path]:
        """Its folder, as an input of another stage."""
        return Input.of(self.identity, lambda: self.folder)


@dataclass
class Ledger:
    """Rows that are only ever added, each on disk as soon as it is known: a stage in small parts."""

    path: Path
    identity: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows: all of them, or none."""
        new = [dict(row) for row in rows]
        append_json(self.path, new)
        self.rows += new


class Store:
    """A folder of artefacts."""

    def __init__(self, folder: Path, conditions: Any = ()) -> None:
        """conditions: what every result depends on besides its code and inputs: device, threads, library versions."""
        self.folder, self.conditions = folder, conditions
        self._memo: dict[str, Artefact] = {}
        self._derived: dict[str, Any] = {}

    def key(self, function: Callable[..., Any], *inputs: Any) -> str:
        """The name of the function, its code, every input by identity, and the conditions."""
        name = f"{function.__module__}.{function.__qualname__}"
        return hashed([name, code_of(function), self.conditions, list(inputs)])

    def made(self, function: Callable[..., Any], /, *inputs: Any) -> Artefact:
        """`function(*inputs)`: from this process, the disk, or made now by one process. It may ask by keyword only for `folder`,
        for files of its own, `unfinished`, a folder that outlives a kill, and `watch(items, label)`, which reports progress."""
        key = self.key(function, *inputs)
        if key not in self._memo:
            self._memo[key] = self._found_or_made(function, inputs, key)
        return self._memo[key]

    def derived(self, function: Callable[..., Any], /, *inputs: Any) -> Input[Any]:
        """`function(*inputs)` as an input of others: computed when it is first opened, held by this process only."""
        key = self.key(function, *inputs)

        def value() -> Any:
            if key not in self._derived:
                self._derived[key] = _run(function, inputs)
            return self._derived[key]

        return Input.of(key, value)

    def ledger(self, name: str, function: Callable[..., Any], /, *inputs: Any, part: str = "", parts: str = "") -> Ledger:
        """The rows that `function(*inputs, ...)` gave so far; `part` writes a file of one's own, `parts` matches all."""
        key = self.key(function, *inputs)
        path = self.folder / f"{name}-{key}{part}.jsonl"
        files = sorted(self.folder.glob(f"{name}-{key}{parts}.jsonl"))
        return Ledger(path, key, [row for file in files for row in read_json_lines(file)])

    def _found_or_made(self, function: Callable[..., Any], inputs: tuple[Any, ...], key: str) -> Artefact:
        name = f"{function.__name__}-{key}"
        if (found := self._read(name, set_aside=False)) is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f"{name}.lock"):
            if (found := self._read(name)) is not None:
                return found
            draft, unfinished = self.folder / f".{name}.{os.getpid()}", self.folder / f"unfinished-{name}"
            for left in self.folder.glob(f".{name}.*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            draft.mkdir()
            try:
                started = time.monotonic()
                value = _run(function, inputs, folder=draft, unfinished=unfinished)
                _write(draft, value, function.__name__, key, time.monotonic() - started)
                os.replace(draft, self.folder / name)
                shutil.rmtree(unfinished, ignore_errors=True)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        found = self._read(name)
        if found is None:
            raise RuntimeError(f"store: {name} was altered while it was being written")
        return found

    def _read(self, name: str, set_aside: bool = True) -> Artefact | None:
        """The artefact of a name, or None where there is no whole one; who holds the lock may set a damaged one aside."""
        place = self.folder / name
        if not place.is_dir():
            return None
        try:
            index = json.loads((place / INDEX).read_text(encoding="utf-8"))
            if index.pop(CHECK) != digest_of(index):
                raise ValueError(f"{INDEX} was altered")
            for file, expected in index["files"].items():
                if file_hash(place / file) != expected:
                    raise ValueError(f"{file} was altered")
            return Artefact(name, place, digest_of(index["files"], index["value"]), index["value"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not set_aside:
                return None
            aside = place.with_name(f"damaged-{place.name}-{time.time_ns()}")
            os.replace(place, aside)
            LOG.warning("store: %s is damaged (%s); set aside as %s, made anew", place.name, error, aside.name)
            return None


def _run(function: Callable[..., Any], inputs: tuple[Any, ...], **folders: Path) -> Any:
    """The function on its opened inputs, and what it asks for by keyword only, none of which is part of a key."""
    asked = inspect.signature(function).parameters.values()
    named = {one.name for one in asked if one.kind is inspect.Parameter.KEYWORD_ONLY}
    given = {name: value for name, value in {**folders, "watch": progress}.items() if name in named}
    with libraries_quiet(), ExitStack() as stack:
        opened = [stack.enter_context(one.opened()) if isinstance(one, Input) else one for one in inputs]
        return function(*(one.value if isinstance(one, Artefact) else one for one in opened), **given)


def _write(folder: Path, value: Any, stage: str, key: str, seconds: float) -> None:
    """Tensors, tables and plain values of what a stage returned, and the index that makes it valid."""
    tensors: dict[str, Tensor] = {}
    tables: dict[str, pd.DataFrame] = {}
    node = packed(value, tensors, tables)
    if tensors:
        save_file(tensors, folder / "tensors.safetensors")
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
    files = {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    index = dict(stage=stage, key=key, files=files, value=node, seconds=round(seconds, 3))
    index |= {CHECK: digest_of(json.loads(json.dumps(index)))}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
