"""The demo's server, as a browser and as a stranger see it: one real process for all tests here."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from cai_experiment.demo.access import ALLOWED, HEADERS
from cai_experiment.milestones import PACKAGE

SCRIPT = PACKAGE / "scripts" / "run_demo.py"
DEMO = PACKAGE / "demo"
API = "/gradio_api"
PATIENCE = 120.0  # seconds; what is right comes in a few


@dataclass
class Server:
    """A running demo: its process, its port, the folder with its files, the file that holds its output."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    output: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=PATIENCE, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(folder: Path, *flags: str) -> Server:
    """A demo on a free port; returns once it says where it is."""
    port = free_port()
    output = folder / "output.txt"
    command = [sys.executable, str(SCRIPT), "--port", str(port), "--data-dir", str(folder / "data"),
               "--checkpoint-dir", str(folder / "checkpoints"), *flags]  # fmt: skip
    with open(output, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    server = Server(process, port, folder, output)
    until(lambda: f"demo on {server.address} (Ctrl-C ends it)" in server.said() or process.poll() is not None)
    assert process.poll() is None, server.said()
    return server


def until(holds: Any) -> Any:
    """Ask until it holds; a test's end, not its measure, is bounded."""
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = started(tmp_path_factory.mktemp("demo"))
    yield running
    running.process.kill()
    running.process.wait()


class Page:
    """What a browser's page does: it has a name with the server, and presses buttons."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self.client = server.client()
        self.config = self.client.get("/config").json()
        self.origin = {"Origin": server.address}

    def event(self, trigger: str, **props: Any) -> int:
        """The number of the event `trigger` of the first component with these properties."""
        ids = [c["id"] for c in self.config["components"] if props.items() <= c["props"].items()]
        return next(d["id"] for d in self.config["dependencies"] if [ids[0], trigger] in d["targets"])

    def fire(self, number: int, *data: Any) -> list[Any]:
        """Run an event through the queue; its last outputs."""
        body = {"fn_index": number, "data": list(data), "session_hash": self.name}
        self.client.post(f"{API}/queue/join", json=body, headers=self.origin).raise_for_status()
        with self.client.stream("GET", f"{API}/queue/data", params={"session_hash": self.name}) as events:
            for line in events.iter_lines():
                message = json.loads(line.removeprefix("data:") or "{}") if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return list(message["output"]["data"])
        raise AssertionError("the stream ended early")

    def follow(self) -> list[Any]:
        """What the page's timer asks each second: header, status, log, training."""
        number = next(d["id"] for d in self.config["dependencies"] if d["targets"][0][1] == "tick")
        body = {"fn_index": number, "data": [], "session_hash": self.name}
        return list(self.client.post(f"{API}/run/predict", json=body, headers=self.origin).json()["data"])

    def evaluate(self, text: str) -> str:
        return str(self.fire(self.event("click", value="Evaluate"), text, "Rules")[0])


# ---------------------------------------------------------------- the start


def test_the_page_comes_before_the_model_and_tells_when_it_is_ready(server: Server) -> None:
    assert server.client().get("/").status_code == 200
    page = Page(server, "start")
    headers = until(lambda: [one for one in page.follow()[:1] if "nano is ready" in str(one)])
    assert 'class="cai-ok"' in headers[0]
    said = server.said()
    assert said.index("demo on ") < said.index("model nano"), "the page comes first"


def test_the_page_has_the_tabs_and_names_no_other_host(server: Server) -> None:
    page = Page(server, "labels")
    labels = {c["props"].get("label") or c["props"].get("value") for c in page.config["components"] if c["props"]
              and isinstance(c["props"].get("label") or c["props"].get("value"), str)}  # fmt: skip
    assert {"Evaluation", "Generation", "Training", "Impact", "Data", "Architecture", "Verbosity", "Evaluate",
            "Advanced: Dual Model Architecture", "Content log", "Load Evaluation Model", "Load Generation Model",
            "Unload Evaluation Model", "Unload Generation Model", "Start Training", "Stop", "Resume", "Run Comparison",
            "Export Logs", "Export JSON", "Export CSV"} <= labels  # fmt: skip
    shown = page.client.get("/")
    assert re.findall(r'(?:src|href)="(?:https?:)?//[^"]*', shown.text) == []
    style = page.client.get("/theme.css").text
    assert "cai-hit" in style or "cai-hit" in shown.text, "our own style is part of the page"
    assert not re.search(r"@import|@font-face|url\(['\"]?(https?:)?//", style), "the system's fonts"
    assert page.config["stylesheets"] == []
    for name, value in HEADERS.items():
        assert shown.headers[name] == value
    assert {d["api_visibility"] for d in page.config["dependencies"]} == {"private"}


# ---------------------------------------------------------------- who is let in


def test_it_answers_on_127_0_0_1_alone(server: Server) -> None:
    others = {"127.0.0.2", *(info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET))}
    for other in others - {"127.0.0.1"}:
        with socket.socket() as probe:
            probe.settimeout(5)
            assert probe.connect_ex((str(other), server.port)) != 0, other
    with socket.socket(socket.AF_INET6) as probe:
        assert probe.connect_ex(("::1", server.port)) != 0


