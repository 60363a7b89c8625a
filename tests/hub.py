"""A Hub on loopback: enough of the Hub's protocol for huggingface_hub and datasets, serving fabricated repositories.

HEAD and GET with Range, ETag and commit hash; model and dataset info, trees and path infos; gated repositories
(401 without a token, 403 without the licence), unknown revisions, and connections that break in the middle of a file.
"""

import json
import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

LICENSED = "hf_licensed"
RESOLVE = re.compile(r"^/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")
API = re.compile(r"^/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info|treesize)/([^/]+)(?:/(.*))?)?$")


@dataclass
class Repository:
    """Files by name at one commit; `gated` asks for the token whose account accepted the licence."""

    files: Mapping[str, bytes]
    gated: bool = False
    revision: str | None = None

    @property
    def commit(self) -> str:
        """The commit that is pinned elsewhere, or a hash of the content."""
        return (
            self.revision
            or sha1(b"".join(name.encode() + sha256(body).digest() for name, body in sorted(self.files.items()))).hexdigest()
        )


@dataclass
class Hub:
    """The server with what it serves; `break_after` cuts the next so many connections after that many bytes."""

    repositories: dict[str, Repository]
    breaks: list[int] = field(default_factory=list)
    served: list[tuple[str, str, int]] = field(default_factory=list)
    connections: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # kept alive by clients, they would be answered still
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(length)
        try:
            sent = json.loads(raw)
        except ValueError:
            sent = parse_qs(raw.decode())
        self._answer(body=True, sent=sent)

    def _answer(self, body: bool, sent: Mapping | None = None) -> None:
        path = unquote(urlparse(self.path).path)
        if match := RESOLVE.match(path):
            return self._file(*match.groups()[1:], body=body)
        if match := API.match(path):
            return self._api(match, sent or {})
        return self._refuse(404, "EntryNotFound")

    def _repository(self, name: str, revision: str | None, open_to_all: bool = False) -> Repository | None:
        """The repository, or None after the refusal was sent; what a gated one contains is no secret, its files are."""
        known = self.hub.repositories.get(name)
        if known is None:
            return self._refuse(401, "RepoNotFound")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if known.gated and not open_to_all and token != LICENSED:
            return self._refuse(403 if token else 401, "GatedRepo")
        if revision not in (None, "main", known.commit):
            return self._refuse(404, "RevisionNotFound")
        return known

    def _file(self, name: str, revision: str, file: str, body: bool) -> None:
        known = self._repository(name, revision)
        if known is None:
            return
        if file not in known.files:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": known.commit})
        content = known.files[file]
        start, stop = 0, len(content)
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(wanted[1]), min(stop, int(wanted[2]) + 1 if wanted[2] else stop)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", known.commit)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if not body:
            return
        if self.hub.breaks and stop - start > self.hub.breaks[0]:
            cut = self.hub.breaks.pop(0)
            self.wfile.write(content[start : start + cut])
            self.hub.served.append((name, file, cut))
            self.close_connection = True
            self.connection.close()
            return
        with suppress(ConnectionError):
            self.wfile.write(content[start:stop])
        self.hub.served.append((name, file, stop - start))

    def _api(self, match: re.Match, sent: Mapping) -> None:
        _, name, what, revision, below = match.groups()
        known = self._repository(name, revision, open_to_all=True)
        if known is None:
            return
        entries = [self._entry(file, body) for file, body in sorted(known.files.items())]
        if what == "paths-info":
            paths = sent.get("paths", [])
            folders = {p for p in paths if any(file.startswith(f"{p}/") for file in known.files)}
            found = [e for e in entries if e["path"] in paths]
            found += [dict(type="directory", path=p, oid="0" * 40, size=0) for p in sorted(folders)]
            return self._json(found)
        if what == "tree":
            return self._json(self._tree(entries, (below or "").strip("/")))
        info = dict(
            id=name,
            modelId=name,
            sha=known.commit,
            private=False,
            gated="manual" if known.gated else False,
            disabled=False,
            tags=[],
        )
        info |= dict(siblings=[dict(rfilename=e["path"], size=e["size"]) for e in entries], downloads=0, likes=0)
        return self._json(info | dict(lastModified="2025-01-01T00:00:00.000Z", createdAt="2025-01-01T00:00:00.000Z"))

    def _tree(self, entries: list[dict], below: str) -> list[dict]:
        recursive = parse_qs(urlparse(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        inside = [e for e in entries if not below or e["path"].startswith(f"{below}/")]
        if recursive:
            return inside
        depth = len(below.split("/")) if below else 0
        folders = {"/".join(e["path"].split("/")[: depth + 1]) for e in inside if e["path"].count("/") > depth}
        files = [e for e in inside if e["path"].count("/") == depth]
        return files + [dict(type="directory", path=p, oid="0" * 40, size=0) for p in sorted(folders)]

    @staticmethod
    def _entry(file: str, body: bytes) -> dict:
        return dict(type="file", path=file, size=len(body), oid=sha256(body).hexdigest())

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(dict(error=code)).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
