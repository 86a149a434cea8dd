"""The engine over an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted API.

Texts are drawn by the server, seeded per request; a resumed run therefore need not write the same bytes as an unbroken
one, as it does with the engines in this process. The key comes from the environment (CAI_API_KEY, else OPENAI_API_KEY).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Iterable, Iterator, Sequence

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.render import Renderer
from cai_experiment.engines.server_client import Client, Refused, Retry
from cai_experiment.engines.server_forms import TOO_LONG, Call, make_call, read_answer
from cai_experiment.engines.server_probe import FORMS, probe
from cai_experiment.errors import EngineError, UserError

LOOK_SECONDS = 0.05  # while there is room: prompts may come from the completions of another engine

TOLD = "the prompt tokens that the server's cache did not hold, as it says"
UNTOLD = "the server does not say what its cache held (vLLM does with --enable-prompt-tokens-details)"

Results = SimpleQueue[Completion | Exception]


class ServerEngine:
    """Speaks through a server. Several streams may be open at once; they share the bound on requests."""

    name = "server"
    elsewhere = True

    def __init__(
        self, url: str, model: str | None, renderer: Renderer | None = None, layout: str = "chat",
        concurrency: int = 64, deadline: float = 600.0, seed: int = 0, retry: Retry | None = None,
    ) -> None:  # fmt: skip
        """Ask the server what it serves and how (a few one-token requests).

        `model` as the server names it, or a hub id or folder whose last part is that name; None takes the only one.
        `renderer` (with the model's own tokenizer) sends token ids and sets the layout; its `max_length` is lowered
        to the server's context. Without one, `layout` "chat" sends messages and "base" sends text. `deadline` in
        seconds for one row, retries and waits included; `seed` is the jitter's. Raises EngineError or BadInputError,
        one line each.
        """
        self.renderer, self.layout = renderer, renderer.layout if renderer else layout
        self.client = Client(url, concurrency, deadline, seed, retry)
        try:
            self.served = probe(self.client, model, renderer, self.layout)
        except BaseException:
            self.client.close()
            raise
        self.dialect = self.served.dialect
        self.first_line = self._first_line()

    def _first_line(self) -> str:
        owner = f", {self.served.card['owned_by']}" if "owned_by" in self.served.card else ""
        form = f"{FORMS[self.dialect.kind]} ({self.served.why})"
        mute = "" if self.can_weigh else " | it gives no log-probabilities, so it cannot be the critic"
        untold = "" if self.served.tells_cached else f" | {UNTOLD}"
        return f"model {self.dialect.model} | engine server ({self.client.url}{owner}) | {form}{mute}{untold}"

    @property
    def width(self) -> int:
        """How many prompts it wants at a time."""
        return self.client.gate.most

    @property
    def can_weigh(self) -> bool:
        """False if the server gives no log-probabilities: prompts with options then stop the stream."""
        return self.dialect.logprobs > 0

    def describe(self) -> dict[str, object]:
        """What the manifest records; no credentials."""
        return {
            "model": self.dialect.model,
            "engine": self.name,
            "url": self.client.url,
            "served": self.served.card,
            "form": self.dialect.kind,
            "form_why": self.served.why,
            "layout": self.layout,
            "logprobs": "of the options" if self.dialect.by_id else self.dialect.logprobs,
            "sampling": "the server's, seeded per request" + ("" if self.dialect.neutral else ", with its own top_k"),
            "computed_tokens": TOLD if self.served.tells_cached else f"unknown, all prompt tokens counted: {UNTOLD}",
            "max_length": self.renderer.max_length if self.renderer else None,
        }

    # ------------------------------------------------------------ speaking

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`. Raises EngineError for what no row will get past: a refused key, a model that is
        served no longer, prompts with options where the server gives no log-probabilities."""
        source, results = iter(prompts), Results()
        pending: set[Future[None]] = set()
        taking, owed = True, 0
        try:
            while taking or owed:
                while taking and owed < self.client.gate.most:
                    try:
                        prompt = next(source)
                    except StopIteration:
                        taking = False
                        break
                    if prompt is None:
                        break
                    self._begin(prompt, results, pending)
                    owed += 1
                if owed:
                    try:
                        result = results.get(timeout=LOOK_SECONDS if taking and owed < self.client.gate.most else None)
                    except Empty:
                        continue
                    owed -= 1
                    if isinstance(result, Exception):
                        raise result
                    yield result
                elif taking:
                    from cai_experiment.engines.common import DEADLOCK

                    raise EngineError(DEADLOCK)
        finally:
            for future in list(pending):
                future.cancel()

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`; () for a prompt of whose options none is among the server's likeliest tokens."""
        from cai_experiment.engines.common import choose_by_stream

        return choose_by_stream(self, prompts, options)

    def close(self) -> None:
        """Drop every request and hang up; a stream that still waits ends with an error."""
        self.client.close()

    # ------------------------------------------------------------ one row

    def _begin(self, prompt: Prompt, results: Results, pending: set[Future[None]]) -> None:
        """Render `prompt` here, since a tokenizer serves one thread, and send it off."""
        if prompt.options and not self.can_weigh:
            raise EngineError(
                f"--server {self.client.url} gives no log-probabilities, and verdicts need them",
                "name a --critic there that gives them, or serve with vLLM, SGLang or llama.cpp",
            )
        try:
            call = make_call(self.dialect, prompt)
        except Exception as error:  # any fault of one prompt is its own
            results.put(Completion(prompt.id, "", "error", error=str(error) or type(error).__name__, final="prompt"))
            return
        future = self.client.submit(self._serve(call, results))
        pending.add(future)
        future.add_done_callback(pending.discard)

    async def _serve(self, call: Call, results: Results) -> None:
        """Put into `results` what becomes of a row: its completion, or what ends the stream."""
        try:
            results.put(await self._speak(call))
        except asyncio.CancelledError:
            results.put(EngineError(f"--server {self.client.url}: the engine was closed", "the same command resumes"))
            raise
        except UserError as error:
            results.put(error)
        except Exception as error:  # Fault, Refused, and whatever else is wrong with this row alone
            line, final = self.client.one_line(error), "prompt" if isinstance(error, Refused) else "attempts"
            results.put(Completion(call.prompt.id, "", "error", error=f"server: {line}", final=final))

    async def _speak(self, call: Call) -> Completion:
        """Ask with the fullest body, then with barer ones while the server says that the prompt is too long."""
        read = partial(read_answer, call)
        for body in call.bodies:
            try:
                return await self.client.ask(self.dialect.path, body, read, call.key)
            except Refused as refusal:
                if refusal.status == 404:
                    raise EngineError(
                        f"--server {self.client.url} serves {self.dialect.model} no longer ({refusal})",
                        "serve it again; the same command resumes",
                    ) from None
                if not TOO_LONG.search(str(refusal)):
                    raise
                too_long = refusal
        new = call.bodies[0]["max_tokens"]
        raise Refused(f"prompt and {new} new tokens do not fit in a context ({too_long})")
