"""A Hugging Face hub on loopback: the endpoints that listing and downloading a snapshot need, over real HTTP."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>[^/?]+)")
_API_MAIN = re.compile(r"/api/models/(?P<repo>[^/]+/[^/?]+)(\?|$)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class FakeRepo:
    files: dict[str, bytes]
    refusal: tuple[int, str] | None = None
    """(HTTP status, X-Error-Code) given instead of any answer."""
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode(), usedforsecurity=False).hexdigest()

    def knows(self, revision: str) -> bool:
        return revision in {"main", self.commit, *self.tags}


@dataclass
class FakeHub:
    repos: dict[str, FakeRepo]
    endpoint: str = ""
    served: list[str] = field(default_factory=list)
    """Names of the files whose contents were sent, in order."""


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0: a kept-alive connection would go on answering after the server is closed.
    protocol_version = "HTTP/1.0"
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, *, send_body: bool) -> None:
        match = _API.match(self.path) or _FILE.match(self.path) or _API_MAIN.match(self.path)
        if match is None:
            return self._send(404, b"", {})
        parts = match.groupdict()
        repo = self.hub.repos.get(parts["repo"])
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        if repo.refusal is not None:
            return self._refuse(*repo.refusal)
        if not repo.knows(parts.get("revision", "main")):
            return self._refuse(404, "RevisionNotFound")
        if "file" in parts:
            return self._file(repo, parts["file"], send_body)
        self._send(200, json.dumps(_tree(repo) if parts.get("what") == "tree" else _info(repo)).encode(), {})

    def _file(self, repo: FakeRepo, name: str, send_body: bool) -> None:
        content = repo.files.get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        if send_body:
            self.hub.served.append(name)
        headers = {"ETag": f'"{_blob_id(content)}"', "X-Repo-Commit": repo.commit}
        self._send(200, content, headers, send_body=send_body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, send_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body and self.command != "HEAD":
            self.wfile.write(body)


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _info(repo: FakeRepo) -> dict[str, object]:
    siblings = [{"rfilename": name, "size": len(body), "blobId": _blob_id(body)} for name, body in repo.files.items()]
    return {"id": "fake", "sha": repo.commit, "siblings": siblings}


def _tree(repo: FakeRepo) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": name, "size": len(body), "oid": _blob_id(body)} for name, body in repo.files.items()
    ]


@contextmanager
def running_hub(repos: dict[str, FakeRepo]) -> Iterator[FakeHub]:
    """Serve `repos` ("org/name" -> repository) while the context is open."""
    hub = FakeHub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
