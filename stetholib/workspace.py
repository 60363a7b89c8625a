"""The only place that knows a path: artefacts, records, tables, figures.

An artefact is what a stage made, kept in a folder named by a hash of what made it: the stage's parameters, its
upstream artefacts and its code. It is written beside its place and moved there whole, with a hash of every file, so
that a half-written or altered one is never taken for good: it is set aside and made anew. Tables follow the
contracts below, which other programs rely on.
"""

import ast
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pandas as pd
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from stetholib.errors import UserError
from stetholib.hub import file_hash
from stetholib.models import Checkpoint

T = TypeVar("T")
LOG = logging.getLogger("stetholib")
CHECK = "check"
INDEX = "artefact.json"  # of a stage's folder; it tells how long the stage took, so no two are alike

# file stem -> (key columns, further columns); more columns may follow
CONTRACTS: dict[str, tuple[list[str], list[str]]] = {
    stem: (keys.split(), columns.split())
    for stem, keys, columns in (
        ("01_task_vectors", "layer matrix", "side base_norm delta_norm relative energy_share stable_rank"),
        ("02_sae_features", "layer contrast", "d_sae l0 fvu fvu_random alive top_feature top_specificity"),
        ("03_subspace_projection", "layer matrix basis rank sae_layer gains", "side energy_retained energy_sd chance"),
        (
            "04_layer_selection",
            "layer contrast",
            "score score_random p_value p_max selection_share selected effect_alone effect_left_out",
        ),
        ("04_layer_sets", "selector draw", "contrast layers alpha energy loss_change percentile"),
        (
            "05_minerva_math",
            "variant subject",
            "n correct accuracy stderr math_verify extractable truncated accuracy_given_extractable mean_tokens general_loss",
        ),
        (
            "06_significance",
            "variant subject",
            "n base_accuracy accuracy difference ci_low ci_high z p z_pooled gained lost mcnemar_p mcnemar_p_holm "
            "gain_both_extractable gain_format_bound mde margin verdict",
        ),
        ("06_published", "test", "base_correct edited_correct n z p"),
        ("06_claims", "claim contrast", "statement published measured verdict verdict_strict rule notebook"),
    )
}


class WorkspaceError(UserError):
    """Something on disk is not as it must be; the message is one line."""


@dataclass
class Artefact:
    """What a stage leaves: tensors, tables and plain values; `folder` holds files that other libraries wrote."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    key: str = ""


def source_hash(modules: Iterable[ModuleType]) -> str:
    """Hash of what modules *do*: their syntax trees without docstrings, so that prose changes nothing."""
    digest = hashlib.sha256()
    for module in sorted(set(modules), key=lambda m: m.__name__):
        digest.update(code_text(Path(module.__file__).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


@cache
def code_text(source: str) -> str:
    """A canonical text of Python source: comments, layout and docstrings do not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0] = ast.Pass()
    return ast.dump(tree)


