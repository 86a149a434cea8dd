"""What the demo's server lets in, before Gradio sees it: its own page, and the addresses that this needs.

- A request must name this machine as its host (against DNS rebinding: a foreign name that leads to 127.0.0.1), and one
  that a page sends must come from the demo's own page (against foreign pages that post to it).
- Of Gradio's addresses only those that the page uses answer. Its proxy, its programming interfaces, its monitoring and
  its links to remote files do not.
- A file is given out only if it is an export, from the folder of those that a page was offered.
- The browser is told to load nothing from anywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LOCAL = "127.0.0.1"
HOSTS = frozenset({LOCAL, "localhost", "[::1]"})
_API = "/gradio_api"
_FILE = f"{_API}/file="
OFFERED = re.compile(r"(content_logs|impact)_[\w.-]+\.(json|csv)")  # what exports.py writes; uploads are not given out
ALLOWED = {
    "GET": re.compile(
        r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static)/.+"
        rf"|{_API}/(startup-events|theme\.css|heartbeat/\w+|queue/data|upload_progress|file=.+)"
    ),
    "POST": re.compile(rf"{_API}/(queue/join|run/predict|cancel|reset|upload)/?"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # 'unsafe-inline' and 'unsafe-eval' are what Gradio's own page needs
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Doors:
    """An ASGI middleware that holds the above."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], files: str | Path, local: bool) -> None:
        """`files` is the folder of offered files. `local` False lets other hosts in (a public link)."""
        self.app, self.files, self.local = app, Path(files).resolve(), local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403 or 404."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif refused := self._refused(scope):
            await _answer(send, *refused)
        else:
            await self.app(scope, receive, _with_headers(send))

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.local and host.rpartition(":")[0 if _has_port(host) else 2] not in HOSTS:
            return 403, f"this server is {LOCAL} alone"
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "only the demo's own page may ask"
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        path = str(scope["path"])
        if method not in ALLOWED or not ALLOWED[method].fullmatch(path):
            return 404, "no such address"
        if path.startswith(_FILE) and not self._is_offered(path.removeprefix(_FILE)):
            return 404, "no such file"
        return None

    def _is_offered(self, name: str) -> bool:
        """True for an export's copy below the folder, links followed, as the name stands and as it reads unquoted."""
        try:
            ways = (Path(name), Path(unquote(name)))
            return all(one.is_absolute() and self.files in one.resolve().parents and OFFERED.fullmatch(one.name)
                       for one in ways)  # fmt: skip
        except (OSError, ValueError, RuntimeError):
            return False


def _has_port(host: str) -> bool:
    return host.rpartition(":")[2].isdigit() and not host.endswith("]")


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            message["headers"] = [*message.get("headers", []), *(pair for pair in added if pair[0] not in names)]
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str) -> None:
    body = f"{text}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
