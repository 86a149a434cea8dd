"""A small OpenAI-compatible server on 127.0.0.1 over transformers' own `generate`, one request at a time, greedy.

It shares nothing with our engines but the weights, so that what the server engine brings back can be held against them.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
NAME = "bench"


class Refusal(Exception):
    """What this server does not do; the client gets it with status 400."""


class GreedyServer:
    """Serves `model` while the block lasts; `url` is the API's address. Prompts are token ids or text."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self._one_at_a_time = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                card = {"id": NAME, "max_model_len": server.max_length}
                self._send(200, {"object": "list", "data": [card]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    self._send(200, server.complete(body))
                except Refusal as refusal:
                    self._send(400, {"error": {"message": str(refusal)}})

            def _send(self, status: int, answer: Body) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass  # the terminal is the bench's

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> GreedyServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def complete(self, body: Body) -> Body:
        """The answer to one request to /completions. Raises Refusal for sampling and log-probabilities."""
        if body.get("logprobs") or "messages" in body or body.get("temperature", 1.0) > 0:
            raise Refusal("this server completes greedily, without log-probabilities")
        prompt = body["prompt"]
        ids = list(self.tokenizer(prompt).input_ids) if isinstance(prompt, str) else prompt
        with self._one_at_a_time:
            spoken = self._speak(ids, body)
        ends = body.get("stop_token_ids", [])
        finish = "stop" if spoken[-1] in ends else "length"
        text = self.tokenizer.decode(spoken, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(spoken), "total_tokens": len(ids) + len(spoken)}
        return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": usage}

    def _speak(self, ids: list[int], body: Body) -> list[int]:
        import torch
        from transformers import GenerationConfig

        ends, strings = body.get("stop_token_ids"), body.get("stop")
        config = GenerationConfig(
            max_new_tokens=body["max_tokens"], do_sample=False, eos_token_id=ends, pad_token_id=0, stop_strings=strings
        )
        given = torch.tensor([ids], device=self.model.device)
        made = self.model.generate(
            given, attention_mask=torch.ones_like(given), generation_config=config,
            tokenizer=self.tokenizer if strings else None,
        )  # fmt: skip
        return made[0, len(ids) :].tolist()