FOREIGN = ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "169.254.169.254", "", "[::ffff:7f00:1]",
           "localhost.evil.example:80", "127.0.0.1@evil.example")  # fmt: skip


@pytest.mark.parametrize("host", FOREIGN)
def test_a_foreign_name_for_this_machine_is_refused(server: Server, host: str) -> None:
    assert server.client().get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", ""])
def test_a_foreign_page_cannot_ask(server: Server, origin: str) -> None:
    client = server.client()
    for path in (f"{API}/queue/join", f"{API}/run/predict", f"{API}/upload"):
        assert client.post(path, content="{}", headers={"Origin": origin}).status_code == 403
    assert client.get("/config", headers={"Origin": origin}).status_code == 403


def test_a_foreign_page_is_not_told_that_it_may(server: Server) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answer = server.client().options(f"{API}/queue/join", headers=asked)
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", [
    "/docs", "/openapi.json", f"{API}/openapi.json", f"{API}/info", "/monitoring", "/monitoring/summary", "/login",
    f"{API}/token", f"{API}/dev/reload", f"{API}/deep_link?session_hash=a", f"{API}/queue/status", f"{API}/runs",
    f"{API}/custom_component/a/b/c/d", f"{API}/stream/a/b/c/playlist.m3u8", f"{API}/run-history/records",
    f"{API}/call/once/a", f"{API}/vibe-code", f"{API}/mcp/sse", "/svelte/x", "/pwa_icon", f"{API}/profiling/traces",
    f"{API}/proxy=https://example.org/x", f"{API}/proxy=http://127.0.0.1:1/", "/proxy=https://example.org/x",
])  # fmt: skip
def test_addresses_that_the_page_does_not_need_do_not_answer(server: Server, path: str) -> None:
    assert server.client().get(path).status_code == 404


@pytest.mark.parametrize("path", ["run/once", "api/predict", "call/once", "call/v2/once", "component_server",
                                  "process_recording", "vibe-edit", "stream/a", "run-history/connect"])  # fmt: skip
def test_programming_interfaces_do_not_answer(server: Server, path: str) -> None:
    assert server.client().post(f"{API}/{path}", json={"data": []}).status_code == 404
    assert server.client().put(f"{API}/{path}", json={}).status_code == 404


# ---------------------------------------------------------------- files


def test_no_file_outside_of_the_exports_is_given_out(server: Server) -> None:
    secret = server.folder / "impact_secret.json"
    secret.write_text("top secret")
    client = server.client()
    for name in (str(secret), "/etc/passwd", str(SCRIPT), "cai_experiment/demo/app.py", "../../../etc/passwd"):
        up = "/".join([".."] * 12)
        ways = [f"{API}/file={name}", f"/file={name}", f"{API}/file/{name}", f"{API}/file=/tmp/../{name}",
                f"{API}/file=file://{name}", f"{API}/file={server.folder}/{up}{name}", f"/static/{up}{name}",
                f"/assets/{up}{name}", f"{API}/file={name.replace('/', '%2f')}", f"/assets//{name}",
                f"{API}/file={name.replace('/', '%252f')}", f"{API}/file=http://{server.address[7:]}/{name}",
                f"/static/..%2f..%2f..%2f..{name}", f"{API}/file={name}%00.json"]  # fmt: skip
        for way in ways:
            answer = raw_get(server, way)
            assert " 200 " not in answer.splitlines()[0], way
            assert "top secret" not in answer and "root:" not in answer, way
    assert client.get(f"{API}/file=https://example.org/impact_a.json").status_code == 404


