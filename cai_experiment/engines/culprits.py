"""Which row makes a pass fail? It is looked for by halves and comes back as its own error; the others are spoken to.

For engines over models in this process. A row that fails is rare, so nothing is saved on the search: the rows of the
failed pass begin anew (keyed sampling makes the same texts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.engines.common import Request, is_out_of_memory, memory_error
from cai_experiment.errors import EngineError

Speak = Callable[[list[Request]], list[Completion]]

# Harmless, and to be answered by one token: where even this fails, it is the engine (a dead CUDA context, no memory).
CANARY = Request(Prompt("canary", (), "answer", Sampling(0.0, max_tokens=1)), np.zeros(4, dtype=np.int32))


def failure(error: Exception, prompts: int) -> EngineError:
    """What to raise if `error`, in a pass of so many prompts, turns out to be the engine's own."""
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return memory_error(prompts)
    return EngineError(f"the engine fails on every prompt: {_in_a_line(error)}", "the same command resumes")


def apart(rows: list[Request], speak: Speak, broken: EngineError) -> Iterator[Completion]:
    """Speak to the rows of a pass that failed; one on which it fails alone comes back with finish="error".

    `speak` gives the completions of some rows, or raises whatever it likes. Raises `broken` if it is the engine.
    """
    if _tried([CANARY], speak)[1]:
        raise broken
    yield from _by_halves(rows, speak)


def _by_halves(rows: list[Request], speak: Speak) -> Iterator[Completion]:
    done, error = _tried(rows, speak)
    if not error:
        yield from done
    elif len(rows) == 1:
        size = len(rows[0].ids)
        yield Completion(rows[0].prompt.id, "", "error", size, size, 0, error)
    else:
        middle = len(rows) // 2
        yield from _by_halves(rows[:middle], speak)
        yield from _by_halves(rows[middle:], speak)


def _tried(rows: list[Request], speak: Speak) -> tuple[list[Completion], str]:
    """(completions, "") or ([], what was raised); the exception itself would keep tensors alive."""
    try:
        return speak(rows), ""
    except Exception as error:  # whatever a library raises
        return [], _in_a_line(error)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