def digest_of(*parts: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def repository() -> Path:
    """The checkout that holds the notebooks, or `STETHOLIB_HOME`, or the working folder."""
    if home := os.environ.get("STETHOLIB_HOME"):
        return Path(home)
    checkout = Path(__file__).parent.parent
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


class Workspace:
    """The folders of one profile."""

    def __init__(self, name: str, root: Path | None = None) -> None:
        """name: the profile's; root: where `runs/` and `figures/` lie, the repository by default."""
        self.root = Path(root) if root else repository()
        self.runs = self.root / "runs" / name
        self.figures = self.root / "figures" / name
        self.store, self.records, self.executed = (self.runs / part for part in ("store", "records", "notebooks"))
        self.written: list[Path] = []

    def cached(self, stage: str, key: str, make: Callable[[Path], Artefact]) -> Artefact:
        """The artefact of a stage under a key: found whole, or made, one process at a time.

        `make(folder)` may leave files of its own in the folder it is given.
        """
        place = self.store / f"{stage}-{key}"
        if (found := self._read(place, key, set_aside=False)) is not None:
            return found
        self.store.mkdir(parents=True, exist_ok=True)
        with FileLock(self.store / f"{stage}-{key}.lock"):
            if (found := self._read(place, key)) is not None:
                return found
            draft = self.store / f".{stage}-{key}.{os.getpid()}"
            for left in self.store.glob(f".{stage}-{key}.*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            draft.mkdir()
            try:
                started = time.monotonic()
                artefact = make(draft)
                _write_artefact(draft, artefact, stage, key, time.monotonic() - started)
                os.replace(draft, place)
                shutil.rmtree(self.unfinished(draft), ignore_errors=True)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return self._read(place, key)

    def unfinished(self, draft: Path) -> Path:
        """A folder beside a stage's draft that outlives a kill, for work that resumes; gone once the stage is done."""
        return draft.with_name(f"unfinished-{draft.stem.removeprefix('.')}")

    def _read(self, place: Path, key: str, set_aside: bool = True) -> Artefact | None:
        """The artefact at a place, or None where there is no whole one; who holds the lock may set a damaged one aside."""
        if not place.is_dir():
            return None
        try:
            index = json.loads((place / INDEX).read_text(encoding="utf-8"))
            if index.pop(CHECK) != digest_of(index):
                raise WorkspaceError(f"{INDEX} was altered")
            for name, expected in index["files"].items():
                if file_hash(place / name) != expected:
                    raise WorkspaceError(f"{name} was altered")
            tables = {n: pd.read_parquet(place / f"{n}.parquet") for n in index["tables"]}
            tensors = Checkpoint(place) if index["tensors"] else {}
            return Artefact(tensors, tables, index["values"], place, key)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not set_aside:
                return None
            aside = place.with_name(f"damaged-{place.name}-{time.time_ns()}")
            os.replace(place, aside)
            LOG.warning("store: %s is damaged (%s); set aside as %s, made anew", place.name, error, aside.name)
            return None

    def table(self, stem: str, table: pd.DataFrame) -> Path:
        """Write a contract's table as `figures/<profile>/<stem>.csv`, checked, sorted by key, floats as %.6g."""
        keys, columns = CONTRACTS[stem]
        if missing := [name for name in keys + columns if name not in table]:
            raise WorkspaceError(f"{stem}.csv: column {missing[0]!r} is missing")
        if table.duplicated(keys).any():
            raise WorkspaceError(
                f"{stem}.csv: two rows share the key {table.loc[table.duplicated(keys), keys].iloc[0].to_dict()}"
            )
        ordered = keys + columns + [name for name in table if name not in keys + columns]
        text = table[ordered].sort_values(keys).to_csv(index=False, float_format="%.6g", lineterminator="\n")
        return self.text(f"{stem}.csv", text)

    def read_table(self, stem: str) -> pd.DataFrame:
        """A contract's table as written; says which notebook makes it where it is not there."""
        path = self.figures / f"{stem}.csv"
        if not path.is_file():
            raise WorkspaceError(f"{path.relative_to(self.root)} is not there yet; run notebook {stem[:2]} first")
        return pd.read_csv(path, keep_default_na=True)

    def text(self, name: str, text: str) -> Path:
        """Write a file into `figures/<profile>/`, whole or not at all."""
        return self.file(name, lambda path: path.write_text(text, encoding="utf-8"))

    def file(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Have `write(path)` make a file of `figures/<profile>/`, whole or not at all."""
        path = self.figures / name
        atomic(path, write)
        self.written.append(path)
        return path


@contextmanager
def held(lock: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file for this process; raises UserError, saying `otherwise`, where another process holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        acquired = FileLock(lock, timeout=0).acquire()
    except Timeout:
        raise UserError(otherwise) from None
    with acquired:
        yield


def atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file beside its place and move it there when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _write_artefact(folder: Path, artefact: Artefact, stage: str, key: str, seconds: float) -> None:
    """Tensors, tables and values of an artefact, and the index that makes it valid."""
    if artefact.tensors:
        save_file({n: t.detach().cpu().contiguous() for n, t in artefact.tensors.items()}, folder / "tensors.safetensors")
    for name, table in artefact.tables.items():
        table.to_parquet(folder / f"{name}.parquet")
    files = {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    index = dict(stage=stage, key=key, files=files, tables=sorted(artefact.tables), tensors=bool(artefact.tensors))
    index |= dict(values=artefact.values, seconds=round(seconds, 3))
    index |= {CHECK: digest_of(json.loads(json.dumps(index)))}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_json(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a ledger, a JSON-lines file with a check sum in each line, and push them to disk: all, or none.

    One write after another from one process. Where the disk is full the file is cut back to what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json_lines({**row, CHECK: digest_of(row)} for row in rows).encode()
    with path.open("ab", buffering=0) as handle:
        before = handle.tell()
        try:
            if before and not _ends_a_line(path):
                text = b"\n" + text
            while text:
                text = text[handle.write(text) :]
            os.fsync(handle.fileno())
        except OSError:
            handle.truncate(before)
            raise


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read() == b"\n"


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a ledger; lines that were cut short or altered are left out, with a warning that names them."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            if row.pop(CHECK) != digest_of(row):
                raise ValueError("altered")
        except (ValueError, KeyError, AttributeError, TypeError):
            if line.strip():
                LOG.warning("%s: line %d is damaged; what it held is made anew", path.name, number)
            continue
        yield row


@contextmanager
def progress_file() -> Iterator[Any]:
    """Where progress goes: the file that `make reproduce` follows, or None for the notebook's own bar."""
    name = os.environ.get("STETHOLIB_PROGRESS")
    if not name:
        yield None
        return
    with open(name, "a", encoding="utf-8") as handle:
        yield handle


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with progress and a time estimate: a bar in a notebook, sparse lines in a log."""
    if total is None:
        total = len(items)  # type: ignore[arg-type]
    with progress_file() as log:
        if log is None:
            from tqdm.auto import tqdm

            yield from tqdm(items, desc=label, total=total, leave=False, file=sys.stderr)
            return
        started = said = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if done and now - said > 5:
                left = (now - started) / done * (total - done)
                log.write(f"  {label}: {done}/{total}, {now - started:.0f} s, about {left:.0f} s left\n")
                log.flush()
                said = now
            yield item