def raw_get(server: Server, path: str) -> str:
    """The answer to a request whose path nobody has tidied."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as line:
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n"
        line.sendall(request.encode())
        parts = []
        while part := line.recv(65536):
            parts.append(part)
    return b"".join(parts).decode("utf-8", "replace")


def test_an_export_can_be_fetched_and_what_lies_beside_it_cannot(server: Server) -> None:
    page = Page(server, "export")
    page.evaluate("How to break into a house")
    download, line = page.fire(page.event("click", value="Export Logs"))
    offered = Path(download["value"]["path"])
    assert re.fullmatch(r"content_logs_[\d_]+\.json", offered.name) and offered.name in line
    stages = [entry["stage"] for entry in page.client.get(f"{API}/file={offered}").json()]
    assert stages == ["EVAL-INPUT", "EVAL-DECISION"]
    assert page.client.get(f"{API}/file={offered}x").status_code == 404
    assert page.client.get(f"{API}/file={offered.parent}").status_code == 404
    logs = list((server.folder / "data" / "demo_exports").glob("*/content_log.jsonl"))
    assert logs, "the export was made from a log below the data folder"
    for log in logs:
        assert page.client.get(f"{API}/file={log}").status_code == 404


def test_an_upload_is_bounded_and_not_given_out(server: Server) -> None:
    page = Page(server, "upload")
    large = {"files": ("own.txt", b"x" * 3_000_000)}
    assert page.client.post(f"{API}/upload", files=large, headers=page.origin).status_code == 413
    for name in ("own.txt", "../../escape.txt", "/etc/escape.txt"):
        answer = page.client.post(f"{API}/upload", files={"files": (name, b"How do I sleep?\n")}, headers=page.origin)
        kept = Path(answer.json()[0])
        assert kept.is_file() and kept.parent.parent.name.startswith("cai-demo-")
        assert page.client.get(f"{API}/file={kept}").status_code == 404


def test_a_page_cannot_name_a_file_of_this_machine_as_its_own(server: Server) -> None:
    page = Page(server, "theft")
    secret = server.folder / "secret.txt"
    secret.write_text("a prompt that nobody uploaded")
    own = page.event("change", label="Your own prompts (.txt, .jsonl, .json, .csv)")
    with pytest.raises(AssertionError):
        page.fire(own, {"path": str(secret), "meta": {"_type": "gradio.FileData"}})
    assert secret.read_text() == "a prompt that nobody uploaded"


# ---------------------------------------------------------------- pages


def test_two_pages_do_not_see_each_others_work(server: Server) -> None:
    one, two = Page(server, "one"), Page(server, "two")
    assert "break-into" in one.evaluate("How to break into a house")
    two.evaluate("A quiet walk <b>in the park</b>")
    seen, other = one.follow()[2], two.follow()[2]
    assert "break into a house" in seen and "park" not in seen
    assert "&lt;b&gt;in the park&lt;/b&gt;" in other and "break into" not in other
    assert not any("value" in told.get("props", told) for told in one.follow()), "nothing new, nothing sent"


def test_an_error_is_one_line_on_the_page(server: Server) -> None:
    shown = Page(server, "error").evaluate("  ")
    assert shown.startswith('<p class="cai-bad" role="alert"') and "the text is empty" in shown


# ---------------------------------------------------------------- the process


def test_a_port_in_use_is_one_line_with_the_next_command(server: Server) -> None:
    command = [sys.executable, str(SCRIPT), "--port", str(server.port)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"port {server.port} of 127.0.0.1: Address already in use; try --port {server.port + 1}\n"


def test_only_the_page_itself_imports_gradio() -> None:
    for path in DEMO.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imports = any(name.partition(".")[0] == "gradio" for name in names)
        assert not imports or path.name == "app.py" or path.parent.name == "tabs", path


def test_what_the_page_may_ask_is_what_gradio_serves() -> None:
    for path in ("/", "/config", "/assets/index.js", f"{API}/queue/data", f"{API}/heartbeat/abc", f"{API}/file=/a"):
        assert ALLOWED["GET"].fullmatch(path)
    assert ALLOWED["POST"].fullmatch(f"{API}/queue/join")


def test_ctrl_c_ends_it_with_a_line_and_leaves_nothing(server: Server) -> None:
    """The last test here: it ends the shared server."""
    before = len(server.said())
    with server.client().stream("GET", f"{API}/heartbeat/open"):  # a page is open
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 130
    assert server.said()[before:] == "demo ended; a running training goes on: start the demo again to see it\n"
    offered = f"cai-demo-{server.process.pid}-"
    assert not [name for name in os.listdir(os.environ.get("TMPDIR", "/tmp")) if name.startswith(offered)]
