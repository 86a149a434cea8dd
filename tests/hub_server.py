"""A real server on 127.0.0.1 that speaks enough of the hub's API for huggingface_hub: lists, HEAD, ranges, refusals."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by id: {file: bytes}. `gated` ids answer 401; `cut`: the first GET of a file stops after so many
    bytes and hangs until `close`. Requests are kept as (method, path, Range)."""

    def __init__(self, repositories: dict[str, dict[str, bytes]], gated: tuple[str, ...] = (), cut: int = 0) -> None:
        self.repositories, self.gated, self.cut = repositories, gated, cut
        self.requests: list[tuple[str, str, str]] = []
        self.hanging, self.released = threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.serve(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """One request."""
        path = handler.path.split("?")[0]
        self.requests.append((handler.command, path, handler.headers.get("Range", "")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        repository = found.group(1) if found else ""
        if repository in self.gated:
            return _send(handler, 401, b"{}", {"X-Error-Code": "GatedRepo"})
        if found is None or repository not in self.repositories:
            return _send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        files = self.repositories[repository]
        if api:
            listed = _info(repository, files) if api.group(2) == "revision" else _tree(files)
            return _send(handler, 200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        assert file is not None
        if file.group(3) not in files:
            return _send(handler, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self._file(handler, files[file.group(3)])

    def _file(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        name = blob(data)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"', "Accept-Ranges": "bytes"}
        if len(name) == 64:
            headers |= {"X-Linked-Etag": f'"{name}"', "X-Linked-Size": str(len(data))}
        begin = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if begin:
            start = int(begin.group(1))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return _send(handler, 206, data[start:], headers)
        if self.cut and handler.command == "GET" and len(name) == 64:
            _head(handler, 200, len(data), headers)
            handler.wfile.write(data[: self.cut])
            handler.wfile.flush()
            self.hanging.set()
            self.released.wait()
            handler.close_connection = True
            return None
        return _send(handler, 200, data, headers)


def blob(data: bytes) -> str:
    """A blob's name: SHA-256 of what stands for large files here (safetensors, by length), else git's SHA-1."""
    if len(data) > 10_000:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _lfs(data: bytes, key: str) -> dict[str, Any]:
    return {"lfs": {key: blob(data), "size": len(data), "pointerSize": 134}} if len(data) > 10_000 else {}


def _info(repository: str, files: dict[str, bytes]) -> dict[str, Any]:
    siblings = [{"rfilename": name, "size": len(data), "blobId": blob(data), **_lfs(data, "sha256")}
                for name, data in files.items()]  # fmt: skip
    return {"id": repository, "modelId": repository, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [{"type": "file", "path": name, "size": len(data), "oid": blob(data), **_lfs(data, "oid")}
            for name, data in files.items()]  # fmt: skip


def _head(handler: BaseHTTPRequestHandler, status: int, length: int, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(length)}.items():
        handler.send_header(name, value)
    handler.end_headers()


def _send(handler: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str]) -> None:
    _head(handler, status, len(data), headers)
    if handler.command == "GET":
        handler.wfile.write(data)
