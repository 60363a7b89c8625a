"""The Hub: fetch into the cache, work from it without a network, and say in one line what stands in the way.

Everything goes through huggingface_hub, which resumes broken downloads and never leaves a half file under its name."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stetholib.errors import UserError
from stetholib.store.files import INDEX, file_hash

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # plain downloads resume where they broke off, which is proved in the tests
GIB = 2**30
HASH = re.compile("[0-9a-f]{64}")
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AGAIN = "fetch or save it again"
WEIGHTS = (".safetensors", ".parquet", ".npz")
MODEL_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")


class HubError(UserError):
    """What stands between this machine and a repository of the Hub; the message is one line."""


def snapshot(repo: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES, kind: str = "model") -> Path:
    """The folder of a repository's files that match the patterns, fetched where they are not in the cache yet; kind: `model`
    or `dataset`. Raises HubError before anything is fetched where the disk is too small, and where the Hub refuses."""
    from huggingface_hub import snapshot_download

    with explained(repo, revision, kind):
        if (folder := cached_folder(repo, revision, files, kind)) is not None:
            return folder
        check_space(repo, *to_fetch(repo, revision, files, kind)[:1])
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files), repo_type=kind))


def cached_folder(repo: str, revision: str | None, files: Sequence[str], kind: str) -> Path | None:
    """The cache's folder of a repository, where all files that match are in it; None otherwise."""
    from huggingface_hub import snapshot_download

    with suppress(FileNotFoundError):
        found = snapshot_download(repo, revision=revision, allow_patterns=list(files), repo_type=kind, local_files_only=True)
        return None if missing_files(Path(found), files) else Path(found)
    return None


def missing_files(folder: Path, files: Sequence[str] = ()) -> list[str]:
    """Weight or table files that a folder should hold and does not, by its index and by names like `-00001-of-00003`.
    files: patterns of what is asked for, each of a table or of a whole folder with a file at least; by default all there is.
    The cache alone cannot tell: a folder may be there because one small file of it was fetched."""
    found = (path for pattern in files or ("*.safetensors", "**/*.parquet") for path in folder.glob(pattern))
    present = {path.name for path in found if path.suffix in WEIGHTS}
    wanted = set[str]().union(*map(named_by, folder.glob("*.safetensors.index.json")))
    for name in present:
        if shard := SHARD.search(name):
            first, count = int(name.endswith(".safetensors")), int(shard[1])  # weights count from one, tables from nought
            wanted |= {SHARD.sub(f"-{part:05d}-of-{count:05d}.", name) for part in range(first, count + first)}
    large = [pattern for pattern in files if pattern.endswith((".parquet", "/*"))]
    unmatched = [pattern for pattern in large if not any(path.suffix in WEIGHTS for path in folder.glob(pattern))]
    return sorted(wanted - present) or unmatched or ([] if present else ["*.safetensors or *.parquet"])


def named_by(index: Path) -> set[str]:
    """The weight files that an index names. Raises HubError where it is none."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        said = json.loads(index.read_text(encoding="utf-8"))
        names = set(said["weight_map"].values())
        if names and all(isinstance(name, str) for name in names) and isinstance(said["metadata"], dict):
            return names
    raise HubError(f"{index}: it is no index of weights (JSON with metadata and a weight_map of file names); {AGAIN}")


def resolved(repo: str, revision: str | None) -> str | None:
    """The commit that the cache has of a branch or tag of a model's repository, `main` by default; a commit stands for itself."""
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "refs", revision or "main")
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision


