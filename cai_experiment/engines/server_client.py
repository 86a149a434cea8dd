"""Asks an OpenAI-compatible server: never more at a time than it bears, patiently, and never for ever.

Concurrency follows additive increase, multiplicative decrease (Chiu and Jain 1989): it is halved when the server says
429 or 503 or is too slow, and grows by one per round of answers. A fault of one request uses up that request's
attempts; a server that is busy or gone is waited for by the clock, so that a restart costs no row. Gone is it too
behind a tunnel (`ssh -L`) that accepts what it cannot hand on: connections break, and no request is answered. The
deadline ends all of it.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Callable, Coroutine, TypeVar
from urllib.parse import urlsplit

from cai_experiment.engines.server_address import (
    KEY_NAMES,
    error_message,
    is_loopback,
    read_address,
    read_key,
    retry_after,
)
from cai_experiment.errors import BadInputError, EngineError

SECONDS_TO_CONNECT = 30.0
SECONDS_TO_CLOSE = 5.0
REQUEST_SHARE = 0.5  # of the deadline for one request, so that one which hangs leaves time for another
NOT_WHOLE = (KeyError, IndexError, TypeError, ValueError, AttributeError)  # what reading an odd answer may raise

Answer = TypeVar("Answer")


class Fault(Exception):
    """What may pass: the request is worth another attempt."""

    def __init__(
        self, message: str, crowded: bool = False, busy: bool = False, wait: float = 0.0, broke: bool = False
    ) -> None:
        """`busy`: the server's state, no attempt, waited for by the clock; `wait` is its Retry-After in seconds.

        `broke`: the connection did; that is this request's fault only where others are answered meanwhile.
        """
        super().__init__(message)
        self.crowded, self.busy, self.wait, self.broke = crowded, busy, wait, broke


class Refused(Exception):
    """What the server will not do for this request, however often it is asked; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 200) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Retry:
    """How a request is repeated: the n-th wait is first_wait * 2^(n-1), at most longest_wait, halved by up to half."""

    attempts: int = 3  # the first and at most two more
    first_wait: float = 1.0  # seconds
    longest_wait: float = 30.0

    def wait(self, tries: int, key: str) -> float:
        """Seconds before the next attempt after `tries`; the jitter depends on `key` and `tries` alone."""
        wait = min(self.longest_wait, self.first_wait * 2.0 ** (tries - 1))
        return wait * (0.5 + 0.5 * random.Random(f"{key}/{tries}").random())


