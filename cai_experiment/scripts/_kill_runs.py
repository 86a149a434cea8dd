"""Runs in processes of their own: forked from a parent that has imported everything, and killed at random moments."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cai_experiment.errors import EXIT_FAILURE, EXIT_OK

Job = Callable[[Path], None]


def fork(job: Job, folder: Path) -> int:
    """Run `job(folder)` in a child with its output in `folder`.log; gives the child's process id."""
    child = os.fork()
    if child:
        return child
    code = EXIT_FAILURE
    try:
        log = os.open(folder.with_name(folder.name + ".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        job(folder)
        code = EXIT_OK
    finally:
        os._exit(code)


def unbroken(job: Job, folder: Path) -> None:
    """One run without a kill; raises RuntimeError if it fails."""
    if os.waitpid(fork(job, folder), 0)[1] != 0:
        raise RuntimeError(f"a run that nobody killed failed; see {folder}.log")


def run_and_kill(job: Job, folder: Path, grow: int, delay: float) -> bool:
    """Kill a run `delay` seconds after its journal has grown by `grow` bytes; False if it ended before."""
    journal = folder / "journal.jsonl"
    goal = size(journal) + grow
    child = fork(job, folder)
    try:
        while size(journal) < goal:
            if os.waitpid(child, os.WNOHANG)[0]:
                return False
            time.sleep(0.002)
        time.sleep(delay)  # the moment within a step is random too
    except BaseException:  # Ctrl-C here must not leave the run behind
        os.kill(child, signal.SIGKILL)
        raise
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def size(path: Path) -> int:
    """Bytes of a file, 0 if there is none yet."""
    return path.stat().st_size if path.exists() else 0
