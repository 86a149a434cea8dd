"""What the terminal says of Ray actors: who has loaded, who has died. Their own output stays on their machines."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from cai_experiment.engines.suspects import DEATHS_IN_A_ROW

LOGS = f"{Path(os.environ.get('RAY_TMPDIR') or '/tmp') / 'ray' / 'session_latest' / 'logs'} on its machine"


def say(line: str) -> None:
    """A line on stderr; dropped where nobody reads it any more, as when the line to the terminal was."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def death(host: str, deaths: int, why: str, prompts: int, blamed: str, left: int) -> str:
    """The line for an actor's death, its `deaths`-th in a row with `prompts` in work, when `left` others live.

    `blamed` names the prompt that is to blame; "" where none is known.
    """
    fate = f"{blamed} is to blame and is not asked again" if blamed else f"{prompts} prompts of it are asked again"
    after = f"no other takes its place, {left} are left" if deaths >= DEATHS_IN_A_ROW else "a new one loads"
    return f"a Ray actor on {host} died ({why}), death {deaths} of at most {DEATHS_IN_A_ROW} in a row: {fate}, {after}"


def engine_death(host: str) -> str:
    """The line for an actor that lives, and whose engine has died and loads again."""
    return f"the engine of a Ray actor on {host} died and loads again, its prompts wait; why: {LOGS}"


def one_line(error: Exception) -> str:
    """What happened, from one of Ray's errors: the cause's own words, or the first line of Ray's."""
    cause = getattr(error, "cause", None) or error
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)[:200]