def to_fetch(repo: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES, kind: str = "model") -> tuple[int, int]:
    """(bytes still to be fetched, bytes in all) of a repository's files that match; asks the Hub for their sizes."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        found: list[Any] = snapshot_download(repo, revision=revision, allow_patterns=list(files), repo_type=kind, dry_run=True)
    except DryRunError:
        HfApi().repo_info(repo, revision=revision, repo_type=kind)  # says what the dry run keeps to itself
        raise
    return sum(f.file_size for f in found if f.will_download), sum(f.file_size for f in found)


def file(repo: str, name: str, revision: str | None = None) -> Path:
    """One file of a repository, from the cache or the Hub."""
    from huggingface_hub import hf_hub_download

    with explained(repo, revision):
        try:
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=True))
        except FileNotFoundError:
            check_network(repo)
            check_space(repo, file_size(repo, name, revision))
            return Path(hf_hub_download(repo, name, revision=revision))


def file_size(repo: str, name: str, revision: str | None) -> int:
    """Bytes of one file. Raises where this token may not have it, though a gated repository shows its list of sizes to all."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    return get_hf_file_metadata(hf_hub_url(repo, name, revision=revision)).size or 0


def checked_hash(path: Path) -> str:
    """SHA-256 of a file; one of the Hub's cache that is named by its own must have it. Raises HubError where it has not."""
    real = path.resolve()
    found = file_hash(real)
    if HASH.fullmatch(real.name) and found != real.name:
        raise HubError(f"{path}: its bytes are not those that the Hub gave; delete {real} and run again")
    return found


def files_key(folder: Path, *patterns: str) -> list[str]:
    """`name sha256` of a folder's files that match, sorted. Raises HubError where one of the Hub's cache was altered."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return [f"{path.name} {checked_hash(path)}" for path in sorted(found) if path.name != INDEX]


def full_disk(said: str) -> bool:
    """Whether a library's words mean a full disk; safetensors writes `os error 28` where Python says `[Errno 28]`."""
    return any(f"[Errno {number}]" in said or f"os error {number})" in said for number in DISK_FULL)


def check_network(repo: str) -> None:
    """Refuse at once where the Hub does not answer; its client would try again for half a minute."""
    from huggingface_hub import get_session
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        get_session().get(ENDPOINT, timeout=10)
    except OfflineModeIsEnabled:
        raise HubError(_offline(repo)) from None
    except HTTPError as error:
        raise HubError(
            f"{repo} is not in the cache and the Hub cannot be reached at {ENDPOINT} ({_first_line(error)}); connect to the network"
        ) from None


def check_space(repo: str, wanted: int) -> None:
    """Refuse to begin a download that the cache's disk cannot hold."""
    place = cache_place()
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise HubError(
            f"{repo}: {wanted / GIB:.1f} GiB are to be fetched into {place} but {free / GIB:.1f} GiB are free; "
            f"free {(wanted - free) / GIB:.1f} GiB, or set HF_HOME to a larger disk"
        )


def cache_place() -> Path:
    """The folder of the Hub's cache, or the nearest one above it that is there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(HF_HUB_CACHE)  # os.path's below, since Path's own raises where it may not look
    return next(place for place in (path, *path.parents) if os.path.exists(place))


@contextmanager
def explained(repo: str, revision: str | None = None, kind: str = "model") -> Iterator[None]:
    """Turn what the Hub and the disk say into one line with the page to visit or the space to free."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    from huggingface_hub import errors, get_token

    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubError(_offline(repo)) from None
    except errors.GatedRepoError:
        if get_token() is None:
            raise HubError(
                f"{repo} is gated and there is no Hugging Face token; accept its licence at {page}, then run `hf auth login` "
                "or set HF_TOKEN"
            ) from None
        raise HubError(f"{repo} is gated and this token's account has not accepted its licence; do so at {page}") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repo} has no revision {revision!r}; see {page}/commits/main") from None
    except errors.RepositoryNotFoundError:
        raise HubError(f"{repo} is not on the Hub, or this token may not see it; see {page}") from None
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(f"{repo} lacks a file: {_first_line(error)}") from None
    except (errors.LocalEntryNotFoundError, errors.HTTPError, errors.DryRunError) as error:
        raise HubError(
            f"{repo} is not whole in the cache and the Hub cannot be reached ({_first_line(error)}); "
            "connect to the network and run the same command again: what was fetched is kept"
        ) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise HubError(f"{repo}: the disk is full; free some space or set HF_HOME to a larger disk, then run again") from None


def _offline(repo: str) -> str:
    return f"{repo} is not whole in the cache and HF_HUB_OFFLINE is set; unset it to fetch what is missing"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:160]
