"""Many engines behind the one seam: each in a Ray actor of its own, on this machine or on a cluster's.

The driver keeps everything that must not be lost. An actor is given a bounded number of prompts and owes their
completions; if it dies or answers nothing for too long, others get its prompts and a new actor takes its place.
Sampling is keyed, so who speaks and how often changes no text. Prompts that begin alike (one example's) go to the actor
that holds their prefix.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cai_experiment.engines.base import Completion, Engine, Prompt
from cai_experiment.engines.ray_actor import Loaded, Speaker
from cai_experiment.engines.ray_notices import death, engine_death, one_line, say
from cai_experiment.engines.suspects import DEATHS_IN_A_ROW, Suspects
from cai_experiment.errors import EngineError, UserError
from cai_experiment.records.manifest import MODEL_IDENTITY

SLOTS = 128  # prompts at a time of an engine that does not say: vLLM's scheduler is busy from about here on
AHEAD = 1.5  # prompts that an actor holds per slot, so that a free slot finds its next prompt without asking
CROWDED = 2.0  # an actor with this many times its share gives prompts away, although others must compute the prefix
KNOWN_BEGINNINGS = 16_384  # conversations whose actor is remembered; more than are ever open
RETURN_SECONDS = 1800.0  # without any living actor: a 65 GB model may load for half of this
CLOSE_SECONDS = 5.0  # then killed: SIGTERM must end a run within 10 s


@dataclass(slots=True, eq=False)
class _Place:
    """One actor and what it owes. `waiting` is the call that is awaited: its loading, then its completions."""

    actor: Any
    waiting: Any
    loaded: Loaded | None = None
    held: dict[str, Prompt] = field(default_factory=dict)
    alone: bool = False  # holds a prompt that is suspected of killing actors
    deaths: int = 0  # in a row
    heard: float = 0.0  # when it last answered, or was given work while it had none; monotonic seconds
    reloading: bool = False  # lives, and its engine loads again


class RayEngine:
    """`actors` engines made by `make`; Ray must be connected (pipeline.distributed does it). One stream at a time.

    A stream's state is touched by the thread that pulls it and by no other; `close` may be called meanwhile. Each actor
    that has loaded, and each that has died, is a line on stderr: Ray's own log of them stays on their machines.
    """

    name = "ray"
    elsewhere = True

    def __init__(
        self, make: Callable[[], Engine], actors: int, options: Mapping[str, Any], deadline: float = 600.0
    ) -> None:
        """Start the actors and wait until all have loaded; `options` are Ray's for an actor (num_cpus, num_gpus).

        `deadline`: seconds that an actor may hold prompts and answer nothing; then it counts as dead.
        Raises what loading raised on the first actor that failed (a UserError), or EngineError if it died or if the
        actors loaded different weights.
        """
        import ray

        self._ray = ray
        self._speaker = ray.remote(Speaker).options(max_concurrency=3, max_restarts=0, **options)
        self._make, self._actors, self._deadline = make, actors, deadline
        self._session = 0
        self._changing, self._closed = threading.Lock(), False  # no actor is started once it is closed
        self._lost: deque[Prompt] = deque()  # prompts of dead actors, to be given to others
        self._apart: deque[Prompt] = deque()  # those that are to run alone
        self._suspects = Suspects()
        self._actor_of: OrderedDict[str, _Place] = OrderedDict()  # by a conversation's first turn
        self._places = [_Place(*self._start()) for _ in range(actors)]
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ actors

    def _start(self) -> tuple[Any, Any]:
        """(actor, the call by which it says that it has loaded). Raises EngineError if the engine is closed."""
        with self._changing:
            self._check_open()
            actor: Any = self._speaker.remote(self._make)
        return actor, actor.loaded.remote()

    def _load(self) -> None:
        waiting, began = list(self._places), time.monotonic()
        while waiting:
            done, _ = self._ray.wait([place.waiting for place in waiting], num_returns=1)
            place = next(place for place in waiting if place.waiting in done)
            waiting.remove(place)
            try:
                place.loaded = one = self._ray.get(place.waiting)
            except self._ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                raise cause if isinstance(cause, UserError) else EngineError(one_line(error)) from error
            say(f"Ray actor {self._actors - len(waiting)} of {self._actors} has loaded on {one.host} after "
                f"{time.monotonic() - began:.0f} s: {one.first_line}")  # fmt: skip
        loaded = self.processes
        self._facts = loaded[0].facts
        for one in loaded:
            self._check_weights(one)
        hosts = len({one.host for one in loaded})
        self.first_line = f"{loaded[0].first_line} | {len(loaded)} Ray actors on {hosts} machine{'s' * (hosts > 1)}"

    @property
    def processes(self) -> list[Loaded]:
        """The actors that are alive and loaded, as far as is known."""
        return [place.loaded for place in self._places if place.loaded is not None]

    @property
    def width(self) -> int:
        """How many prompts all actors together want at a time."""
        return int(len(self._places) * self._share)

    def _check_weights(self, loaded: Loaded) -> None:
        """Raise EngineError if an actor does not speak with the same weights as the first."""
        for name in MODEL_IDENTITY:
            mine, other = self._facts.get(name), loaded.facts.get(name)
            if mine != other:
                raise EngineError(f"the Ray actor on {loaded.host} has {name} {other}, the first one {mine}",
                                  "make the machines alike, or name --model, --engine and --quantization")  # fmt: skip

    @property
    def _share(self) -> float:
        """Prompts that an actor is given before it has finished one."""
        slots = self._facts.get("slots")
        return AHEAD * (slots if isinstance(slots, int) else SLOTS)

    def describe(self) -> dict[str, object]:
        """What the manifest records: the engine inside, so that a run may change between one machine and many."""
        return {**self._facts, "actors": self._actors}

    # ------------------------------------------------------------ speaking

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`. A prompt that kills its actor even alone comes back with finish="error".

        Raises EngineError if no actor is left, or none came back for half an hour.
        """
        self._begin_session()
        source: Iterator[Prompt | None] = iter(prompts)
        more = True
        try:
            while True:
                more = self._hand_out(source) and more
                owed = self._lost or self._apart or any(place.held for place in self._places)
                if not owed and not more:
                    return
                if not owed and self.processes:
                    raise EngineError("the actors wait for prompts and the prompts wait for the actors")
                yield from self._receive()
        finally:
            self._begin_session()  # whatever is still in work is not wanted any more

    def _begin_session(self) -> None:
        self._session += 1
        self._lost.clear()
        self._apart.clear()
        for place in self._places:
            place.held.clear()
            place.alone = False
            if place.loaded and not self._closed:
                place.waiting = place.actor.take.remote(self._session)

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`. Raises EngineError for a prompt that cannot be weighed."""
        from cai_experiment.engines.common import choose_by_stream

        return choose_by_stream(self, prompts, options)

    def _hand_out(self, source: Iterator[Prompt | None]) -> bool:
        """Give every living actor its share of prompts; False if `source` has ended."""
        more = True
        batches: dict[int, list[Prompt]] = {}
        places = [place for place in self._places if place.loaded and not place.alone]
        if self._apart and places and not any(place.alone for place in self._places):
            places.remove(emptied := min(places, key=lambda place: place.deaths))
            if not emptied.held:
                emptied.alone = True
                self._give(emptied, self._apart.popleft(), batches)
        while places and min(len(place.held) for place in places) < self._share:
            prompt = self._lost.popleft() if self._lost else next(source, _END)
            if not isinstance(prompt, Prompt):
                more = prompt is None
                break
            if prompt.id in self._suspects:
                self._apart.append(prompt)
            else:
                self._give(self._place_for(prompt, places), prompt, batches)
        for index, batch in batches.items():
            self._places[index].actor.put.remote(self._session, batch)
        return more

    def _give(self, place: _Place, prompt: Prompt, batches: dict[int, list[Prompt]]) -> None:
        if not place.held:
            place.heard = time.monotonic()
        place.held[prompt.id] = prompt
        batches.setdefault(self._places.index(place), []).append(prompt)

    def _place_for(self, prompt: Prompt, places: Sequence[_Place]) -> _Place:
        """The actor that spoke in this conversation before, unless it is dead or crowded; else the least busy."""
        beginning = prompt.turns[0].text
        known = self._actor_of.pop(beginning, None)
        if known is None or known not in places or len(known.held) >= CROWDED * self._share:
            known = min(places, key=lambda place: len(place.held))
        self._actor_of[beginning] = known
        if len(self._actor_of) > KNOWN_BEGINNINGS:
            self._actor_of.popitem(last=False)
        return known

    def _receive(self) -> list[Completion]:
        """Wait for the actors, and take what the first of them have finished. Raises EngineError if it was closed."""
        calls = [place.waiting for place in self._places]
        done, _ = self._ray.wait(calls, num_returns=1, timeout=self._patience())
        self._check_open()
        if not done and not self.processes:
            raise EngineError(f"no Ray actor came back within {RETURN_SECONDS / 60:.0f} minutes",
                              "start the machines again (docs/SCALING.md); the same command resumes")  # fmt: skip
        done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        finished: list[Completion] = []
        for place in [place for place in self._places if place.waiting in done]:
            try:
                finished += self._answers(place, self._ray.get(place.waiting))
            except self._ray.exceptions.RayError as error:
                finished += self._bury(place, error)
        silent = EngineError(f"no answer for {self._deadline:g} s (--deadline)")
        for place in [place for place in self._places if self._left(place) <= 0]:
            finished += self._bury(place, silent)
        return finished

    def _left(self, place: _Place) -> float:
        """Seconds that an actor may go on without an answer."""
        return place.heard + self._deadline - time.monotonic() if place.held else RETURN_SECONDS

    def _patience(self) -> float:
        """Seconds until the first actor is overdue."""
        return max(0.0, min(self._left(place) for place in self._places))

    def _answers(self, place: _Place, result: Loaded | list[Completion]) -> list[Completion]:
        """An actor has loaded, or has finished prompts; it is asked for more."""
        if isinstance(result, Loaded):
            self._check_weights(result)
            say(f"the new Ray actor has loaded on {result.host}: {result.first_line}")
            place.loaded, result = result, []
        elif not result and not place.reloading:
            say(engine_death(_host(place)))
        place.reloading = not result and bool(place.held)
        place.waiting, place.heard = place.actor.take.remote(self._session), time.monotonic()
        owed = [completion for completion in result if place.held.pop(completion.id, None) is not None]
        if owed:
            place.deaths, place.alone = 0, place.alone and bool(place.held)
        for completion in owed:
            self._suspects.clear(completion.id)
        return owed

    # ------------------------------------------------------------ deaths

    def _bury(self, place: _Place, error: Exception) -> list[Completion]:
        """An actor died, or hangs: its prompts go to others and a new one takes its place.

        Gives the error of a prompt that is to blame. Raises EngineError if this was the last place and it is given up.
        """
        self._ray.kill(place.actor)  # where only its engine has failed
        prompts, host = list(place.held.values()), _host(place)
        place.held.clear()
        place.loaded, place.alone, place.reloading = None, False, False
        place.deaths += 1
        blamed = self._suspects.died([prompt.id for prompt in prompts])
        if not blamed:
            self._lost.extend(prompts)
        who = prompts[0].id if blamed else ""
        say(death(host, place.deaths, one_line(error), len(prompts), who, len(self._places) - 1))
        if place.deaths < DEATHS_IN_A_ROW:
            place.actor, place.waiting = self._start()
        else:
            self._places.remove(place)
        if not self._places:
            raise EngineError(f"every Ray actor died {DEATHS_IN_A_ROW} times running, at last: {one_line(error)}",
                              "mend it; the same command resumes")  # fmt: skip
        if not blamed:
            return []
        return [Completion(prompts[0].id, "", "error", error=f"{blamed}: {one_line(error)}", final="attempts")]

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")

    def close(self) -> None:
        """End the actors; those that do not close their engine in time are killed. A stream in work ends with it."""
        with self._changing:
            closed, self._closed = self._closed, True
        if closed or not self._ray.is_initialized():
            return
        closing = [place.actor.close.remote() for place in self._places]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        for place in self._places:
            self._ray.kill(place.actor)


_END = object()


def _host(place: _Place) -> str:
    return place.loaded.host if place.loaded else "a machine that it had not named yet"
