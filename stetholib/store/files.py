"""Files: whole or not at all, hashed, locked, and ledgers that lose no line."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stetholib.errors import UserError

LOG = logging.getLogger("stetholib")
CHECK = "check"
INDEX = "artefact.json"  # of a stage's folder; it tells how long the stage took, so no two are alike


def digest_of(*parts: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def repository() -> Path:
    """The checkout that holds the notebooks, or `STETHOLIB_HOME`, or the working folder."""
    if home := os.environ.get("STETHOLIB_HOME"):
        return Path(home)
    checkout = Path(__file__).parents[2]
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


def held(lock: Path, otherwise: str) -> AbstractContextManager[Any]:
    """Take a lock file, which `with` lets go of; raises UserError, saying `otherwise`, where another process holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(lock, timeout=0).acquire()
    except Timeout:
        raise UserError(otherwise) from None


def atomic(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` make a file beside its place and move it there when it is whole; returns the place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(draft)
        os.replace(draft, path)
        return path
    finally:
        draft.unlink(missing_ok=True)


def json_lines(rows: Iterable[Mapping[Any, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_json(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a ledger, a JSON-lines file with a check sum in each line, and push them to disk: all, or none.
    Where the disk is full the file is cut back to what it was. One process writes to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json_lines({**row, CHECK: digest_of(row)} for row in rows).encode()
    with path.open("a+b", buffering=0) as handle:
        before = handle.tell()
        try:
            if before:
                handle.seek(-1, os.SEEK_END)
                text = text if handle.read() == b"\n" else b"\n" + text
            while text:
                text = text[handle.write(text) :]
            os.fsync(handle.fileno())
        except OSError:
            handle.truncate(before)
            raise


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
