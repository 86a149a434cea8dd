"""A judge that stops answering ends the run with one line, instead of hours of answers that never come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import BadInputError, EngineError

LEAST, MOST = 8, 32  # answers in a row that never came, by how many are under way at a time


class Watched:
    """A judge's engine, until nothing comes back from it any more.

    An answer whose attempts are used up is one question's fault as long as others are answered. As many in a row as
    are under way at a time are the engine's: each of them has cost a whole deadline, and the next ones will.
    """

    def __init__(self, engine: Any, named: str, say: Callable[[str], str] = str) -> None:
        """`named` is what the user calls the engine ("--judge URL"); `say` words the engine's own errors by it."""
        self.engine, self.named, self.say = engine, named, say
        self.patience = min(MOST, max(LEAST, int(getattr(engine, "width", LEAST))))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self.engine, name)

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`. Raises EngineError when `patience` answers in a row never came."""
        silent = 0
        try:
            for completion in self.engine.stream(prompts):
                silent = silent + 1 if completion.final == "attempts" else 0
                yield completion
                if silent >= self.patience:
                    said = f"{self.named} answers nothing any more ({completion.error})"
                    raise EngineError(said, "what it said is kept: the same command goes on")
        except (BadInputError, EngineError) as error:
            raise type(error)(self.say(str(error))) from error
