"""A real OpenAI-compatible server on 127.0.0.1, over any function of (path, body); and one that serves a real model.

`Serving` counts requests and can fail in every way that a network has. `ModelBehind` serves a folder's model through
our own HFEngine: completions from token ids or text, chat, log-probabilities of the 20 likeliest tokens, and usage.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

Body = dict[str, Any]
FAULTS = ("half", "cut", "silent", "trickle")


class Answer(Exception):
    """Raised by a function behind the server: another status than 200, or one of FAULTS on the wire."""

    def __init__(self, status: int = 200, body: Any = None, fault: str = "", **headers: str) -> None:
        super().__init__(status)
        self.status, self.fault = status, fault
        self.body = {"error": {"message": f"refused with {status}"}} if body is None else body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Serving:
    """A running server; use it as a context manager. `answer(path, body)` gives the JSON, or raises Answer."""

    def __init__(self, answer: Callable[[str, Body | None], Any], port: int = 0) -> None:
        self.answer = answer
        self.requests: list[tuple[str, Body | None, dict[str, str]]] = []
        self.running = self.most = 0
        self.changed = threading.Condition()
        self.released = threading.Event()  # ends what is silent or trickles
        serving = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                serving.serve(self, None)

            def do_POST(self) -> None:
                serving.serve(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128
            open_connections: ClassVar[set[socket.socket]] = set()

            def process_request(self, request: Any, client_address: Any) -> None:
                self.open_connections.add(request)
                super().process_request(request, client_address)

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hangs up is no fault of ours

        self.http = Quiet(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and break every connection, as a server that dies does."""
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.http.open_connections):
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()

    def serve(self, handler: BaseHTTPRequestHandler, body: Body | None) -> None:
        """One request: count it, answer it, count it out."""
        path = handler.path.removeprefix("/v1")
        with self.changed:
            self.requests.append((path, body, dict(handler.headers)))
            self.running += body is not None
            self.most = max(self.most, self.running)
            self.changed.notify_all()
        try:
            try:
                answer = Answer(200, self.answer(path, body))
            except Answer as other:
                answer = other
        finally:
            with self.changed:  # before the client can know, so that its next request is not counted beside this one
                self.running -= body is not None
                self.changed.notify_all()
        self._write(handler, answer)

    def _write(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        if answer.fault == "silent":
            self.released.wait()
        if answer.fault in ("silent", "closed"):
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        sent = data[: len(data) // 2] if answer.fault == "half" else data
        for name, value in {"Content-Length": str(len(sent)), **answer.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if answer.fault == "cut":
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
        elif answer.fault == "trickle":
            for byte in data:
                handler.wfile.write(bytes([byte]))
                if self.released.wait(0.2):
                    break
            handler.close_connection = True
        else:
            handler.wfile.write(sent)


# ---------------------------------------------------------------- what a model says


def completion(text: str, finish: str = "stop", prompt_tokens: int = 7, tokens: int = 3, **choice: Any) -> Body:
    """The JSON of a text completion."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **choice}], "usage": usage}


def chat(text: str | None, finish: str = "stop", **choice: Any) -> Body:
    """The JSON of a chat completion."""
    body = completion("", finish)
    message = {"role": "assistant", "content": text}
    body["choices"] = [{"index": 0, "message": message, "finish_reason": finish, **choice}]
    return body


def models(*names: str, **facts: Any) -> Body:
    """The JSON of /models."""
    return {"object": "list", "data": [{"id": name, "object": "model", **facts} for name in names]}


class _GivenIds:
    """A renderer that is given ids: they stand as JSON in the only turn. Options mean the whole vocabulary."""

    def __init__(self, renderer: Any) -> None:
        self.stops, self.max_length, self.layout = renderer.stops, renderer.max_length, renderer.layout
        self.vocabulary = len(renderer.tokenizer)

    def prompt_ids(self, turns: Any, speak_as: str, max_tokens: int = 0) -> list[int]:
        ids: list[int] = json.loads(turns[0].text)
        if len(ids) + max_tokens > self.max_length:
            raise ValueError(f"This model's maximum context length is {self.max_length} tokens")
        return ids

    def encode(self, text: str, markup: bool) -> list[int]:
        return list(json.loads(text))

    def option_ids(self, options: Any) -> list[int]:
        return list(range(self.vocabulary))


class ModelBehind:
    """What a server answers that holds a model in memory; give it to `Serving`."""

    def __init__(self, folder: Path, layout: str, name: str = "nano", max_length: int = 512) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from cai_experiment.engines.hf import HFEngine
        from cai_experiment.engines.render import Renderer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.renderer = Renderer(self.tokenizer, layout, max_length)
        given: Any = _GivenIds(self.renderer)
        self.engine = HFEngine(model, self.tokenizer, given, 32)
        self.name = name
        self.waiting: queue.Queue[tuple[Any, Future[Any]] | None] = queue.Queue()
        threading.Thread(target=self._speak, daemon=True).start()

    def _speak(self) -> None:
        """The one thread that computes; waits for prompts only while none is in work."""
        open_: dict[str, Future[Any]] = {}

        def feed() -> Iterator[Any]:
            while True:
                try:
                    item = self.waiting.get(block=not open_)
                except queue.Empty:
                    yield None
                    continue
                if item is None:
                    return
                prompt, future = item
                open_[prompt.id] = future
                yield prompt

        for done in self.engine.stream(feed()):
            open_.pop(done.id).set_result(done)

    def close(self) -> None:
        """Let the thread end."""
        self.waiting.put(None)

    def __call__(self, path: str, body: Body | None) -> Body:
        if path == "/models":
            return models(self.name, owned_by="tests", max_model_len=self.renderer.max_length)
        assert body is not None
        if body["model"] != self.name:
            raise Answer(404)
        if body.get("stop", []) != list(self.renderer.stop_strings) and body["max_tokens"] > 1:
            raise Answer(400, {"error": {"message": f"this server stops at {self.renderer.stop_strings} only"}})
        weighing = body.get("logprobs")
        done = self._ask(self._ids(path, body), body, bool(weighing))
        if done.finish == "error":
            raise Answer(400, {"error": {"message": done.error}})
        count = body.get("top_logprobs", weighing)
        text, extra = self._likeliest(done.logprobs, count, path) if weighing else (done.text, {})
        answer = (chat if path == "/chat/completions" else completion)(text, done.finish, **extra)
        cached = {"cached_tokens": done.prompt_tokens - done.computed_tokens}
        counts = {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens}
        answer["usage"] = {**counts, "prompt_tokens_details": cached}
        return answer

    def _ids(self, path: str, body: Body) -> list[int]:
        if path == "/chat/completions":
            text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        prompt = body["prompt"]
        return list(self.tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt

    def _ask(self, ids: list[int], body: Body, weighing: bool) -> Any:
        from cai_experiment.constitution.prompts import Turn
        from cai_experiment.engines.base import Prompt, Sampling

        future: Future[Any] = Future()
        heat, seed = body.get("temperature", 1.0), str(body.get("seed"))
        sampling = Sampling(heat, body["max_tokens"], 0, seed)
        turns = (Turn("instruction", json.dumps(ids)),)
        self.waiting.put((Prompt(str(id(future)), turns, "answer", sampling, ("*",) if weighing else ()), future))
        return future.result()

    def _likeliest(self, logprobs: tuple[float, ...], count: int, path: str) -> tuple[str, Body]:
        best = sorted(range(len(logprobs)), key=lambda i: -logprobs[i])[:count]
        named = [(self.tokenizer.decode([i]), logprobs[i]) for i in best]
        if path == "/chat/completions":
            listed = [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in named]
            return named[0][0], {"logprobs": {"content": [{**listed[0], "top_logprobs": listed}]}}
        return named[0][0], {"logprobs": {"tokens": [named[0][0]], "top_logprobs": [dict(named)]}}
