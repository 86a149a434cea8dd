"""Processes of their own for bench.py: run to the end or ended with all their children, and what one held at most."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def run_child(
    command: Sequence[str], env: Mapping[str, str], problem: str, seconds: float, fine: Sequence[int] = (0,)
) -> None:
    """Run a command in a session of its own, whose every process ends with it, however it ends.

    RuntimeError, in one line that begins with `problem`, if it cannot start, takes longer than `seconds`, or ends with
    an exit code that is not among `fine`.
    """
    try:
        process = subprocess.Popen(command, env=os.environ | dict(env), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    except OSError as error:
        raise RuntimeError(f"{problem}: {error}") from error
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{problem}: no end within {seconds:g} s") from None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode not in fine:
        last = [line for line in said.splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{problem}: {''.join(last)[:200] or f'exit code {process.returncode}'}")


def peak_bytes() -> int:
    """The most memory that this process has held since its program began, resident.

    Not `ru_maxrss` where /proc tells better: on Linux that one outlives exec, so a child begins with the peak of
    whoever started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024  # "VmHWM:    12345 kB"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