class Gate:
    """How many requests are under way, and how many may be. Lives in the client's event loop."""

    def __init__(self, most: int) -> None:
        self.most, self.level, self.running = most, float(most), 0
        self._lowered = self._closed_until = 0.0  # monotonic seconds
        self._room = asyncio.Event()

    async def enter(self) -> None:
        """Wait for a place, and until a pause is over."""
        while True:
            pause = self._closed_until - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self.running < int(self.level):
                self.running += 1
                return
            else:
                self._room.clear()
                await self._room.wait()

    def leave(self) -> None:
        """Give the place back."""
        self.running -= 1
        self._room.set()

    def went_well(self) -> None:
        """One more place per round of answers."""
        self.level = min(float(self.most), self.level + 1 / self.level)

    def crowded(self, sent: float) -> None:
        """Halve the places, but once for all requests that were `sent` (monotonic seconds) before the last halving."""
        if sent >= self._lowered:
            self.level = max(1.0, min(self.level, self.running) / 2)
            self._lowered = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Let nothing in for `seconds`."""
        self._closed_until = max(self._closed_until, time.monotonic() + seconds)


class Client:
    """One server behind one address, asked from an event loop in a thread of its own."""

    def __init__(self, url: str, most: int, deadline: float, seed: int = 0, retry: Retry | None = None) -> None:
        """`most` requests at a time; `deadline` in seconds for one row: all its requests and waits, the queue apart.

        Raises BadInputError for an address, a bound, a deadline or a key that cannot be used.
        """
        if most < 1:
            raise BadInputError(f"--server-concurrency {most} is less than 1", "give 1 or more")
        if not deadline > 0:
            raise BadInputError(f"--deadline {deadline:g} is not above 0 seconds", "give seconds, e.g. 600")
        self.url, auth = read_address(url)
        self._key = read_key()
        self._secrets = [secret for secret in (self._key, auth and auth[1]) if secret]
        self.deadline, self.seed, self.retry = deadline, seed, retry or Retry()
        self.gate = Gate(most)
        self._answered = -math.inf  # when the server last answered a request, whatever it said; monotonic seconds
        self._http = self._open(auth, most)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server-client", daemon=True)
        self._thread.start()

    def _open(self, auth: tuple[str, str] | None, most: int) -> Any:
        import httpx

        return httpx.AsyncClient(
            auth=auth,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(None, connect=min(SECONDS_TO_CONNECT, self.deadline)),  # the deadline is ours
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
            trust_env=not is_loopback(self.url),  # no proxy before this machine itself
        )

    # ------------------------------------------------------------ from any thread

    def submit(self, work: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        """Start `work` in the loop. Raises EngineError once the client is closed."""
        if self._loop.is_closed():
            work.close()
            raise EngineError(f"--server {self.url}: the engine is closed", "load it again")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Drop every request and end the thread; returns within seconds, and does nothing the second time."""
        if self._loop.is_closed():
            return
        try:
            self.submit(self._drop_all()).result(SECONDS_TO_CLOSE)
        except TimeoutError:
            return  # the thread is a daemon: it holds nothing up
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS_TO_CLOSE)
        if not self._thread.is_alive():
            self._loop.close()

    async def _drop_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    # ------------------------------------------------------------ in the loop

    async def ask(
        self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Answer], key: str = "",
        patience: float | None = None,
    ) -> Answer:  # fmt: skip
        """POST `body` (None: GET) to `path` and give what `read` makes of the JSON.

        `patience` in seconds bounds the waits (None: the deadline; 0: a single attempt); requests and waits together
        take at most the deadline, not counting the time in the queue. `read` may raise NOT_WHOLE for an answer of
        another shape. Raises Fault when attempts, patience or deadline are used up, Refused, and EngineError for what
        no request will get past.
        """
        used, tries, waited, spent = 0, 0, 0.0, 0.0
        patience = self.deadline if patience is None else patience
        while True:
            await self.gate.enter()
            sent = time.monotonic()
            try:
                answer = await self._once(path, body, read, min(REQUEST_SHARE * self.deadline, self.deadline - spent))
                self.gate.went_well()
                return answer
            except Fault as fault:
                tries += 1
                used += not (fault.busy or (fault.broke and self._answered < sent))
                wait = max(self.retry.wait(tries, f"{self.seed}/{key}"), fault.wait)
                waited, spent = waited + wait, spent + time.monotonic() - sent + wait
                if fault.crowded:
                    self.gate.crowded(sent)
                if patience == 0 or waited > patience or spent >= self.deadline or used >= self.retry.attempts:
                    raise
                self.gate.pause(fault.wait)
            finally:
                self.gate.leave()
            await asyncio.sleep(wait)

    async def _once(
        self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Answer], seconds: float
    ) -> Answer:
        response = await self._send(path, body, seconds)
        if response.is_success:
            try:
                return read(response.json())
            except NOT_WHOLE as error:
                about = self.one_line(f"{type(error).__name__}: {error}")
                raise Fault(f"it sent no whole answer ({about}): {self.one_line(response.text, 60)!r}") from None
        raise self._failure(response)

    async def _send(self, path: str, body: dict[str, Any] | None, seconds: float) -> Any:
        import httpx

        try:
            async with asyncio.timeout(seconds):
                response = await self._http.request("GET" if body is None else "POST", self.url + path, json=body)
        except TimeoutError:
            raise Fault(f"no whole answer within {seconds:.3g} s", crowded=True) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Fault(f"it cannot be reached ({self.one_line(error)})", busy=True) from None
        except httpx.RequestError as error:
            raise Fault(f"the connection broke ({self.one_line(error)})", broke=True) from None
        self._answered = time.monotonic()
        return response

    def _failure(self, response: Any) -> Exception:
        """What an answer that is no success means: for this request, for now, or for good."""
        status: int = response.status_code
        said = f"{status}: {self.one_line(error_message(response.text)) or response.reason_phrase}"
        if status in (401, 403):
            next_step = "put a valid key into" if self._key else "no key is set: put one into"
            return EngineError(f"--server {self.url} answers {said}", f"{next_step} {KEY_NAMES[0]}")
        if status == 402:
            return EngineError(f"--server {self.url} answers {said}", "pay there; the same command resumes")
        if 300 <= status < 400:
            to = urlsplit(response.headers.get("location", ""))._replace(query="", fragment="").geturl()
            return EngineError(f"--server {self.url} redirects to {to}", "give --server the address itself")
        wait = retry_after(response.headers.get("retry-after"))
        if status in (429, 502, 503):
            return Fault(said, crowded=status != 502, busy=True, wait=wait)
        if status in (408, 504):
            return Fault(said, crowded=True, wait=wait)
        return Fault(said, wait=wait) if status >= 500 else Refused(said, status)

    def one_line(self, said: object, most: int = 200) -> str:
        """What a server or a library said, in one line of at most `most` characters, without the key."""
        text = str(said) or type(said).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = " ".join(text.split())
        return text if len(text) <= most else text[:most] + "..."
